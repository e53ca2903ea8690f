"""bench/reproduce.py: real runs of small models; what is done is not repeated; the numbers of the table."""

import json
import sys

import numpy as np
import pytest

from bench import reproduce
from tests.helpers import SMALL


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
    assert len({line["command"] for line in lines}) == len(lines) == 4 and not any((tmp_path / "out").iterdir())
    bits = json.loads((facts / "meta.json").read_text())["bits"]
    for name, (preset, options) in rows.items():
        mine = [line for s in (1, 2) for line in lines if line["command"] == reproduce.command_of(preset, options, s)]
        losses = [line["val_loss"] for line in mine]
        assert losses[0] != losses[1]  # seeds differ
        error = np.std(losses, ddof=1) / np.sqrt(2)
        row = next(row for row in table.splitlines() if row.startswith(f"| {name} |"))
        assert f"{np.mean(losses):.3f} ± {error:.3f}" in row
        known = np.mean([line["recall"] for line in mine]) * bits
        assert f" {known:,.0f} (" in row
    before = reproduce.RESULTS.read_bytes()
    assert "0 of   4 runs to do" in main("--list")
    main()
    assert reproduce.RESULTS.read_bytes() == before

    other = [line | {"machine": "another"} if "n_ffn=16" in line["command"] else line for line in lines]
    reproduce.RESULTS.write_text("".join(json.dumps(line) + "\n" for line in other[:-1]))  # and one is lost
    lost = 0 if "n_ffn=16" in other[-1]["command"] else 1
    assert f"{2 + lost} of   4 runs to do" in main("--list")
    assert "1 of   4 runs to do" in main("--list", "--any")


@pytest.mark.parametrize("part", list(reproduce.PARTS))
def test_rows_of_a_part_can_be_built_and_have_equal_flops(part):
    tier, _, seeds, rows = reproduce.PARTS[part]
    sizes = {label: reproduce.size(*row) for label, row in rows.items()}
    flops = {label: size[1] * (0.5 if "twice" in label or "2x" in label else 1) for label, size in sizes.items()}
    assert max(flops.values()) / min(flops.values()) < 1.04, flops
    commands = [reproduce.command_of(*row, seed) for row in rows.values() for seed in seeds]
    assert len(set(commands)) == len(commands) and tier in ("cpu", "more", "gpu")
