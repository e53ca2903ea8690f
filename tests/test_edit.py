"""Updates by rows, deltas, and who reads a slot: against counts by hand and float64."""

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
from data.dataset import Dataset, make_encoding, open_dataset
from data.facts.prepare import MOVES, make_people
from edit import inspect_slots, readers, update
from edit.delta import apply_deltas, weights_hash
from helpers import (
    ROOT,
    SMALL,
    SYSTEMS,
    contents,
    load,
    log_of,
    prepare,
    refusal,
    train_here,
    wait_until,
)
from kernels import lookup
from model import GPT
from runtime.checkpoint import read_checkpoint


def update_arguments(base, data, out, *options):
    folders = [f"--init_from={base}", f"--dataset={data}", f"--out_dir={out}"]
    small = [
        "--max_iters=4",
        "--eval_interval=2",
        "--eval_iters=1",
        "--batch_size=2",
        "--device=cpu",
    ]
    return [*folders, *small, *options]


def teach(base, data, out, *options):
    """Update a run in this process; returns the delta."""
    update.main(update_arguments(base, data, out, *options))
    return load(out / "delta.pt")


def model_of(folder):
    return GPT.from_checkpoint(folder / "ckpt.pt")


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
    teach(finished, new, out, "--slots=40")
    return out


# --- new facts ----------------------------------------------------------------------------


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


# --- choosing slots -----------------------------------------------------------------------


def test_tf_idf_is_what_one_counts_by_hand():
    c = torch.tensor([6.0, 3.0, 0.0, 1.0])
    background = [torch.tensor(reads) for reads in ([9.0, 0, 1, 0], [1.0, 0, 0, 0], [2.0, 1, 0, 0])]
    expected = [0.6 * math.log(4 / 4), 0.3 * math.log(4 / 2), 0.0, 0.1 * math.log(4 / 1)]
    torch.testing.assert_close(update.score_slots(c, iter(background)), torch.tensor(expected))


@pytest.mark.parametrize("by", ["reads", "gradient"])
def test_the_slots_with_the_best_scores_are_chosen(finished, facts, new, by, monkeypatch):
    """An independent count: one window after another, reads in a Counter, the gradient by autograd."""
    monkeypatch.setattr(update, "BACKGROUND_WINDOWS", 100)
    model = model_of(finished)
    model.pool.collect_gradients()
    windows = [open_dataset(folder, 32, 0)["train"] for folder in (new, facts)]
    config = SimpleNamespace(choose_by=by, slots=9, batch_size=2, dtype="float32")
    data = {"train": windows[0], "old": {"train": windows[1]}}
    run = SimpleNamespace(model=model, config=config, data=data, device=torch.device("cpu"))
    got = update.choose_slots(run)

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
        loss, counts = retrieved(windows[0].windows(range(i, i + 2)))
        total += torch.autograd.grad(loss, model.pool.values)[0].to_dense()
        for slot, count in counts.items():
            c[slot] += count if by == "reads" else 0
    c = c if by == "reads" else total.norm(dim=1)
    for i in range(100):
        containing.update(retrieved(windows[1].windows([i]))[1].keys())
    scores = torch.tensor(
        [c[s] / c.sum() * math.log(101 / (1 + containing[s])) for s in range(256)]
    )
    assert len(set(got.tolist())) == 9
    assert scores[got].min() >= scores.topk(9).values.min() * (1 - 1e-5)


# --- what an update changes ---------------------------------------------------------------


@pytest.mark.parametrize("system", ["memory", "peer", "ultramem"])
def test_only_the_chosen_rows_change_and_the_delta_is_them(system, facts, new, tmp_path, finished):
    """At its end the update's own model has the loss of the old one with the delta: nothing else has changed."""
    base = finished
    if system != "memory":
        base = tmp_path / "base"
        train_here(*SMALL, f"--dataset={facts}", f"--out_dir={base}", *SYSTEMS[system])
    files = contents(base)
    delta = teach(base, new, tmp_path / "new", "--slots=40")
    assert contents(base) == files
    tables = 1 if system == "memory" else 2
    assert len(delta["rows"]) == 40 * tables and len((delta["rows"] % 256).unique()) == 40
    model = model_of(base)
    before = model.pool.values.detach().clone()
    apply_deltas(model, base / "ckpt.pt", [tmp_path / "new" / "delta.pt"])
    changed = (before != model.pool.values).any(dim=1).nonzero().flatten()
    assert len(changed) > 20 and set(changed.tolist()) <= set(delta["rows"].tolist())
    config = SimpleNamespace(eval_iters=1, batch_size=2)
    loss = train.mean_loss(model, open_dataset(new, 32, 1)["val_eval"], config, torch.device("cpu"))
    assert log_of(tmp_path / "new")[-1]["val_loss"] == pytest.approx(loss, abs=1e-6)


