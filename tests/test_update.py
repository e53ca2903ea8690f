"""Updates by rows, deltas, and what sample.py --inspect says: against counts by hand and float64."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
import train
from bench.slots import shared
from data import readers
from data.checkpoint import identity
from data.dataset import Dataset, make_encoding, open_dataset
from data.facts.prepare import MOVES, make_people
from kernels import lookup
from tests.helpers import (
    ROOT,
    SMALL,
    SYSTEMS,
    assert_refused,
    contents,
    handlers,
    prepare,
    refusal,
    run,
    wait_until,
)


def teach(base, data, out, *options):
    """Update a run in this process; returns the weights before and after."""
    arguments = [f"--init_from={base}", f"--dataset={data}", f"--out_dir={out}", *options]
    with handlers():
        train.main(["--max_iters=4", "--eval_interval=2", "--warmup_iters=1", *arguments])
    return (
        torch.load(Path(folder, "ckpt.pt"), weights_only=True)["model"] for folder in (base, out)
    )


def load_delta(out):
    return torch.load(Path(out, "delta.pt"), weights_only=True)


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "new"
    done = prepare("--new=5", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def taught(finished, new, tmp_path_factory):
    """A delta of 40 of 256 slots."""
    out = tmp_path_factory.mktemp("run") / "taught"
    [*teach(finished, new, out, "--update=memory", "--update_slots=40")]
    return out


# --- data -------------------------------------------------------------------------------------------------


def test_new_people_are_new_and_those_who_moved_are_known_and_have_moved(facts, new, tmp_path):
    assert prepare("--moved=4", "--out", tmp_path / "moved").returncode == 0
    known, unknown, moved = (
        Dataset(folder).questions() for folder in (facts, new, tmp_path / "moved")
    )
    names = [
        {q["prompt"].rsplit(" ", 3)[0] for q in questions} for questions in (known, unknown, moved)
    ]
    assert len(names[1]) == 5 and len(unknown) == 30 and not names[1] & names[0]
    assert len(names[2]) == 4 and names[2] < names[0] and len(moved) == 4 * len(MOVES)
    before = {q["prompt"]: q["answer"] for q in known}
    assert all(before[q["prompt"]] != q["answer"] and q["attribute"] in MOVES for q in moved)
    text = make_encoding(Dataset(facts).vocabulary()).decode(
        Dataset(tmp_path / "moved").tokens("train").tolist()
    )
    assert (
        all(text.count(f" {q['answer']}.") >= 20 for q in moved)
        and text.count(".\n") == 4 * len(MOVES) * 20
    )


def test_no_name_is_drawn_twice():
    people = make_people(50, np.random.default_rng(0))
    others = make_people(
        50, np.random.default_rng(0), people
    )  # the same draws: all of them are taken
    assert len(others) == 50 and not {name for name, *_ in people} & {name for name, *_ in others}


# --- choosing slots ---------------------------------------------------------------------------------------


def test_tf_idf_is_what_one_counts_by_hand():
    c = torch.tensor([6.0, 3.0, 0.0, 1.0])
    background = [torch.tensor(reads) for reads in ([9.0, 0, 1, 0], [1.0, 0, 0, 0], [2.0, 1, 0, 0])]
    expected = [0.6 * math.log(4 / 4), 0.3 * math.log(4 / 2), 0.0, 0.1 * math.log(4 / 1)]
    torch.testing.assert_close(train.score_slots(c, iter(background)), torch.tensor(expected))


@pytest.mark.parametrize("by", ["reads", "gradient"])
def test_the_slots_with_the_best_scores_are_chosen(finished, facts, new, by):
    """An independent count: one window after another, reads in a Counter, the gradient by autograd."""
    model = train.load_checkpoint(finished / "ckpt.pt")["model"]
    windows = [open_dataset(folder, 32, 0)["train"] for folder in (new, facts)]
    config = SimpleNamespace(update_by=by, update_slots=9, batch_size=2, dtype="float32")
    got = train.choose_slots(model, *windows, config, torch.device("cpu"))

    def retrieved(ids):
        seen = []
        hook = model.blocks[1].ffn.register_forward_pre_hook(
            lambda layer, x: seen.append(layer.retrieve(x[0].flatten(0, 1))[0])
        )
        loss = model(torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:]))[1]
        hook.remove()
        return loss, Counter(seen[0].flatten().tolist())

    c, containing = torch.zeros(256, dtype=torch.float64), Counter()
    total = torch.zeros_like(model.pool.values, dtype=torch.float64)
    model.pool.lookup = partial(lookup, model.pool.values)  # autograd's own gradient
    for i in range(0, len(windows[0]) // 2 * 2, 2):
        loss, counts = retrieved(windows[0](range(i, i + 2)))
        total += torch.autograd.grad(loss, model.pool.values)[0].to_dense()
        for slot, count in counts.items():
            c[slot] += count if by == "reads" else 0
    c = c if by == "reads" else total.norm(dim=1)
    for i in range(1000):
        containing.update(retrieved(windows[1]([i]))[1].keys())
    scores = torch.tensor(
        [c[s] / c.sum() * math.log(1001 / (1 + containing[s])) for s in range(256)]
    )
    assert len(set(got.tolist())) == 9 and scores[got].min() >= scores.topk(9).values.min() * (
        1 - 1e-5
    )


# --- what an update changes -------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["memory", "peer", "ultramem"])
def test_only_the_chosen_rows_change_and_the_delta_is_them(system, facts, new, tmp_path, finished):
    base, S = tmp_path / "base", 256
    if system == "memory":
        base = finished
    else:
        with handlers():
            train.main([*SMALL, f"--dataset={facts}", f"--out_dir={base}", *SYSTEMS[system]])
    files = contents(base)
    before, after = teach(base, new, tmp_path / "new", "--update=memory", "--update_slots=40")
    assert contents(base) == files
    assert all(torch.equal(before[name], after[name]) for name in before if name != "pool.values")
    changed = (before["pool.values"] != after["pool.values"]).any(dim=1).nonzero().flatten()
    delta, tables = load_delta(tmp_path / "new"), 1 if system == "memory" else 2
    assert len(delta["rows"]) == 40 * tables and len((delta["rows"] % S).unique()) == 40
    assert len(changed) > 20 and set(changed.tolist()) <= set(delta["rows"].tolist())
    assert torch.equal(after["pool.values"][delta["rows"]], delta["values"])
    model = train.load_checkpoint(base / "ckpt.pt")["model"]
    sample.apply_deltas(model, base / "ckpt.pt", [tmp_path / "new" / "delta.pt"])
    assert all(torch.equal(after[name], x) for name, x in model.state_dict().items())


def test_all_rows_or_all_weights_can_change_and_the_log_tells_of_old_and_new(
    finished, facts, new, tmp_path
):
    before, after = teach(
        finished,
        new,
        tmp_path / "rows",
        "--update=memory",
        "--mem_sgd=0",
        "--mem_learning_rate=0.1",
    )
    assert all(torch.equal(before[name], after[name]) for name in before if name != "pool.values")
    assert (before["pool.values"] != after["pool.values"]).any(dim=1).sum() > 100
    assert len(load_delta(tmp_path / "rows")["rows"]) == 256
    before, after = teach(finished, new, tmp_path / "all")
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "all" / "delta.pt").exists()
    for name in ("rows", "all"):
        first, *_, last = [
            json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        assert first["iter"] == 0 and last["iter"] == 4 and last["val_loss"] < first["val_loss"]
        assert {"recall", "old_recall", "old_val_loss"} <= first.keys() & last.keys()
    data, model = open_dataset(facts, 32, 0), train.load_checkpoint(finished / "ckpt.pt")["model"]
    with torch.no_grad():
        ids = torch.from_numpy(data["val_eval"](range(2)))
        assert model(ids[:, :-1], ids[:, 1:])[1].item() == pytest.approx(
            first["old_val_loss"], rel=1e-5
        )


def test_a_model_without_a_memory_has_no_values_for_sgd(facts, tmp_path):
    done = run(
        "train.py",
        *SMALL,
        "--system=moe",
        "--mem_sgd=1",
        f"--dataset={facts}",
        f"--out_dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr


def test_sgd_moves_a_value_by_the_gradient_of_the_sum_over_tokens(finished, new, tmp_path):
    options = "--update=memory", "--mem_sgd=0.5", "--max_iters=1", "--seed=7"
    before, after = teach(finished, new, tmp_path / "out", *options)
    model, windows = (
        train.load_checkpoint(finished / "ckpt.pt")["model"],
        open_dataset(new, 32, 7)["train"],
    )
    model.pool.lookup = partial(lookup, model.pool.values)  # autograd's own gradient
    ids = torch.from_numpy(windows(range(2)))
    loss = model(ids[:, :-1], ids[:, 1:])[1] * 64
    gradient = torch.autograd.grad(loss, model.pool.values)[0].to_dense()
    torch.testing.assert_close(
        after["pool.values"], before["pool.values"] - 0.5 * gradient, rtol=1e-4, atol=1e-6
    )


def test_an_update_that_was_stopped_goes_on_to_the_same_bits(finished, new, taught, tmp_path):
    options = "--update=memory", "--update_slots=40", "--max_iters=2"
    [*teach(finished, new, tmp_path, *options)]
    with handlers():
        train.main(["--resume", f"--out_dir={tmp_path}", "--max_iters=4"])
    one, other = load_delta(taught), load_delta(tmp_path)
    assert (
        all(torch.equal(one[name], other[name]) for name in ("rows", "values"))
        and one["base"] == other["base"]
    )


def test_facts_that_have_changed_are_not_asked_as_old_ones(finished, tmp_path, facts):
    assert prepare("--moved=4", "--out", tmp_path / "moved").returncode == 0
    model, data = (
        train.load_checkpoint(finished / "ckpt.pt")["model"],
        open_dataset(tmp_path / "moved", 32, 0),
    )
    config = SimpleNamespace(background=str(facts), dataset="", update="all", init_from="", seed=0)
    train.prepare_update(
        model,
        data,
        config,
        {},
        torch.device("cpu"),
        {"vocabulary": data["vocabulary"], "train_config": {"dataset": ""}},
    )
    old, new = ({q["prompt"] for q in part["questions"]} for part in (data["old"], data))
    assert len(old) == 9 * 6 - 8 and len(new) == 8 and not old & new


# --- deltas -----------------------------------------------------------------------------------------------


def test_deltas_stack_in_order_and_leaving_them_out_is_the_old_model(
    finished, new, taught, tmp_path, capsys
):
    [
        *teach(
            finished,
            new,
            tmp_path / "second",
            "--update=memory",
            "--update_slots=100",
            "--mem_sgd=300",
        )
    ]
    [
        *teach(
            taught,
            new,
            tmp_path / "third",
            "--update=memory",
            "--update_slots=40",
            f"--background={new}",
        )
    ]
    path, files = (
        finished / "ckpt.pt",
        [folder / "delta.pt" for folder in (taught, tmp_path / "second", tmp_path / "third")],
    )
    first, second, _ = map(torch.load, files)
    assert len(np.intersect1d(first["rows"], second["rows"])) > 5

    def table(*deltas):
        model = train.load_checkpoint(path)["model"]
        sample.apply_deltas(model, path, deltas)
        return model.pool.values.detach()

    for order in ((first, second), (second, first)):
        expected = torch.load(path, weights_only=True)["model"]["pool.values"].clone()
        for delta in order:
            for row, value in zip(delta["rows"].tolist(), delta["values"], strict=True):
                expected[row] = value
        assert torch.equal(table(*(files[0 if delta is first else 1] for delta in order)), expected)
    chained = train.load_checkpoint(tmp_path / "third" / "ckpt.pt")["model"].pool.values
    assert torch.equal(table(files[0], files[2]), chained)  # it was made of what the first has left
    for wrong in ([files[2]], [files[1], files[2]], [files[2], files[0]]):
        with pytest.raises(
            ValueError,
            match=r"delta\.pt belongs to .*taught/ckpt\.pt \(.{16}\), not to .*/out/ckpt\.pt \(",
        ):
            table(*wrong)

    def text(*options):
        capsys.readouterr()
        arguments = [
            f"--out_dir={finished}",
            "--num_samples=1",
            "--max_new_tokens=30",
            "--temperature=0",
            "--start=B",
            *options,
        ]
        sample.main(arguments)
        return capsys.readouterr().out

    plain = text()
    assert text(f"--delta={files[1]}") != plain == text()


def wrong_deltas(good, folder):
    """(name, contents, words of the message)"""
    whole = torch.load(good, weights_only=True)

    def with_rows(rows, values=None):
        parts = {"rows": rows, "values": whole["values"] if values is None else values}
        return whole | parts | {"hash": identity(parts)}

    yield "truncated", good.read_bytes()[:-1000], ["damaged"]
    flipped = bytearray(good.read_bytes())
    place = flipped.find(whole["values"][20].numpy().tobytes())
    flipped[place] ^= 1
    yield "one bit", bytes(flipped), ["damaged", "not those that were saved"]
    yield "code", pickle.dumps(train.load_checkpoint), ["not a delta"]
    yield "a checkpoint", torch.load(good.parent / "ckpt.pt", weights_only=True), ["not a delta"]
    yield "beyond", with_rows(whole["rows"] + 250), ["damaged", "of a table of 256"]
    yield "negative", with_rows(whole["rows"] - 256), ["damaged", "of a table of 256"]
    yield "wide", with_rows(whole["rows"], whole["values"].repeat(1, 2)), ["damaged"]
    yield "half", with_rows(whole["rows"], whole["values"][:7]), ["damaged"]
    yield (
        "without rows",
        {name: x for name, x in whole.items() if name != "rows"},
        ["damaged", "rows"],
    )


def test_a_delta_that_is_none_is_refused_and_the_message_names_it(
    taught, finished, tmp_path, capsys
):
    for name, data, words in wrong_deltas(taught / "delta.pt", tmp_path):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data) if isinstance(data, bytes) else torch.save(data, path)
        said = refusal(sample.main, [f"--out_dir={finished}", f"--delta={path}"], capsys)
        assert all(word in said for word in (str(path), *words)), said
    said = refusal(sample.main, [f"--out_dir={finished}", f"--delta={tmp_path}/none.pt"], capsys)
    assert "no delta" in said and "none.pt" in said
    said = refusal(sample.main, [f"--out_dir={taught}", f"--delta={taught}/delta.pt"], capsys)
    names = [
        f"{folder}/ckpt.pt ({identity(torch.load(folder / 'ckpt.pt')['model'])})"
        for folder in (finished, taught)
    ]
    assert f"belongs to {names[0]}, not to {names[1]}" in said


def test_a_kill_while_a_delta_is_written_leaves_none_or_a_whole_one(taught, tmp_path):
    program, path, states = tmp_path / "writer.py", tmp_path / "delta.pt", set()
    program.write_text(
        f"import sys, pathlib, torch; sys.path.insert(0, {str(ROOT)!r})\n"
        "from data.checkpoint import save_delta\n"
        "values, rows = torch.ones(100_000, 64), torch.arange(100_000)\n"
        f"while True:\n    save_delta(pathlib.Path({str(path)!r}), values, rows, 'base', 'name')\n    values += 1\n"
    )
    for first in (True, True, False, False):
        if first:
            path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, program])
        temporary = Path(f"{path}.{process.pid}.tmp")
        wait_until(lambda first=first: first or path.exists(), process)
        wait_until(lambda t=temporary: t.exists() and t.stat().st_size > 1_000_000, process)
        process.kill()
        process.wait()
        states.add((path.exists(), temporary.exists()))
        if path.exists():
            delta = torch.load(path, weights_only=True)
            parts = {name: delta[name] for name in ("rows", "values")}
            assert delta["hash"] == identity(parts) and len(parts["values"].unique()) == 1
    assert (False, True) in states or (True, True) in states, (
        states
    )  # a kill came while it was writing


@pytest.mark.parametrize(
    "options, words",
    [
        (["--update_slots=4"], ["update_slots=", "update=memory"]),
        (["--update=memory", "--update_slots=257"], ["update_slots=257", "256"]),
        (
            ["--update=memory", "--update_slots=4", "--background="],
            ["update_slots=", "background="],
        ),
        (["--update=memory", "--preset=facts-memory"], ["preset"]),
        (["--update=memory", "--mem_keys=32"], ["mem_keys=32", "keeps mem_keys=16"]),
        (["--update=memory", "--background=nowhere"], ["nowhere"]),
        (["--init_from=nowhere"], ["no checkpoint", "nowhere", "init_from="]),
        (["--init_from=", "--update=memory"], ["no checkpoint", "init_from="]),
        (["--out_dir={finished}", "--overwrite"], ["out_dir=", "the same folder"]),
    ],
)
def test_an_update_that_cannot_be_is_refused(options, words, finished, new, tmp_path, capsys):
    options = [option.format(finished=finished) for option in options]
    arguments = [
        f"--init_from={finished}",
        f"--dataset={new}",
        f"--out_dir={tmp_path / 'out'}",
        *options,
    ]
    said = refusal(train.main, arguments, capsys)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_other_models_and_vocabularies_are_refused(finished, facts, new, tmp_path, capsys):
    with handlers():
        train.main(
            [
                *SMALL,
                f"--dataset={facts}",
                f"--out_dir={tmp_path / 'dense'}",
                "--mem_layers=",
                "--mem_count=0",
                "--max_iters=1",
            ]
        )
    arguments = [
        f"--init_from={tmp_path / 'dense'}",
        f"--dataset={new}",
        f"--out_dir={tmp_path / 'out'}",
        "--update=memory",
    ]
    assert "has 0" in refusal(train.main, arguments, capsys)
    said = refusal(sample.main, [f"--out_dir={tmp_path / 'dense'}", "--inspect"], capsys)
    assert "has no memory" in said
    shutil.copytree(new, tmp_path / "other")
    vocabulary = json.loads((new / "vocab.json").read_text())
    vocabulary["tokens"][-3:-1] = vocabulary["tokens"][-2], vocabulary["tokens"][-3]
    (tmp_path / "other" / "vocab.json").write_text(json.dumps(vocabulary))
    arguments = [
        f"--init_from={finished}",
        f"--dataset={tmp_path / 'other'}",
        f"--out_dir={tmp_path / 'out'}",
    ]
    said = refusal(train.main, arguments, capsys)
    assert "another vocabulary" in said and str(tmp_path / "other") in said
    said = refusal(
        sample.main,
        [f"--out_dir={finished}", "--recall", f"--dataset={tmp_path / 'other'}"],
        capsys,
    )
    assert "vocabulary" in said and str(tmp_path / "other") in said
    assert "--json" in refusal(sample.main, [f"--out_dir={finished}", "--json"], capsys)
    assert "--dataset=" in refusal(
        sample.main, [f"--out_dir={finished}", f"--dataset={new}"], capsys
    )
    done = run("bench/slots.py", f"--out_dir={tmp_path / 'dense'}")
    assert_refused(done, "slots.py: ", "dense", "needs a model with a memory")
    assert "--delta=" in refusal(sample.main, [f"--out_dir={finished}", "--delta=a.pt,"], capsys)
    assert "init_from=" in refusal(
        train.main, [*SMALL, f"--dataset={facts}", "--update=memory"], capsys
    )
    assert "init_from=" in refusal(
        train.main, [*SMALL, f"--dataset={facts}", f"--background={new}"], capsys
    )


def test_a_delta_in_a_folder_and_an_old_dataset_that_is_another_are_not_passed_over(
    finished, facts, new, tmp_path, capsys
):
    (tmp_path / "delta.pt").write_bytes(b"somebody's")
    arguments = [f"--init_from={finished}", f"--dataset={new}", f"--out_dir={tmp_path}"]
    assert (
        "delta.pt" not in refusal(train.main, arguments, capsys)
        and (tmp_path / "delta.pt").read_bytes() == b"somebody's"
    )
    before = (facts / "train.bin").read_bytes()
    try:
        (facts / "train.bin").write_bytes(before[: len(before) // 4 * 2])
        said = refusal(
            train.main,
            [f"--init_from={finished}", f"--dataset={new}", f"--out_dir={tmp_path / 'x'}"],
            capsys,
        )
        assert "background=" in said and "was trained on" in said
    finally:
        (facts / "train.bin").write_bytes(before)


# --- inspect ----------------------------------------------------------------------------------------------


def float64_reads(model, ids):
    """{block: [{slot: share of the weights} of each token]}, all N * N sums, in float64."""
    model, found = model.double(), {}

    def see(layer, x, i):
        q = layer.query(x[0].flatten(0, 1)).view(-1, 2, layer.H, layer.Q)
        normalize = lambda v, w: v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
        q, keys = (
            normalize(q, layer.query_norm.weight),
            normalize(layer.keys, layer.key_norm.weight),
        )
        found[i] = [Counter() for _ in q]
        for token in range(len(q)):
            for head in range(layer.H):
                s1, s2 = keys[head] @ q[token, 0, head], keys[layer.H + head] @ q[token, 1, head]
                sums = (s1[:, None] + s2[None, :]).flatten() / math.sqrt(layer.Q)
                best, slots = sums.topk(layer.K)
                for slot, share in zip(
                    slots.tolist(), (best.softmax(0) / layer.H).tolist(), strict=True
                ):
                    found[i][token][slot] += share

    hooks = [
        model.blocks[i].ffn.register_forward_pre_hook(lambda layer, x, i=i: see(layer, x, i))
        for i in model.config.mem_layers
    ]
    with torch.no_grad():
        model(torch.tensor(ids).view(1, -1) if isinstance(ids, list) else ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(scope="module")
def two_layers(facts, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "two"
    with handlers():
        train.main([*SMALL, f"--dataset={facts}", f"--out_dir={out}", "--mem_layers=0,1"])
    return out


def test_inspect_shows_the_slots_and_weights_that_were_read(two_layers, capsys):
    sample.main(
        [
            f"--out_dir={two_layers}",
            "--inspect",
            "--json",
            "--start=B was born in",
            "--max_new_tokens=5",
        ]
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    checkpoint = train.load_checkpoint(two_layers / "ckpt.pt")
    encoding, model = make_encoding(checkpoint["vocabulary"]), checkpoint["model"]
    ids = [checkpoint["separator"], *encoding.encode("B was born in")]
    assert len(lines) == 5
    for line in lines:
        expected = float64_reads(model, ids)
        for block in (0, 1):
            got = {read["slot"]: read["share"] for read in line["reads"] if read["block"] == block}
            assert got.keys() == expected[block][-1].keys()
            assert all(
                got[slot] == pytest.approx(share, rel=1e-3)
                for slot, share in expected[block][-1].items()
            )
            shares = [*got.values()]
            assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(
                1, abs=1e-5
            )
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        assert encoding.decode(ids[-1:]) == line["token"]


def test_the_readers_of_a_slot_are_those_with_the_largest_weights(two_layers, facts):
    """All of a small dataset, counted one token after another."""
    checkpoint = train.load_checkpoint(two_layers / "ckpt.pt")
    model, dataset, best = checkpoint["model"], Dataset(facts), {}
    windows = open_dataset(facts, 32, 0)["train_eval"]
    got = readers.Readers(256)
    encoding = make_encoding(dataset.vocabulary())
    end = encoding.encode(".\n")[0]
    ends = np.isin(np.arange(encoding.n_vocab), [end, encoding.encode("\n")[0], dataset.separator])
    readers.find_readers(got, model, windows, ends, torch.no_grad())
    for number in range(len(windows)):
        begin, ids = windows.start(number), windows([number])[0]
        for reads in float64_reads(model, torch.from_numpy(ids[None, :-1])).values():
            for t, shares in enumerate(reads):
                words = ids[max(0, t - readers.WORDS + 1) : t + 1].tolist()
                while any(ends[word] for word in words[:-1]):
                    words = words[1:]
                for slot in shares:
                    best.setdefault(slot, {}).setdefault(tuple(words), []).append(begin + t)
    tokens = dataset.tokens("train")
    for slot in range(256):
        mine = [p for p in got.positions[slot].tolist() if p >= 0]
        assert len(mine) == min(readers.READERS, len(best.get(slot, ()))), slot
        assert all(any(p in places for places in best[slot].values()) for p in mine)
        assert (np.diff(got.weights[slot]) <= 0).all()
    # The weight of the first reader is the largest that any token gives to the slot, in one of its heads.
    largest = np.zeros(256)
    for number in range(len(windows)):
        ids, seen = torch.from_numpy(windows([number])[:, :-1]), readers.Reads(model.config)
        model.pool.usage = seen
        with torch.no_grad():
            model(ids)
        model.pool.usage = None
        for slots, weights in seen.take():
            np.maximum.at(largest, slots, weights)
    np.testing.assert_allclose(got.weights[:, 0], largest, rtol=1e-4)
    assert len(tokens) > got.positions.max() + 1


def test_readers_are_kept_and_made_anew_for_other_weights_or_data(two_layers, facts, new, tmp_path):
    out, data = tmp_path / "out", Dataset(facts)
    shutil.copytree(two_layers, out)
    (out / "readers.pt").unlink(missing_ok=True)
    made = []

    def open_readers(dataset=data):
        model = train.load_checkpoint(out / "ckpt.pt")["model"]
        readers.open_readers(out / "ckpt.pt", model, dataset, torch.no_grad())
        made.append((out / "readers.pt").stat().st_mtime_ns)
        return made[-1] != (made[-2] if len(made) > 1 else 0)

    assert open_readers() and not open_readers()
    [*teach(two_layers, new, tmp_path / "other")]
    shutil.copy(tmp_path / "other" / "ckpt.pt", out)
    assert open_readers() and not open_readers() and open_readers(Dataset(new))
    (out / "readers.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"readers\.pt is damaged"):
        open_readers()


def test_readers_that_cannot_be_kept_are_shown_all_the_same(two_layers, tmp_path, capsys):
    shutil.copytree(two_layers, tmp_path / "out", ignore=shutil.ignore_patterns("readers.pt"))
    (
        tmp_path / "out" / f"readers.pt.{os.getpid()}.tmp"
    ).mkdir()  # in the way: nobody can write there, not even root
    sample.main([f"--out_dir={tmp_path / 'out'}", "--inspect", "--start=B", "--max_new_tokens=1"])
    shown = capsys.readouterr()
    assert (
        "slot " in shown.out
        and "readers.pt" in shown.err
        and not (tmp_path / "out" / "readers.pt").exists()
    )


def test_inspect_on_a_terminal(finished, facts):
    done = run(
        "sample.py",
        f"--out_dir={finished}",
        "--inspect",
        "--start=Once",
        "--max_new_tokens=2",
        "--device=cpu",
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("block 1, slot ") == 6 and done.stdout.count("% of weights, read by") == 6
    )
    text = make_encoding(Dataset(facts).vocabulary()).decode(
        Dataset(facts).tokens("train").tolist()
    )
    shown = [line.strip() for line in done.stdout.splitlines() if line.startswith("      ")]
    assert len(shown) > 6 and all(
        line.replace(" →", "") in text for line in shown if "\n" not in line
    )


def test_who_shares_the_slot_that_a_fact_reads_most_is_what_one_counts_by_hand():
    facts = [("Ann", "city"), ("Ann", "firm"), ("Bob", "city")]
    first, mass = shared(facts, [{1: 0.6, 2: 0.4}, {1: 0.3, 3: 0.7}, {1: 0.5, 4: 0.4}])
    assert first == {
        "attribute": 2,
        "nobody": 1,
    }  # Bob's city for Ann's, Ann's for Bob's; slot 3 is her firm's
    assert mass == pytest.approx(
        {"person": 0.3 / 0.8, "attribute": 0.5 / 0.8 + 0.6 / 0.9, "neither": 0.3 / 0.9}
    )
