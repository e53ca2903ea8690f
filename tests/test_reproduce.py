"""bench/reproduce.py: real runs of small models; what is done is not repeated; the numbers of the table."""

import json
import signal
import sys

import numpy as np
import pytest

from bench import reproduce
from tests.helpers import SMALL, start, wait_until


def test_runs_that_are_done_on_this_machine_are_not_repeated(facts, tmp_path, monkeypatch, capsys):
    small = (option.removeprefix("--").split("=") for option in SMALL)
    small = {name: int(value) for name, value in small if name not in ("device", "mem_layers")}
    small |= {"dataset": str(facts), "n_ffn": 8}
    rows = {"wide": ("facts-dense", small | {"n_ffn": 16}), "thin": ("facts-dense", small)}
    monkeypatch.setattr(reproduce, "PARTS", {"tiny": ("cpu", "does it work?", (1, 2), rows)})
    monkeypatch.setattr(reproduce, "OUT", tmp_path / "out")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.jsonl")

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
        reproduce.main()
        return capsys.readouterr().out

    assert "4 of   4 runs to do" in main("--list")
    table = main()
    lines = [json.loads(line) for line in reproduce.RESULTS.read_text().splitlines()]
    assert len({line["command"] for line in lines}) == len(lines) == 4 and not any(
        (tmp_path / "out").iterdir()
    )
    for name, (preset, options) in rows.items():
        mine = [
            line
            for s in (1, 2)
            for line in lines
            if line["command"] == reproduce.command_of(preset, options, s)
        ]
        losses = [line["val_loss"] for line in mine]
        assert losses[0] != losses[1]  # seeds differ
        error = np.std(losses, ddof=1) / np.sqrt(2)
        row = next(row for row in table.splitlines() if row.startswith(f"| {name} |"))
        assert f"{np.mean(losses):.3f} ± {error:.3f}" in row
    before = reproduce.RESULTS.read_bytes()
    assert "0 of   4 runs to do" in main("--list")
    main()
    assert reproduce.RESULTS.read_bytes() == before

    other = [
        line | {"machine": "another"} if "n_ffn=16" in line["command"] else line for line in lines
    ]
    reproduce.RESULTS.write_text(
        "".join(json.dumps(line) + "\n" for line in other[:-1])
    )  # and one is lost
    lost = 0 if "n_ffn=16" in other[-1]["command"] else 1
    assert f"{2 + lost} of   4 runs to do" in main("--list")
    assert "1 of   4 runs to do" in main("--list", "--any")
    unknown = [
        {k: v for k, v in line.items() if k != "settings"} for line in lines
    ]  # by an older version
    reproduce.RESULTS.write_text("".join(json.dumps(line) + "\n" for line in unknown))
    assert "4 of   4 runs to do" in main("--list", "--any")
    reproduce.RESULTS.write_bytes(before)
    assert "0 of   4 runs to do" in main("--list")
    monkeypatch.setitem(
        reproduce.PRESETS["facts-dense"], "beta2", 0.9
    )  # another experiment, by the same command
    assert "4 of   4 runs to do" in main("--list", "--any")


def test_ctrl_c_keeps_the_runs_at_work(facts, tmp_path):
    small = dict(option.removeprefix("--").split("=") for option in SMALL if "device" not in option)
    small |= {"dataset": str(facts), "max_iters": 300, "eval_interval": 300}
    code = f"""
import sys
from pathlib import Path
from bench import reproduce
reproduce.OUT, reproduce.RESULTS = Path({str(tmp_path)!r}, "out"), Path({str(tmp_path)!r}, "results.jsonl")
reproduce.PARTS = {{"tiny": ("cpu", "does it stop?", range(1, 7), {{"one": ("facts-dense", {small!r})}})}}
sys.argv[1:] = ["--only=tiny"]
with reproduce.one_line("reproduce.py"):
    reproduce.main()
"""
    process = start(sys.executable, "-c", code)
    wait_until(lambda: len([*tmp_path.glob("out/*/log.jsonl")]) == 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130 and "at work end first" in errors, errors
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted(line["command"][-1] for line in lines) == ["1", "2"]
    assert all(line["curve"][-1][0] == 300 for line in lines)  # to their end


def test_facts_of_another_version_are_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "OUT", tmp_path / "reproduce")
    reproduce.make_dataset(30)
    questions = tmp_path / "facts30" / "recall.jsonl"
    right, made = questions.read_text(), questions.stat().st_mtime_ns
    assert right.count("\n") == 180
    reproduce.make_dataset(30)
    assert questions.stat().st_mtime_ns == made
    questions.write_text(right.replace("was", "were", 1))
    reproduce.make_dataset(30)
    assert questions.read_text() == right