def test_all_rows_can_change_and_the_log_tells_of_old_and_new(
    finished, facts, new, tmp_path, capsys
):
    delta = teach(finished, new, tmp_path, "--optimizer=rowadam", "--learning_rate=0.1")
    assert delta["rows"].tolist() == list(range(256))
    before = load(finished / "ckpt.pt")["model"]["pool.values"]
    assert (before != delta["values"]).any(dim=1).sum() > 100
    first, *_, last = log_of(tmp_path)
    assert first["iter"] == 0 and last["iter"] == 4 and last["val_loss"] < first["val_loss"]
    assert {"recall", "old_recall", "old_val_loss"} <= first.keys() & last.keys()
    assert first["old_val_loss"] == pytest.approx(log_of(finished)[-1]["val_loss"], rel=1e-5)
    said = capsys.readouterr().out
    assert "256 of 256 rows" in said and "old recall" in said
    assert f"sample.py --out_dir={finished} --delta={tmp_path}/delta.pt" in said


def test_sgd_moves_a_value_by_the_gradient_of_the_sum_over_tokens(finished, new, tmp_path):
    delta = teach(finished, new, tmp_path, "--learning_rate=0.5", "--max_iters=1", "--seed=7")
    model, windows = model_of(finished), open_dataset(new, 32, 7)["train"]
    before = model.pool.values.detach().clone()
    model.pool.lookup = partial(lookup, model.pool.values)  # autograd's own gradient
    ids = torch.from_numpy(windows.windows(range(2)))
    loss = model(ids[:, :-1], ids[:, 1:])[1] * 64
    gradient = torch.autograd.grad(loss, model.pool.values)[0].to_dense()
    torch.testing.assert_close(delta["values"], before - 0.5 * gradient, rtol=1e-4, atol=1e-6)


def test_facts_that_have_changed_are_not_asked_as_old_ones(finished, tmp_path, facts):
    assert prepare("--moved=4", "--out", tmp_path / "moved").returncode == 0
    config = SimpleNamespace(background=str(facts), dataset="", init_from=str(finished), seed=0)
    data = open_dataset(tmp_path / "moved", 32, 0)
    run = SimpleNamespace(config=config, model=model_of(finished), data=data)
    train.add_background(run)
    old, new = ({q["prompt"] for q in part["questions"]} for part in (data["old"], data))
    assert len(old) == 9 * 6 - 8 and len(new) == 8 and not old & new


# --- deltas -------------------------------------------------------------------------------


def test_deltas_stack_in_order_and_leaving_them_out_is_the_old_model(
    finished, new, taught, tmp_path, capsys
):
    teach(finished, new, tmp_path / "second", "--slots=100", "--learning_rate=300")
    path = finished / "ckpt.pt"
    files = [folder / "delta.pt" for folder in (taught, tmp_path / "second", tmp_path / "third")]
    first, second = map(load, files[:2])
    assert len(np.intersect1d(first["rows"], second["rows"])) > 5

    def table(*deltas):
        model = GPT.from_checkpoint(path)
        apply_deltas(model, path, deltas)
        return model.pool.values.detach()

    for order in ((first, second), (second, first)):
        expected = load(path)["model"]["pool.values"].clone()
        for delta in order:
            for row, value in zip(delta["rows"].tolist(), delta["values"], strict=True):
                expected[row] = value
        assert torch.equal(table(*(files[0 if delta is first else 1] for delta in order)), expected)

    # a third one, of what the first has left
    (tmp_path / "chained").mkdir()
    checkpoint = load(path)
    checkpoint["model"]["pool.values"] = table(files[0])
    torch.save(checkpoint, tmp_path / "chained" / "ckpt.pt")
    third = teach(tmp_path / "chained", new, tmp_path / "third", "--slots=40")
    assert torch.equal(table(files[0], files[2])[third["rows"]], third["values"])
    message = r"delta\.pt belongs to .*chained/ckpt\.pt \(.{16}\), not to .*/out/ckpt\.pt \("
    for wrong in ([files[2]], [files[1], files[2]], [files[2], files[0]]):
        with pytest.raises(ValueError, match=message):
            table(*wrong)

    def text(*options):
        capsys.readouterr()
        greedy = ["--num_samples=1", "--max_new_tokens=30", "--temperature=0", "--start=B"]
        sample.main([f"--out_dir={finished}", *greedy, *options])
        return capsys.readouterr().out

    plain = text()
    assert text(f"--delta={files[1]}") != plain == text()


