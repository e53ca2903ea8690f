"""bench/reproduce.py and experiments.py: real runs of small models, and the numbers of the tables."""

import json
import signal
import sys

import numpy as np
import pytest
import torch

from bench import draw, experiments, reproduce
from bench.experiments import PARTS, Part, training
from data.dataset import open_dataset
from data.facts import prepare as facts_prepare
from edit import update
from model import GPT
from systems.engram import make_ngrams
from tests.helpers import SMALL, prepare, start, train_here, wait_until


def small_options(facts):
    small = dict(option.removeprefix("--").split("=") for option in SMALL if "device" not in option)
    del small["mem_layers"]
    return {name: int(value) for name, value in small.items()} | {"dataset": str(facts)}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_runs_that_are_done_on_this_machine_are_not_repeated(facts, tmp_path, monkeypatch, capsys):
    def set_parts():
        rows = {"thin": training("facts-dense", **{**small_options(facts), "n_ffn": 8})}
        part = Part("cpu", "does it work?", (1, 2), rows)
        monkeypatch.setattr(reproduce, "PARTS", {"tiny": part})

    def main(*arguments):
        reproduce.main(arguments)
        return capsys.readouterr().out

    def write(lines):
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))

    results = tmp_path / "results.jsonl"
    set_parts()
    monkeypatch.setattr(reproduce, "OUT", tmp_path / "out")
    monkeypatch.setattr(reproduce, "RESULTS", results)
    assert "2 of   2 runs to do" in main("--list")
    table = main()
    lines = read_lines(results)
    assert not any((tmp_path / "out").iterdir())
    ends = sorted(line["command"].rpartition(" ")[2] for line in lines)
    assert ends == ["--seed=1", "--seed=2"] and all("--n_ffn=8 " in x["command"] for x in lines)
    losses = [line["val_loss"] for line in lines]
    assert losses[0] != losses[1]
    assert f"{np.mean(losses):.3f} ± {np.std(losses, ddof=1) / np.sqrt(2):.3f}" in table

    before = results.read_bytes()
    assert "0 of   2 runs to do" in main("--list")
    assert main() == table and results.read_bytes() == before

    write([lines[0], lines[1] | {"machine": "another"}])
    assert "1 of   2 runs to do" in main("--list")
    assert "0 of   2 runs to do" in main("--list", "--any")
    write(lines[1:])
    assert "1 of   2 runs to do" in main("--list", "--any")
    results.write_bytes(before)
    monkeypatch.setitem(experiments.PRESETS["facts-dense"], "beta2", 0.9)  # not in the command
    set_parts()
    assert "2 of   2 runs to do" in main("--list", "--any")