def test_known_bits_are_counted_for_the_people_of_the_row():
    rows = reproduce.PARTS["capacity"][3]
    results = {reproduce.command_of(*row, seed): dict(recall=0.5, val_loss=1.0, tokens_per_s=1)
               for row in rows.values() for seed in (1, 2)}  # fmt: skip
    table = reproduce.table("capacity", results)
    row = next(row for row in table.splitlines() if row.startswith("| dense, 4,000 people |"))
    assert (
        "50.0 ± 0.0 (50, 50)" in row and "108,471 (0.51)" in row
    )  # 2,000 people of 54.236 bits, 0.21M parameters


@pytest.mark.parametrize("part", list(reproduce.PARTS))
def test_rows_of_a_part_can_be_built_and_have_equal_flops(part):
    tier, _, seeds, rows = reproduce.PARTS[part]
    sizes = {label: reproduce.size(*row) for label, row in rows.items()}
    flops = {
        label: size[1] * (0.5 if "twice" in label or "2x" in label else 1)
        for label, size in sizes.items()
    }
    assert max(flops.values()) / min(flops.values()) < 1.04, flops
    if part == "ablations":  # a pool for each layer is counted for each
        assert max(sizes.values())[0] / min(sizes.values())[0] < 1.03, sizes
    commands = [reproduce.command_of(*row, seed) for row in rows.values() for seed in seeds]
    assert len(set(commands)) == len(commands) and tier in ("cpu", "more", "gpu")


def test_the_tables_in_the_documentation_are_those_of_the_results():
    lines = [json.loads(line) for line in reproduce.RESULTS.read_text().splitlines()]
    known = reproduce.this_machine(False)
    update = next(
        line for line in lines if "--init_from" in line["command"]
    )  # its machine has the ablations, too
    machines = ({name: line[name] for name in known} for line in (lines[0], update))
    results, others = (
        reproduce.results_of(lines, reproduce.all_settings(), machine) for machine in machines
    )
    written = "".join(
        (reproduce.ROOT / name).read_text() for name in ("README.md", "bench/README.md")
    )
    parts = "headline", "systems", "seconds", "slots", "text", "capacity", "constant rates"
    rows = [
        row
        for part in parts
        for row in reproduce.table(part, results).splitlines()[4:]
        if "not measured" not in row
    ]
    parts = "ablations", "new people", "moved people"
    rows += [row for part in parts for row in reproduce.table(part, others).splitlines()[4:]]
    assert len(rows) == 40 + 37 and not [row for row in rows if row not in written]


def test_differences_are_paired_by_seed():
    losses = {
        "Memory+": {1: 1.0, 2: 2.0},
        "dense": {1: 1.1, 2: 2.3, 3: 9.0},
        "mixture of experts": {},
    }
    results = {reproduce.command_of(*reproduce.PARTS["text"][3][row], seed): dict(val_loss=loss, tokens_per_s=1)
               for row, line in losses.items() for seed, loss in line.items()}  # fmt: skip
    first, dense, experts = reproduce.table("text", results).splitlines()[4:]
    assert dense.startswith("| dense | 0.200 ± 0.100 | 4.133 ± ") and first.startswith(
        "| Memory+ |  | 1.500 ± "
    )
    assert "not measured" in experts


def test_what_is_forgotten_at_the_same_recall_is_read_between_evaluations():
    curve = [
        [0, 0.0, 2.0, 0.5, 0.95, 0.6],
        [50, 0.8, 1.0, 0.5, 0.85, 0.7],
        [100, 1.0, 1.0, 0.5, 0.75, 0.8],
    ]
    assert (
        reproduce.lost_at(curve, 0.9) == pytest.approx(0.15)
        and reproduce.lost_at(curve[:2], 0.9) is None
    )
    rows = reproduce.PARTS["new people"][3]
    line = dict(curve=curve, update_seconds=7.4, bytes=1_230_000)
    results = {reproduce.command_of(*row, seed): line for row in rows.values() for seed in (1, 2)}
    row = reproduce.table("new people", results).splitlines()[4]
    assert "| 100.0 ± 0.0 (100, 100) | 20.0 ± 0.0 | 15.0 ± 0.0 | 0.200 ± 0.000 | 7 | 1.23 |" in row


def test_updates_of_a_seed_are_of_the_model_of_that_seed():
    commands = [
        reproduce.command_of(*row, 3)
        for part in ("new people", "moved people")
        for row in reproduce.PARTS[part][3].values()
    ]
    assert len(set(commands)) == len(commands) == 20
    assert all(
        f"--init_from={reproduce.base_of(3)} " in c
        and c.endswith(" --seed=3")
        and "mem_keys" not in c
        for c in commands
    )