def wrong_deltas(good, folder):
    """(name, contents, words of the message)"""
    whole = load(good)

    def with_rows(rows, values=None):
        parts = {"rows": rows, "values": whole["values"] if values is None else values}
        return whole | parts | {"hash": weights_hash(parts)}

    yield "truncated", good.read_bytes()[:-1000], ["damaged"]
    flipped = bytearray(good.read_bytes())
    place = flipped.find(whole["values"][20].numpy().tobytes())
    flipped[place] ^= 1
    yield "one bit", bytes(flipped), ["damaged", "not those that were saved"]
    yield "code", pickle.dumps(wait_until), ["not a delta"]
    yield "a checkpoint", load(good.parent.parent / "checkpoint.pt"), ["not a delta"]
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
    shutil.copy(finished / "ckpt.pt", taught.parent / "checkpoint.pt")
    for name, data, words in wrong_deltas(taught / "delta.pt", tmp_path):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data) if isinstance(data, bytes) else torch.save(data, path)
        said = refusal(sample.main, [f"--out_dir={finished}", f"--delta={path}"], capsys)
        assert all(word in said for word in (str(path), *words)), said
    said = refusal(sample.main, [f"--out_dir={finished}", f"--delta={tmp_path}/none.pt"], capsys)
    assert "no delta" in said and "none.pt" in said
    assert "--delta=" in refusal(sample.main, [f"--out_dir={finished}", "--delta=a.pt,"], capsys)


@pytest.mark.slow
def test_a_kill_while_a_delta_is_written_leaves_none_or_a_whole_one(tmp_path):
    program, path, states = tmp_path / "writer.py", tmp_path / "delta.pt", set()
    program.write_text(
        f"import sys, pathlib, torch; sys.path.insert(0, {str(ROOT)!r})\n"
        "from edit.delta import save_delta\n"
        "values, rows = torch.ones(100_000, 64), torch.arange(100_000)\n"
        f"while True:\n    save_delta(pathlib.Path({str(path)!r}), values, rows, 'base', 'name')\n    values += 1\n"
    )
    for first in (True, False, False):
        process = subprocess.Popen([sys.executable, program])
        temporary = Path(f"{path}.{process.pid}.tmp")
        wait_until(lambda first=first: first or path.exists(), process)
        wait_until(lambda t=temporary: t.exists() and t.stat().st_size > 1_000_000, process)
        process.kill()
        process.wait()
        states.add((path.exists(), temporary.exists()))
        if path.exists():
            delta = load(path)
            parts = {name: delta[name] for name in ("rows", "values")}
            assert delta["hash"] == weights_hash(parts) and len(parts["values"].unique()) == 1
    assert (False, True) in states or (True, True) in states, (
        states
    )  # a kill came while it was writing


@pytest.mark.parametrize(
    "options, words",
    [
        (["--slots=257"], ["slots=257", "256"]),
        (["--slots=4", "--background="], ["slots=4", "background="]),
        (["--preset=facts-memory"], ["--preset"]),
        (["--mem_keys=32"], ["--mem_keys"]),
        (["--background=nowhere"], ["nowhere"]),
        (["--init_from=nowhere"], ["no checkpoint", "nowhere", "init_from="]),
        (["--init_from="], ["init_from="]),
        (["--dataset="], ["dataset="]),
        (["--optimizer=adam"], ["optimizer=adam", "rowadam"]),
        (["--out_dir={finished}", "--overwrite"], ["out_dir=", "the same folder"]),
    ],
)
def test_an_update_that_cannot_be_is_refused(options, words, finished, new, tmp_path, capsys):
    options = [option.format(finished=finished) for option in options]
    before = contents(finished)
    said = refusal(update.main, update_arguments(finished, new, tmp_path / "out", *options), capsys)
    assert all(word in said for word in words), said
    assert not (tmp_path / "out" / "delta.pt").exists() and contents(finished) == before