@pytest.mark.slow
def test_ctrl_c_keeps_the_runs_at_work(facts, tmp_path):
    options = small_options(facts) | {"max_iters": 100, "eval_interval": 100}
    code = f"""
from pathlib import Path
from bench import reproduce
from bench.experiments import Part, training
reproduce.OUT = Path({str(tmp_path)!r}, "out")
reproduce.RESULTS = Path({str(tmp_path)!r}, "results.jsonl")
rows = {{"one": training("facts-dense", **{options!r})}}
reproduce.PARTS = {{"tiny": Part("cpu", "does it stop?", range(1, 4), rows)}}
try:
    reproduce.main(["--only=tiny"])
except KeyboardInterrupt as error:
    reproduce.fail(error)
"""
    process = start(sys.executable, "-c", code)
    wait_until(lambda: len([*tmp_path.glob("out/*/log.jsonl")]) == 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130 and "at work end first" in errors, errors
    lines = read_lines(tmp_path / "results.jsonl")
    assert sorted(line["command"][-1] for line in lines) == ["1", "2"]
    assert all(line["curve"][-1][0] == 100 for line in lines)  # to their end


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
    line = dict(recall=0.5, val_loss=1.0, tokens_per_s=1)
    results = {command: line for command in PARTS["capacity"].runs() if not command.endswith("3")}
    table = reproduce.table("capacity", results)
    row = next(row for row in table.splitlines() if row.startswith("| dense, 4,000 people |"))
    # 2,000 people of 54.236 bits, 0.32M parameters
    assert "50.0 ± 0.0 (50, 50)" in row and "108,471 (0.34)" in row


@pytest.mark.slow
def test_an_update_is_run_and_measured(facts, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "OUT", tmp_path / "out")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.jsonl")
    assert prepare("--new=3", "--out", tmp_path / "new").returncode == 0
    row = experiments.update("new", 16, max_iters=4, eval_interval=2, eval_iters=1)
    command = row.command.replace("out/facts-new", str(tmp_path / "new"))
    command = command.replace(experiments.base_folder("{seed}"), str(finished))
    reproduce.run(experiments.Experiment(command, row.options), 1, {"machine": "this"})
    (line,) = read_lines(tmp_path / "results.jsonl")
    assert [point[0] for point in line["curve"]] == [0, 2, 4]
    assert all(len(point) == 6 for point in line["curve"])  # recall and loss of new and old facts
    assert 16 * 32 * 4 < line["bytes"] < 16 * 32 * 4 + 4000  # rows of 32 float32, and their names
    assert line["settings"] == row.settings() and line["update_seconds"] >= 0
    assert "MB" in reproduce.update_row({1: line})


@pytest.mark.slow
def test_people_are_taught_one_after_another(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "OUT", tmp_path / "runs")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.jsonl")
    row = experiments.one_by_one(slots=0, max_iters=4, rehearse=1)
    assert row.is_one_by_one()
    command = row.command.replace(experiments.base_folder("{seed}"), str(finished))
    command = command.replace("--people=10", "--people=2")
    reproduce.run(experiments.Experiment(command, row.options), 1, {"machine": "this"})
    (line,) = read_lines(tmp_path / "results.jsonl")
    assert [point[0] for point in line["curve"]] == [0, 1, 2]
    assert line["bytes"] > 256 * 32 * 4 and "after 2 people, %" in str(
        reproduce.one_by_one_row({1: line})
    )

    # two updates by hand
    folders = []
    for number in range(2):
        args = facts_prepare.parse(["--people=9", "--new=2", f"--out={tmp_path}/{number}"])
        generator = np.random.default_rng(0)
        people = facts_prepare.choose_people(args, generator)
        facts_prepare.write(args, people[number : number + 1], generator)
        folders.append(tmp_path / f"update-{number}")
        words = ["--max_iters=4", "--rehearse=1", "--device=cpu", f"--init_from={finished}"]
        words += [f"--dataset={args.out}", f"--out_dir={folders[-1]}", f"--seed={3 + number}"]
        if number == 1:
            words.append(f"--delta={folders[0]}/delta.pt")
        update.main(words)
        _, _, loss, _, old_loss = line["curve"][number + 1]
        log = read_lines(folders[-1] / "log.jsonl")
        assert loss == pytest.approx(log[-1]["val_loss"], abs=1e-3)
        assert old_loss == pytest.approx(log[-1]["old_val_loss"], abs=1e-3)


def test_what_is_lost_after_the_first_person_and_after_the_last():
    points = [[0, 0.0, 2.0, 0.98, 0.60], [1, 1.0, 1.0, 0.97, 0.61], [2, 0.75, 1.0, 0.90, 0.65]]
    line = dict(curve=points, update_seconds=7.4, bytes=1_230_000)
    results = dict.fromkeys(PARTS["one by one"].runs(), line)
    title, _, row, *_ = reproduce.table("one by one", results).splitlines()[2:]
    cells = dict(zip(title.split(" | "), row.split(" | "), strict=True))
    assert cells["new facts known after one person, %"] == "100.0 ± 0.0 (100, 100, 100, 100, 100)"
    assert cells["new facts known after 2 people, %"] == "75.0 ± 0.0 (75, 75, 75, 75, 75)"
    assert cells["old ones lost after one person, points"] == "1.0 ± 0.0"
    assert cells["old ones lost after 2 people, points"] == "8.0 ± 0.0"
    assert cells["old text, nats worse"] == "0.050 ± 0.000"


@pytest.mark.parametrize("part", list(PARTS))
def test_rows_of_a_part_can_be_built_and_have_equal_flops(part):
    rows, seeds = PARTS[part].rows, PARTS[part].seeds
    assert len(PARTS[part].runs()) == len(rows) * len(seeds)
    assert PARTS[part].tier in ("cpu", "more", "gpu")
    if part in ("new people", "moved people", "one by one"):
        assert all(row.is_update() for row in rows.values())
        return
    sizes = {label: row.size() for label, row in rows.items() if "more FLOPs" not in label}
    flops = {
        label: size[1] * (0.5 if "twice" in label or "2x" in label else 1)
        for label, size in sizes.items()
    }
    assert max(flops.values()) / min(flops.values()) < 1.04, flops
    if part == "parts":
        assert max(sizes.values())[0] / min(sizes.values())[0] < 1.03, sizes


def test_differences_are_paired_by_seed():
    losses = {
        "Memory+": {1: 1.0, 2: 2.0},
        "dense": {1: 1.1, 2: 2.3, 3: 9.0},
        "mixture of experts": {},
    }
    results = {}
    for label, seeds in losses.items():
        for seed, loss in seeds.items():
            command = PARTS["text"].rows[label].command.format(seed=seed)
            results[command] = dict(val_loss=loss, tokens_per_s=1)
    rows = reproduce.table("text", results).splitlines()[4:]
    first, *_, experts, dense = rows
    assert dense.startswith("| dense | 0.200 ± 0.100 | 4.133 ± ")
    assert first.startswith("| Memory+ |  | 1.500 ± ") and "not measured" in experts


def test_a_table_by_rate_has_a_column_for_each_rate():
    results = {}
    for label, losses in {"dense, 0.004": [1.5], "Engram, 0.002": [1.25]}.items():
        for seed, loss in enumerate(losses, 1):
            command = PARTS["docs rates"].rows[label].command.format(seed=seed)
            results[command] = dict(val_loss=loss)
    for rate, recalls in {0.0025: [0.25], 0.004: [0.5, 0.75]}.items():
        for seed, recall in enumerate(recalls, 1):
            command = PARTS["rates"].rows[f"moe, {rate}"].command.format(seed=seed)
            results[command] = dict(val_loss=1.0, recall=recall)
    texts = reproduce.table("docs rates", results).splitlines()
    assert texts[2] == "|  | rate 0.002 | rate 0.004 | rate 0.006 |"
    assert "| dense |  | 1.500 |  |" in texts and "| Engram | 1.250 |  |  |" in texts
    facts = reproduce.table("rates", results).splitlines()
    assert "| moe | 25.0 (25) | 62.5 ± 12.5 (50, 75) |  |" in facts


def test_what_is_forgotten_at_the_same_recall_is_read_between_evaluations():
    curve = [
        [0, 0.0, 2.0, 0.5, 0.95, 0.6],
        [50, 0.8, 1.0, 0.5, 0.85, 0.7],
        [100, 1.0, 1.0, 0.5, 0.75, 0.8],
    ]
    assert reproduce.lost_at(curve, 0.9) == pytest.approx(0.15)
    assert reproduce.lost_at(curve[:2], 0.9) is None
    line = dict(curve=curve, update_seconds=7.4, bytes=1_230_000)
    runs = PARTS["new people"].runs()
    results = {command: line for command, (_, seed) in runs.items() if seed < 3}
    row = reproduce.table("new people", results).splitlines()[4]
    assert "| 100.0 ± 0.0 (100, 100) | 20.0 ± 0.0 | 15.0 ± 0.0 | 0.200 ± 0.000 | 7 | 1.23 |" in row


def test_updates_of_a_seed_are_of_the_model_of_that_seed():
    runs = PARTS["new people"].runs() | PARTS["moved people"].runs()
    commands = [command for command, (_, seed) in runs.items() if seed == 3]
    assert len(commands) == 20
    for command in commands:
        assert f"--init_from={experiments.base_folder(3)} " in command
        assert command.endswith(" --seed=3") and "mem_keys" not in command


def test_numbers_written_into_the_pictures_are_those_of_the_results():
    rows = PARTS["slots"].rows
    _, demo = rows["16,384 slots"].size()
    for slots, (options, parameters) in draw.SLOTS.items():
        size, flops = rows[f"{slots:,} slots"].size()
        assert parameters == f"{size:.2f}M" and flops == pytest.approx(demo, rel=0.01)
        assert f"--preset={options} " in rows[f"{slots:,} slots"].command
    options, words = draw.MORE_FLOPS
    _, flops = rows[f"36,864 slots, {words}"].size()
    assert words == f"{flops / demo - 1:.0%} more FLOPs"
    assert (
        rows[f"36,864 slots, {words}"].command
        == f"python train.py --preset={options} --seed={{seed}}"
    )
    picture = (draw.ASSETS / "updates.svg").read_text()
    for options, name in (("", "rates of training"), ("--learning_rate=0.0003", "AdamW 3e-4")):
        _, old = draw.update_curves()[options][-1]
        assert f"all weights, {name}: falls to {old:.0%}<" in picture


def test_bytes_that_a_token_reads_are_those_by_hand():
    rows = PARTS["n-grams"].rows
    wanted = {
        "Memory+": 3 * 4 * 16 * 64 * 4,  # layers, heads, slots, width, bytes
        "Engram": 2 * 2 * 8 * 4 * 4,  # layers, orders, heads, width, bytes
        "bigram hash": 4 * 64 * 4,
        "Memory+ and Engram": 3 * 4 * 16 * 64 * 4 + 2 * 2 * 8 * 4 * 4,
        "dense": 0,
    }
    assert {label: row.bytes_read() for label, row in rows.items()} == wanted


def test_rows_that_no_step_has_read_are_counted(facts, tmp_path):
    """Against the rows of the windows that were read. In the first step no row has a gradient: W_v is 0."""
    options = [*SMALL, "--mem_layers=", "--ngram_layers=0", "--ngram_rows=200", "--ngram_heads=2"]
    train_here(*options, f"--dataset={facts}", f"--out_dir={tmp_path}")
    config = GPT.from_checkpoint(tmp_path).config
    layer = GPT.from_checkpoint(tmp_path).blocks[0].ngram
    batches = open_dataset(facts, 32, 1)["train"]
    tokens = torch.from_numpy(batches.windows(range(2, 8))[:, :-1])  # steps 2 to 4, of two windows
    rows = layer.rows(make_ngrams(tokens, 3, config.separator, config.vocab_size))
    share = 1 - len(rows.unique()) / (211 + 223 + 227 + 229)
    assert 0 < share < 1
    assert reproduce.rows_never_read(tmp_path) == {"never_read": round(share, 4)}