def test_an_update_is_for_one_process(finished, new, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    said = refusal(update.main, update_arguments(finished, new, tmp_path / "out"), capsys)
    assert "one process" in said and "torchrun" in said


def test_other_models_and_vocabularies_are_refused(finished, facts, new, tmp_path, capsys):
    dense, other, out = tmp_path / "dense", tmp_path / "other", tmp_path / "out"
    no_memory = ("--mem_layers=", "--mem_count=0", "--max_iters=1")
    train_here(*SMALL, f"--dataset={facts}", f"--out_dir={dense}", *no_memory)
    assert "has no memory" in refusal(update.main, update_arguments(dense, new, out), capsys)
    for options in (["--start=B"], ["--recall"]):
        assert "has no memory" in refusal(
            inspect_slots.main, [f"--out_dir={dense}", *options], capsys
        )
    said = refusal(sample.main, [f"--out_dir={dense}", "--delta=x.pt"], capsys)
    assert "has no memory" in said
    shutil.copytree(new, other)
    vocabulary = json.loads((new / "vocab.json").read_text())
    vocabulary["tokens"][-3:-1] = vocabulary["tokens"][-2], vocabulary["tokens"][-3]
    (other / "vocab.json").write_text(json.dumps(vocabulary))
    for main, given in (
        (update.main, update_arguments(finished, other, out)),
        (train.main, [f"--init_from={finished}", f"--dataset={other}", f"--out_dir={out}"]),
        (sample.main, [f"--out_dir={finished}", "--recall", f"--dataset={other}"]),
        (inspect_slots.main, [f"--out_dir={finished}", f"--dataset={other}"]),
    ):
        said = refusal(main, given, capsys)
        assert "vocabulary" in said and str(other) in said
    assert "--dataset=" in refusal(
        sample.main, [f"--out_dir={finished}", f"--dataset={new}"], capsys
    )
    given = [*SMALL, f"--dataset={facts}", f"--background={new}"]
    assert "init_from=" in refusal(train.main, given, capsys)


def test_a_folder_of_another_run_is_not_overwritten_unasked(finished, new, tmp_path, capsys):
    (tmp_path / "delta.pt").write_bytes(b"somebody's")
    for main, given in (
        (update.main, update_arguments(finished, new, tmp_path)),
        (train.main, [f"--init_from={finished}", f"--dataset={new}", f"--out_dir={tmp_path}"]),
    ):
        said = refusal(main, given, capsys)
        assert "--overwrite" in said and "--resume" not in said
        assert (tmp_path / "delta.pt").read_bytes() == b"somebody's"
    teach(finished, new, tmp_path, "--overwrite")


def test_an_old_dataset_that_is_another_now_is_named(finished, facts, new, tmp_path, capsys):
    before = (facts / "train.bin").read_bytes()
    try:
        (facts / "train.bin").write_bytes(before[: len(before) // 4 * 2])
        for main in (update.main, train.main):
            given = [f"--init_from={finished}", f"--dataset={new}", f"--out_dir={tmp_path / 'x'}"]
            said = refusal(main, given, capsys)
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
    train_here(*SMALL, f"--dataset={facts}", f"--out_dir={out}", "--mem_layers=0,1")
    return out


def test_inspect_shows_the_slots_and_weights_that_were_read(two_layers, capsys):
    start = "B was born in"
    inspect_slots.main(
        [f"--out_dir={two_layers}", "--json", f"--start={start}", "--max_new_tokens=5"]
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    checkpoint = read_checkpoint(two_layers / "ckpt.pt")
    encoding, model = make_encoding(checkpoint["vocabulary"]), model_of(two_layers)
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
    model, dataset, best = model_of(two_layers), Dataset(facts), {}
    windows = open_dataset(facts, 32, 0)["train_eval"]
    got = readers.Readers(256)
    encoding = make_encoding(dataset.vocabulary())
    end = encoding.encode(".\n")[0]
    ends = np.isin(np.arange(encoding.n_vocab), [end, encoding.encode("\n")[0], dataset.separator])
    readers.find_readers(got, model, windows, ends, torch.no_grad())
    for number in range(len(windows)):
        begin, ids = windows.start(number), windows.windows([number])[0]
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
        ids, seen = torch.from_numpy(windows.windows([number])[:, :-1]), readers.Reads(model.config)
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
        model = model_of(out)
        readers.open_readers(out / "ckpt.pt", model, dataset, torch.no_grad())
        made.append((out / "readers.pt").stat().st_mtime_ns)
        return made[-1] != (made[-2] if len(made) > 1 else 0)

    assert open_readers() and not open_readers()
    checkpoint = load(out / "ckpt.pt")
    checkpoint["model"]["pool.values"][7] += 1
    torch.save(checkpoint, out / "ckpt.pt")
    assert open_readers() and not open_readers() and open_readers(Dataset(new))
    (out / "readers.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"readers\.pt is damaged"):
        open_readers()


def test_readers_that_cannot_be_kept_are_shown_all_the_same(two_layers, tmp_path, capsys):
    shutil.copytree(two_layers, tmp_path / "out", ignore=shutil.ignore_patterns("readers.pt"))
    (
        tmp_path / "out" / f"readers.pt.{os.getpid()}.tmp"
    ).mkdir()  # in the way: nobody can write there, not even root
    inspect_slots.main([f"--out_dir={tmp_path / 'out'}", "--start=B", "--max_new_tokens=1"])
    shown = capsys.readouterr()
    assert (
        "slot " in shown.out
        and "readers.pt" in shown.err
        and not (tmp_path / "out" / "readers.pt").exists()
    )


def test_inspect_on_a_terminal(finished, facts, capsys):
    inspect_slots.main(
        [f"--out_dir={finished}", "--start=Once", "--max_new_tokens=2", "--device=cpu"]
    )
    said = capsys.readouterr().out
    assert said.count("block 1, slot ") == 6 and said.count("% of weights, read by") == 6
    text = make_encoding(Dataset(facts).vocabulary()).decode(
        Dataset(facts).tokens("train").tolist()
    )
    shown = [line.strip() for line in said.splitlines() if line.startswith("      ")]
    assert len(shown) > 6 and all(
        line.replace(" →", "") in text for line in shown if "\n" not in line
    )


def test_who_shares_the_slot_that_a_fact_reads_most_is_what_one_counts_by_hand():
    facts = [("Ann", "city"), ("Ann", "firm"), ("Bob", "city")]
    first, mass = inspect_slots.shared(
        facts, [{1: 0.6, 2: 0.4}, {1: 0.3, 3: 0.7}, {1: 0.5, 4: 0.4}]
    )
    assert first == {
        "attribute": 2,
        "nobody": 1,
    }  # Bob's city for Ann's, Ann's for Bob's; slot 3 is her firm's
    assert mass == pytest.approx(
        {"person": 0.3 / 0.8, "attribute": 0.5 / 0.8 + 0.6 / 0.9, "neither": 0.3 / 0.9}
    )


def test_all_questions_can_be_inspected(finished, facts, capsys):
    """What --recall prints is counted again from what --recall --json prints."""
    inspect_slots.main([f"--out_dir={finished}", "--recall", "--json"])
    read = json.loads(capsys.readouterr().out)
    assert read["keys"] == 16 and read["block"] == 1 and len(read["reads"]) == 54
    shares = [dict(pairs) for _, _, pairs in read["reads"]]
    assert all(sum(share.values()) == pytest.approx(1, abs=0.01) for share in shares)
    inspect_slots.main([f"--out_dir={finished}", "--recall"])
    said = capsys.readouterr().out
    slots = len({slot for share in shares for slot in share})
    assert f"54 questions, which read {slots} slots" in said
    top = sum(max(share.values()) for share in shares) / 54
    assert f"{top:.1%} of its weights" in said
