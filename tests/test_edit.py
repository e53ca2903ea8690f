"""Updates of rows, deltas, and what edit/inspect_slots.py shows: against counts by hand and float64."""

import json
import math
import os
import pickle
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from data.dataset import Dataset, make_encoding, open_dataset
from data.facts.prepare import MOVES, make_people
from edit import inspect_slots, ngrams, readers, update
from edit.delta import apply_deltas, save_delta, weights_hash
from helpers import (
    SMALL,
    SYSTEMS,
    contents,
    load,
    log_of,
    prepare_here,
    refusal,
    steps_done,
    train_here,
    wait_until,
)
from kernels import RowAdam, lookup
from model import GPT
from processes import Process, start_program
from runtime.checkpoint import read_checkpoint

UPDATE = (
    "--batch_size=2 --eval_iters=1 --device=cpu --log_interval=1 --max_iters=4 --eval_interval=2"
)


@pytest.fixture(scope="module", autouse=True)
def fewer_background_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "BACKGROUND_WINDOWS", 60)
        yield


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """A dataset of five other people."""
    folder = tmp_path_factory.mktemp("data") / "new"
    prepare_here("facts", "--people=9", "--biographies=9", "--new=5", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A dataset of four known people who have moved."""
    folder = tmp_path_factory.mktemp("data") / "moved"
    prepare_here("facts", "--people=9", "--biographies=20", "--moved=4", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def taught(finished, new, tmp_path_factory):
    """The folder of an update of 40 of 256 slots."""
    out = tmp_path_factory.mktemp("run") / "taught"
    teach(finished, new, out, "--slots=40")
    return out


@pytest.fixture(scope="module")
def dense(facts, tmp_path_factory):
    """A run without a memory."""
    out = tmp_path_factory.mktemp("run") / "dense"
    options = ["--mem_layers=", "--mem_count=0", "--max_iters=1"]
    train_here(*SMALL, f"--dataset={facts}", f"--out_dir={out}", *options)
    return out


def teach(base, data, out, *options):
    """edit/update.py in this process. Returns the weights before and after."""
    runs = []
    summarize = update.summarize
    arguments = [f"--init_from={base}", f"--dataset={data}", f"--out_dir={out}", *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "summarize", lambda run, *a: runs.append(run) or summarize(run, *a))
        update.main([*UPDATE.split(), *arguments])
    return load(base / "ckpt.pt")["model"], runs[0].model.state_dict()


def open_update(base, data, out, **options):
    """What edit/update.py opens: a train.Run with an update's config."""
    given = {"init_from": str(base), "dataset": str(data), "out_dir": str(out), "device": "cpu"}
    given.update(options)
    options, checkpoint = update.complete_options(given)
    return update.prepare(update.UpdateConfig(**options), checkpoint)


def open_model(out):
    return GPT.from_checkpoint(out / "ckpt.pt")


def names_in(questions):
    return {question["prompt"].rsplit(" ", 3)[0] for question in questions}


# --- data -------------------------------------------------------------------------------------------------


def test_new_people_are_new_and_those_who_moved_are_known_and_have_moved(facts, new, moved):
    known = Dataset(facts).questions()
    unknown = Dataset(new).questions()
    changed = Dataset(moved).questions()
    assert len(unknown) == 30 and len(names_in(unknown)) == 5
    assert not names_in(unknown) & names_in(known)
    assert len(changed) == 4 * len(MOVES) and len(names_in(changed)) == 4
    assert names_in(changed) < names_in(known)
    before = {question["prompt"]: question["answer"] for question in known}
    text = make_encoding(Dataset(facts).vocabulary()).decode(
        Dataset(moved).tokens("train").tolist()
    )
    for question in changed:
        assert before[question["prompt"]] != question["answer"]
        assert question["attribute"] in MOVES
        assert text.count(f" {question['answer']}.") >= 20
    assert text.count(".\n") == 4 * len(MOVES) * 20


def test_no_name_is_drawn_twice():
    people = make_people(50, np.random.default_rng(0))
    # the same draws: all of them are taken
    others = make_people(50, np.random.default_rng(0), people)
    assert len(others) == 50 and not {name for name, *_ in people} & {name for name, *_ in others}


# --- choosing slots ---------------------------------------------------------------------------------------


def test_tf_idf_is_what_one_counts_by_hand():
    c = torch.tensor([6.0, 3.0, 0.0, 1.0])
    background = [torch.tensor(reads) for reads in ([9.0, 0, 1, 0], [1.0, 0, 0, 0], [2.0, 1, 0, 0])]
    expected = [0.6 * math.log(4 / 4), 0.3 * math.log(4 / 2), 0.0, 0.1 * math.log(4 / 1)]
    torch.testing.assert_close(update.score_slots(c, iter(background)), torch.tensor(expected))


def slots_read(model, ids):
    """The loss of a batch, and how often each slot was read: a Counter."""
    seen = []
    hook = model.blocks[1].ffn.register_forward_pre_hook(
        lambda layer, x: seen.append(layer.retrieve(x[0].flatten(0, 1))[0])
    )
    _, loss = model(torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:]))
    hook.remove()
    return loss, Counter(seen[0].flatten().tolist())


@pytest.mark.parametrize("by", ["reads", "gradient"])
def test_the_slots_with_the_best_scores_are_chosen(finished, facts, new, by, tmp_path, monkeypatch):
    """An independent count: one window after another, reads in a Counter, the gradient by autograd."""
    run = open_update(finished, new, tmp_path, choose_by=by, slots=9, batch_size=2)
    update.make_optimizer(run, {})
    got = update.choose_slots(run).tolist()

    model = open_model(finished)
    model.pool.lookup = partial(lookup, model.pool.values)  # autograd's own gradient
    windows = open_dataset(new, 32, 1)["train"]
    background = open_dataset(facts, 32, 1)["train"]
    reads = Counter()
    gradient = torch.zeros_like(model.pool.values, dtype=torch.float64)
    for i in range(0, len(windows) // 2 * 2, 2):
        loss, counts = slots_read(model, windows.windows(range(i, i + 2)))
        gradient += torch.autograd.grad(loss, model.pool.values)[0].to_dense()
        reads.update(counts)
    containing = Counter()
    for i in range(60):
        containing.update(slots_read(model, background.windows([i]))[1].keys())
    c = gradient.norm(dim=1)
    if by == "reads":
        c = torch.tensor([float(reads[slot]) for slot in range(256)])
    scores = torch.tensor(
        [c[slot] / c.sum() * math.log(61 / (1 + containing[slot])) for slot in range(256)]
    )
    assert len(set(got)) == 9
    assert scores[got].min() >= scores.topk(9).values.min() * (1 - 1e-5)


# --- what an update changes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "system", ["memory", "peer", pytest.param("ultramem", marks=pytest.mark.slow)]
)
def test_only_the_chosen_rows_change_and_the_delta_is_them(system, facts, new, tmp_path, finished):
    base = finished
    rows_of_a_slot = 1
    if system != "memory":
        base = tmp_path / "base"
        rows_of_a_slot = 2
        train_here(*SMALL, f"--dataset={facts}", f"--out_dir={base}", *SYSTEMS[system])
    files = contents(base)
    before, after = teach(base, new, tmp_path / "new", "--slots=40")
    assert contents(base) == files
    assert {path.name for path in contents(tmp_path / "new")} == {"log.jsonl", "delta.pt"}
    assert all(torch.equal(before[name], after[name]) for name in before if name != "pool.values")
    changed = (before["pool.values"] != after["pool.values"]).any(dim=1).nonzero().flatten()
    delta = load(tmp_path / "new" / "delta.pt")
    assert len(delta["rows"]) == 40 * rows_of_a_slot and len((delta["rows"] % 256).unique()) == 40
    assert len(changed) > 20 and set(changed.tolist()) <= set(delta["rows"].tolist())
    assert torch.equal(after["pool.values"][delta["rows"]], delta["values"])
    model = open_model(base)
    apply_deltas(model, base / "ckpt.pt", [tmp_path / "new" / "delta.pt"])
    assert all(torch.equal(after[name], x) for name, x in model.state_dict().items())


def test_all_rows_or_all_weights_can_change_and_the_log_tells_of_old_and_new(
    finished, facts, new, tmp_path
):
    rows = tmp_path / "rows"
    before, after = teach(finished, new, rows, "--optimizer=rowadam", "--learning_rate=0.1")
    assert all(torch.equal(before[name], after[name]) for name in before if name != "pool.values")
    assert (before["pool.values"] != after["pool.values"]).any(dim=1).sum() > 100
    assert len(load(rows / "delta.pt")["rows"]) == 256

    tuned = tmp_path / "all"
    options = ["--max_iters=4", "--eval_interval=2", "--warmup_iters=1"]
    train_here(f"--init_from={finished}", f"--dataset={new}", f"--out_dir={tuned}", *options)
    after = load(tuned / "ckpt.pt")["model"]
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert not (tuned / "delta.pt").exists()

    model = open_model(finished)
    ids = torch.from_numpy(open_dataset(facts, 32, 0)["val_eval"].windows(range(2)))
    with torch.no_grad():
        _, loss = model(ids[:, :-1], ids[:, 1:])
    for out in (rows, tuned):
        first, *_, last = log_of(out)
        assert first["iter"] == 0 and last["iter"] == 4 and last["val_loss"] < first["val_loss"]
        assert {"recall", "old_recall", "old_val_loss"} <= first.keys() & last.keys()
        assert first["old_val_loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("rehearse", [0, 3])
def test_sgd_moves_a_value_by_the_gradient_of_the_sum_over_tokens(
    finished, facts, new, tmp_path, rehearse
):
    options = ["--learning_rate=0.5", "--max_iters=1", "--seed=7", f"--rehearse={rehearse}"]
    before, after = teach(finished, new, tmp_path / "out", *options)
    model = open_model(finished)
    model.pool.lookup = partial(lookup, model.pool.values)  # autograd's own gradient
    ids = open_dataset(new, 32, 7)["train"].windows(range(2))
    if rehearse > 0:
        old = open_dataset(facts, 32, 7)["train"].windows(range(rehearse))
        ids = np.concatenate((ids, old))
    ids = torch.from_numpy(ids)
    _, loss = model(ids[:, :-1], ids[:, 1:])
    tokens = 32 * (2 + rehearse)
    assert log_of(tmp_path / "out")[-1]["tokens"] == tokens
    gradient = torch.autograd.grad(loss * tokens, model.pool.values)[0].to_dense()
    want = before["pool.values"] - 0.5 * gradient
    torch.testing.assert_close(after["pool.values"], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype, kind", [("float32", update.RowSGD), ("bfloat16", RowAdam)])
def test_a_table_in_bfloat16_is_updated_by_rowadam(finished, new, tmp_path, dtype, kind):
    run = open_update(finished, new, tmp_path)
    run.model.pool.to(getattr(torch, dtype))
    train_config = read_checkpoint(finished / "ckpt.pt")["train_config"]
    assert type(update.make_optimizer(run, train_config)) is kind


def test_facts_that_have_changed_are_not_asked_as_old_ones(finished, moved, tmp_path):
    data = open_update(finished, moved, tmp_path).data
    old = {question["prompt"] for question in data["old"]["questions"]}
    asked = {question["prompt"] for question in data["questions"]}
    assert len(old) == 9 * 6 - 8 and len(asked) == 8 and not old & asked


# --- deltas -----------------------------------------------------------------------------------------------


def test_deltas_stack_in_order_and_leaving_them_out_is_the_old_model(
    finished, new, taught, tmp_path, capsys
):
    path = finished / "ckpt.pt"
    teach(finished, new, tmp_path / "second", "--slots=100", "--learning_rate=300")
    files = [taught / "delta.pt", tmp_path / "second" / "delta.pt", tmp_path / "third.pt"]
    first = load(files[0])
    second = load(files[1])
    assert len(np.intersect1d(first["rows"], second["rows"])) > 5

    def table(*deltas):
        model = open_model(finished)
        apply_deltas(model, path, deltas)
        return model.pool.values.detach()

    for order in ((0, 1), (1, 0)):
        expected = load(path)["model"]["pool.values"].clone()
        for i in order:
            delta = (first, second)[i]
            for row, value in zip(delta["rows"].tolist(), delta["values"], strict=True):
                expected[row] = value
        assert torch.equal(table(*(files[i] for i in order)), expected)

    # the third is of the model that the first has left
    model = open_model(finished)
    apply_deltas(model, path, files[:1])
    base = weights_hash(model.state_dict())
    chained = model.pool.values.detach() + 1
    save_delta(files[2], chained, torch.arange(256), base, "taught")
    assert torch.equal(table(files[0], files[2]), chained)
    for wrong in ([files[2]], [files[1], files[2]], [files[2], files[0]]):
        message = r"third\.pt belongs to taught \(.{16}\), not to .*/out/ckpt\.pt \("
        with pytest.raises(ValueError, match=message):
            table(*wrong)

    def text(*options):
        capsys.readouterr()
        greedy = ["--num_samples=1", "--max_new_tokens=30", "--temperature=0", "--start=B"]
        sample.main([f"--out_dir={finished}", *greedy, *options])
        return capsys.readouterr().out

    plain = text()
    assert text(f"--delta={files[1]}") != plain == text()


def test_an_update_continues_an_earlier_one_and_its_delta_has_both(
    finished, moved, taught, tmp_path, capsys
):
    out = tmp_path / "second"
    earlier = taught / "delta.pt"
    before = contents(taught)
    _, after = teach(finished, moved, out, "--slots=60", f"--delta={taught}")
    first, second = load(earlier), load(out / "delta.pt")
    assert contents(taught) == before
    assert second["base"] == first["base"] == weights_hash(load(finished / "ckpt.pt")["model"])
    model = open_model(finished)
    apply_deltas(model, finished / "ckpt.pt", [earlier])
    start = model.state_dict()
    changed = (after["pool.values"] != start["pool.values"]).any(dim=1).nonzero().flatten()
    assert 0 < len(changed) <= 60
    assert set(first["rows"].tolist()) < set(second["rows"].tolist())
    assert set(changed.tolist()) < set(second["rows"].tolist()) and len(second["rows"]) <= 100
    model = open_model(finished)
    apply_deltas(model, finished / "ckpt.pt", [out])
    assert torch.equal(model.pool.values, after["pool.values"])

    # refused before anything is removed
    options = [f"--init_from={finished}", f"--dataset={moved}", "--overwrite"]
    for place in (taught, earlier):
        same = [*options, f"--out_dir={taught}", f"--delta={place}"]
        assert "--delta is in it" in refusal(update.main, same, capsys)
    other = tmp_path / "other.pt"
    torch.save({**first, "base": "another"}, other)
    said = refusal(update.main, [*options, f"--out_dir={out}", f"--delta={other}"], capsys)
    assert f"{other} belongs to" in said
    assert contents(taught) == before and load(out / "delta.pt")["hash"] == second["hash"]


def wrong_deltas(good, checkpoint):
    """(name, contents, words of the message)"""
    whole = load(good)
    rows = whole["rows"]
    values = whole["values"]

    def with_tensors(rows, values):
        tensors = {"rows": rows, "values": values}
        return {**whole, **tensors, "hash": weights_hash(tensors)}

    yield "truncated", good.read_bytes()[:-1000], ["damaged"]
    flipped = bytearray(good.read_bytes())
    flipped[flipped.find(values[20].numpy().tobytes())] ^= 1
    yield "one bit", bytes(flipped), ["damaged", "not those that were saved"]
    yield "code", pickle.dumps(train.main), ["not a delta"]
    yield "a checkpoint", load(checkpoint), ["not a delta"]
    yield "beyond", with_tensors(rows + 250, values), ["damaged", "of a table of 256"]
    yield "negative", with_tensors(rows - 256, values), ["damaged", "of a table of 256"]
    yield "wide", with_tensors(rows, values.repeat(1, 2)), ["damaged"]
    yield "half", with_tensors(rows, values[:7]), ["damaged"]
    without = {name: x for name, x in whole.items() if name != "rows"}
    yield "without rows", without, ["damaged", "rows"]


def test_a_delta_that_is_none_is_refused_and_the_message_names_it(
    taught, finished, two_layers, tmp_path, capsys
):
    for name, data, words in wrong_deltas(taught / "delta.pt", finished / "ckpt.pt"):
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data) if isinstance(data, bytes) else torch.save(data, path)
        said = refusal(sample.main, [f"--out_dir={finished}", f"--delta={path}"], capsys)
        assert all(word in said for word in (str(path), *words)), said
    said = refusal(sample.main, [f"--out_dir={finished}", f"--delta={tmp_path}/none.pt"], capsys)
    assert "no delta" in said and "none.pt" in said
    assert "--delta: must name" in refusal(
        sample.main, [f"--out_dir={finished}", "--delta="], capsys
    )
    arguments = [f"--out_dir={two_layers}", f"--delta={taught}/delta.pt"]
    said = refusal(sample.main, arguments, capsys)
    names = []
    for folder in (finished, two_layers):
        names.append(f"{folder}/ckpt.pt ({weights_hash(load(folder / 'ckpt.pt')['model'])})")
    assert f"belongs to {names[0]}, not to {names[1]}" in said


@pytest.mark.slow
def test_a_killed_update_leaves_no_delta(finished, new, tmp_path, capsys):
    files = contents(finished)
    arguments = [*UPDATE.split(), f"--init_from={finished}", f"--dataset={new}"]
    arguments.append(f"--out_dir={tmp_path}")
    process = start_program("edit/update.py", *arguments, "--max_iters=100000")
    wait_until(lambda: steps_done(tmp_path) > 3, process)
    process.kill()
    process.communicate()
    assert [path.name for path in contents(tmp_path)] == ["log.jsonl"]
    assert contents(finished) == files
    said = refusal(update.main, arguments, capsys)
    assert "holds a run already" in said and "--overwrite" in said
    update.main([*arguments, "--overwrite"])
    assert len(load(tmp_path / "delta.pt")["rows"]) == 256 and steps_done(tmp_path) == 5


def write_deltas(path):
    values = torch.ones(50_000, 64)
    while True:
        save_delta(path, values, torch.arange(50_000), "base", "name")
        values += 1


@pytest.mark.slow
def test_a_kill_while_a_delta_is_written_leaves_none_or_a_whole_one(tmp_path):
    path = tmp_path / "delta.pt"
    states = set()
    for first in (True, True, False, False):
        if first:
            path.unlink(missing_ok=True)
        process = Process(write_deltas, path)
        temporary = Path(f"{path}.{process.pid}.tmp")
        wait_until(lambda first=first: first or path.exists(), process)
        wait_until(lambda t=temporary: t.exists() and t.stat().st_size > 1_000_000, process)
        process.kill()
        process.communicate()
        states.add((path.exists(), temporary.exists()))
        if path.exists():
            delta = load(path)
            tensors = {"rows": delta["rows"], "values": delta["values"]}
            assert delta["hash"] == weights_hash(tensors)
            assert len(delta["values"].unique()) == 1
    # a kill came while it was writing
    assert (False, True) in states or (True, True) in states, states


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program, options, words",
    [
        (update, ["--slots=257"], ["slots=257", "256"]),
        (update, ["--slots=4", "--background="], ["slots=4", "--background"]),
        (update, ["--background=nowhere"], ["nowhere"]),
        (update, ["--rehearse=2", "--background="], ["rehearse=2", "--background"]),
        (update, ["--delta=nowhere.pt"], ["nowhere.pt"]),
        (update, ["--init_from=nowhere"], ["no checkpoint", "nowhere"]),
        (update, ["--init_from="], ["no checkpoint"]),
        (update, ["--dataset=nowhere"], ["nowhere", "dataset"]),
        (update, ["--out_dir={finished}", "--overwrite"], ["out_dir=", "the same folder"]),
        (update, ["--out_dir="], ["out_dir=", "must name a folder"]),
        (update, ["--choose_by=chance"], ["choose_by=chance", "gradient, reads"]),
        (train, ["--out_dir={finished}", "--overwrite"], ["out_dir=", "the same folder"]),
        (train, ["--init_from=nowhere"], ["no checkpoint", "nowhere"]),
        (train, ["--preset=facts-memory"], ["preset"]),
        (train, ["--mem_keys=32"], ["mem_keys=32", "keeps --mem_keys=16"]),
    ],
)
def test_an_update_that_cannot_be_is_refused(
    program, options, words, finished, new, tmp_path, capsys
):
    options = [option.format(finished=finished) for option in options]
    out = tmp_path / "out"
    files = contents(finished)
    arguments = [f"--init_from={finished}", f"--dataset={new}", f"--out_dir={out}", *options]
    said = refusal(program.main, arguments, capsys)
    assert all(word in said for word in words), said
    assert not out.exists() and contents(finished) == files


def test_what_goes_with_an_earlier_run_must_name_it(facts, new, capsys):
    options = [*SMALL, f"--dataset={facts}", f"--background={new}"]
    assert "--init_from" in refusal(train.main, options, capsys)
    assert "--init_from" in refusal(update.main, [f"--dataset={new}"], capsys)
    assert "--dataset" in refusal(update.main, [f"--init_from={facts}"], capsys)
    assert "--recall" in refusal(sample.main, [f"--dataset={new}"], capsys)


def test_a_model_without_a_memory_is_refused(dense, new, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [f"--init_from={dense}", f"--dataset={new}", f"--out_dir={out}"]
    said = refusal(update.main, arguments, capsys)
    assert f"init_from={dense}: the model has no memory" in said and not out.exists()
    said = refusal(inspect_slots.main, [f"--out_dir={dense}"], capsys)
    assert f"{dense}/ckpt.pt has no memory" in said
    arguments = [f"--out_dir={dense}", f"--delta={out}/delta.pt"]
    assert "has no memory" in refusal(sample.main, arguments, capsys)


def test_another_vocabulary_is_refused(finished, new, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(new, other)
    vocabulary = json.loads((new / "vocab.json").read_text())
    tokens = vocabulary["tokens"]
    tokens[-3:-1] = reversed(tokens[-3:-1])
    (other / "vocab.json").write_text(json.dumps(vocabulary))
    arguments = [f"--init_from={finished}", f"--dataset={other}", f"--out_dir={tmp_path / 'out'}"]
    for program in (update, train):
        said = refusal(program.main, arguments, capsys)
        assert "vocabulary differs" in said and str(other) in said
    arguments = [f"--out_dir={finished}", f"--dataset={other}", "--recall"]
    for program in (sample, inspect_slots):
        said = refusal(program.main, arguments, capsys)
        assert "vocabulary" in said and str(other) in said


def test_a_delta_in_a_folder_is_not_overwritten_unasked(finished, new, tmp_path, capsys):
    (tmp_path / "delta.pt").write_bytes(b"somebody's")
    arguments = [f"--init_from={finished}", f"--dataset={new}", f"--out_dir={tmp_path}"]
    said = refusal(update.main, arguments, capsys)
    assert f"{tmp_path} holds a run already: --overwrite it" in said and "--resume" not in said
    for options in ([], ["--overwrite"]):  # train.py never removes an update
        said = refusal(train.main, [*arguments, *options], capsys)
        assert f"{tmp_path} holds another program's delta.pt" in said and "--resume" not in said
    assert (tmp_path / "delta.pt").read_bytes() == b"somebody's"


def test_an_old_dataset_that_has_changed_is_not_passed_over(finished, facts, new, tmp_path, capsys):
    before = (facts / "train.bin").read_bytes()
    arguments = [f"--init_from={finished}", f"--dataset={new}", f"--out_dir={tmp_path / 'out'}"]
    try:
        (facts / "train.bin").write_bytes(before[: len(before) // 4 * 2])
        for program in (update, train):
            said = refusal(program.main, arguments, capsys)
            assert "background=" in said and "was trained on" in said
    finally:
        (facts / "train.bin").write_bytes(before)


# --- inspect ----------------------------------------------------------------------------------------------


def normalized(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def float64_reads(model, ids):
    """{block: [{slot: share of the weights} of each token]}, all N * N sums, in float64. ids (B, T)"""
    model = model.double()
    found = {}

    def see(layer, x, i):
        q = layer.query(x[0].flatten(0, 1)).view(-1, 2, layer.H, layer.Q)
        q = normalized(q, layer.query_norm.weight)
        keys = normalized(layer.keys, layer.key_norm.weight)
        s1 = torch.einsum("nhq,hkq->nhk", q[:, 0], keys[: layer.H])
        s2 = torch.einsum("nhq,hkq->nhk", q[:, 1], keys[layer.H :])
        sums = (s1[..., :, None] + s2[..., None, :]).flatten(2) / math.sqrt(layer.Q)
        best, slots = sums.topk(layer.K)
        shares = best.softmax(-1) / layer.H
        found[i] = [Counter() for _ in q]
        for token, counter in enumerate(found[i]):
            pairs = zip(slots[token].flatten(), shares[token].flatten(), strict=True)
            for slot, share in pairs:
                counter[slot.item()] += share.item()

    hooks = [
        model.blocks[i].ffn.register_forward_pre_hook(lambda layer, x, i=i: see(layer, x, i))
        for i in model.config.mem_layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture(scope="module")
def two_layers(facts, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "two"
    train_here(*SMALL, f"--dataset={facts}", f"--out_dir={out}", "--mem_layers=0,1")
    return out


def test_inspect_shows_the_slots_and_weights_that_were_read(two_layers, capsys):
    arguments = ["--json", "--start=B was born in", "--max_new_tokens=5"]
    inspect_slots.main([f"--out_dir={two_layers}", *arguments])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    checkpoint = read_checkpoint(two_layers / "ckpt.pt")
    encoding = make_encoding(checkpoint["vocabulary"])
    model = open_model(two_layers)
    ids = [checkpoint["separator"], *encoding.encode("B was born in")]
    assert len(lines) == 5
    for line in lines:
        expected = float64_reads(model, torch.tensor([ids]))
        for block in (0, 1):
            got = {read["slot"]: read["share"] for read in line["reads"] if read["block"] == block}
            assert got == pytest.approx(expected[block][-1], rel=1e-3)
            shares = list(got.values())
            assert shares == sorted(shares, reverse=True)
            assert sum(shares) == pytest.approx(1, abs=1e-5)
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        assert encoding.decode(ids[-1:]) == line["token"]


def test_inspect_shows_what_questions_read(two_layers, facts, capsys):
    inspect_slots.main([f"--out_dir={two_layers}", "--recall", "--rows=3", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["block"] for line in lines] == [0, 1]
    model = open_model(two_layers)
    dataset = Dataset(facts)
    for number, question in enumerate(dataset.questions()[:3]):
        ids = torch.tensor([[dataset.separator, *question["prompt_ids"]]])
        expected = float64_reads(model, ids)
        for line in lines:
            person, attribute, pairs = line["reads"][number]
            assert question["prompt"].startswith(person) and attribute == question["attribute"]
            assert dict(pairs) == pytest.approx(expected[line["block"]][-1], abs=1e-4)
    inspect_slots.main([f"--out_dir={two_layers}", "--recall"])
    shown = capsys.readouterr().out
    assert "block 0, 54 questions" in shown and "block 1, 54 questions" in shown


@pytest.mark.slow
def test_the_readers_of_a_slot_are_those_with_the_largest_weights(two_layers, facts):
    """All of a small dataset, counted one token after another."""
    model = open_model(two_layers)
    dataset = Dataset(facts)
    windows = open_dataset(facts, 32, 0)["train_eval"]
    encoding = make_encoding(dataset.vocabulary())
    end = encoding.encode(".\n")[0]
    ends = np.isin(np.arange(encoding.n_vocab), [end, encoding.encode("\n")[0], dataset.separator])
    assert readers.passage_ends(dataset)[[end, dataset.separator]].all()
    got = readers.Readers(256)
    readers.find_readers(got, model, windows, ends, torch.no_grad())

    # The weight of the first reader is the largest that any token gives to the slot, in one of its heads.
    largest = np.zeros(256)
    for number in range(len(windows)):
        reads = readers.Reads(model.config)
        model.pool.usage = reads
        with torch.no_grad():
            model(torch.from_numpy(windows.windows([number])[:, :-1]))
        model.pool.usage = None
        for slots, weights in reads.take():
            np.maximum.at(largest, slots, weights)
    np.testing.assert_allclose(got.weights[:, 0], largest, rtol=1e-4)

    places = {}  # {slot: {words: positions of tokens that read it}}
    for number in range(len(windows)):
        begin = windows.start(number)
        ids = windows.windows([number])[0]
        for reads in float64_reads(model, torch.from_numpy(ids[None, :-1])).values():
            for t, shares in enumerate(reads):
                words = ids[max(0, t - readers.WORDS + 1) : t + 1].tolist()
                while any(ends[word] for word in words[:-1]):
                    words = words[1:]
                for slot in shares:
                    places.setdefault(slot, {}).setdefault(tuple(words), set()).add(begin + t)
    for slot in range(256):
        mine = [p for p in got.positions[slot].tolist() if p >= 0]
        passages = places.get(slot, {})
        assert len(mine) == min(readers.READERS, len(passages)), slot
        assert set(mine) <= set().union(*passages.values())
        assert (np.diff(got.weights[slot]) <= 0).all()
    assert len(dataset.tokens("train")) > got.positions.max() + 1


def test_readers_are_kept_and_made_anew_for_other_weights_or_data(
    two_layers, facts, new, tmp_path, capsys
):
    out = tmp_path / "out"
    shutil.copytree(two_layers, out)
    (out / "readers.pt").unlink(missing_ok=True)
    times = [0]

    def made_anew(folder):
        readers.open_readers(out / "ckpt.pt", open_model(out), Dataset(folder), torch.no_grad())
        times.append((out / "readers.pt").stat().st_mtime_ns)
        return times[-1] != times[-2]

    assert made_anew(facts) and not made_anew(facts)
    other = tmp_path / "other"
    options = ["--max_iters=1", f"--init_from={two_layers}", f"--dataset={new}"]
    train_here(*options, f"--out_dir={other}")
    shutil.copy(other / "ckpt.pt", out)
    assert made_anew(facts) and not made_anew(facts) and made_anew(new)
    (out / "readers.pt").write_bytes(b"nothing")
    assert made_anew(new) and "readers.pt is damaged" in capsys.readouterr().err


def test_readers_that_cannot_be_kept_are_shown_all_the_same(two_layers, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(two_layers, out, ignore=shutil.ignore_patterns("readers.pt"))
    # in the way: nobody can write there, not even root
    (out / f"readers.pt.{os.getpid()}.tmp").mkdir()
    inspect_slots.main([f"--out_dir={out}", "--start=B", "--max_new_tokens=1"])
    shown = capsys.readouterr()
    assert "slot " in shown.out and "readers.pt" in shown.err
    assert not (out / "readers.pt").exists()


@pytest.mark.slow
def test_inspect_on_a_terminal(finished, facts):
    arguments = [f"--out_dir={finished}", "--start=Once", "--max_new_tokens=2", "--device=cpu"]
    process = start_program("edit/inspect_slots.py", *arguments)
    shown, errors = process.communicate()
    assert process.returncode == 0, errors
    assert shown.count("block 1, slot ") == 6 and shown.count("% of weights, read by") == 6
    text = make_encoding(Dataset(facts).vocabulary()).decode(
        Dataset(facts).tokens("train").tolist()
    )
    passages = [line.strip() for line in shown.splitlines() if line.startswith("      ")]
    assert len(passages) > 6
    for passage in passages:
        assert passage.replace(" →", "") in text.replace("\n", "")  # they are printed without


def test_who_shares_the_slot_that_a_fact_reads_most_is_what_one_counts_by_hand():
    facts = [("Ann", "city"), ("Ann", "firm"), ("Bob", "city")]
    first, mass = inspect_slots.shared(
        facts, [{1: 0.6, 2: 0.4}, {1: 0.3, 3: 0.7}, {1: 0.5, 4: 0.4}]
    )
    # Bob's city for Ann's, Ann's for Bob's; slot 3 is her firm's
    assert first == {"attribute": 2, "nobody": 1}
    assert mass == pytest.approx(
        {"person": 0.3 / 0.8, "attribute": 0.5 / 0.8 + 0.6 / 0.9, "neither": 0.3 / 0.9}
    )


# --- n-grams ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["engram", "bigram", "both"])
def ngram_run(request, facts, tmp_path_factory):
    """The folder of a run, and the orders of its n-grams."""
    out = tmp_path_factory.mktemp("run") / request.param
    train_here(*SMALL, f"--dataset={facts}", f"--out_dir={out}", *SYSTEMS[request.param])
    return out, (2,) if request.param == "bigram" else (2, 3)


def ngrams_by_loops(ids, n, separator):
    """The n-gram that ends at each token of a text."""
    found = []
    for t in range(len(ids)):
        gram = [ids[t]]
        while len(gram) < n and len(gram) <= t and gram[0] != separator:
            gram.insert(0, ids[t - len(gram)])
        found.append(tuple(gram))
    return found


def test_inspect_shows_which_ngrams_read_a_row(ngram_run, facts, capsys, monkeypatch):
    monkeypatch.setattr(ngrams, "PIECE", 100)
    out, orders = ngram_run
    inspect_slots.main(
        [f"--out_dir={out}", "--json", "--start=B was born in", "--max_new_tokens=3"]
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model = open_model(out)
    c = model.config
    encoding = make_encoding(read_checkpoint(out / "ckpt.pt")["vocabulary"])
    train_ids = Dataset(facts).tokens("train").tolist()
    ids = [c.separator, *encoding.encode("B was born in")]
    assert len(lines) == 3
    for line in lines:
        assert ("reads" in line) == (model.pool is not None)
        found = line["ngrams"]
        assert [read["block"] for read in found] == [i for i in c.ngram_layers for _ in orders]
        gates = gates_of(model, ids)
        for read, n in zip(found, orders * len(c.ngram_layers), strict=True):
            gram = ngrams_by_loops(ids, n, c.separator)[-1]
            assert read["ngram"] == encoding.decode(gram)
            assert read["gate"] == pytest.approx(gates[read["block"]], rel=1e-5)
            layer = model.blocks[read["block"]].ngram
            row = first_row(layer, gram, n, c)
            assert read["row"] == row
            every = Counter(ngrams_by_loops(train_ids, n, c.separator))
            want = {}
            for other, count in every.items():
                if first_row(layer, other, n, c) == row:
                    want[encoding.decode(other)] = want.get(encoding.decode(other), 0) + count
            assert dict(read["readers"]) == want
            counts = [count for _, count in read["readers"]]
            assert counts == sorted(counts, reverse=True)
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
        assert encoding.decode(ids[-1:]) == line["token"]


def first_row(layer, gram, n, config):
    """The row of an n-gram in the first head's table, in whole numbers of Python."""
    tokens = [*reversed(gram)] + [config.vocab_size] * (n - len(gram))
    if config.ngram == "bigram":
        if len(gram) == 1:
            return config.ngram_rows - 1
        return ((36313 * tokens[0]) ^ (27191 * tokens[1])) % (config.ngram_rows - 1)
    m = layer.multipliers.tolist()
    mix = 0
    for k in range(n):
        mix ^= m[k] * tokens[k]
    head = (n - 2) * config.ngram_heads
    return layer.offsets[head].item() + mix % layer.primes[n - 2, 0].item()


def gates_of(model, ids):
    """{block: gate of the last token}, from what the layers' parts return"""
    gates = {}
    hooks = []
    for i in model.config.ngram_layers:
        layer = model.blocks[i].ngram
        if model.config.ngram == "bigram":
            gates[i] = layer.strength.item()
        else:
            gate = layer.gate

            def see(h, key, i=i, gate=gate):
                a = gate(h, key)
                gates[i] = a[0, -1, 0].item()
                return a

            layer.gate = see
            hooks.append(layer)
    with torch.no_grad():
        model(torch.tensor([ids]))
    for layer in hooks:
        del layer.gate
    return gates


def test_inspect_prints_ngrams_for_people(ngram_run, capsys):
    out, orders = ngram_run
    inspect_slots.main([f"--out_dir={out}", "--start=B was born in", "--max_new_tokens=1"])
    said = capsys.readouterr().out
    assert "before block 1, gate " in said
    assert " born in' reads row " in said and ", read by '" in said and "' born in' (29)" in said
    assert (" was born in' reads row " in said) == (3 in orders)
    assert ("slot " in said) == (out.name == "both")


def test_only_memory_layers_have_slots_to_ask_for_and_to_update(ngram_run, new, tmp_path, capsys):
    out, _ = ngram_run
    if out.name == "both":
        before, after = teach(out, new, tmp_path / "new", "--slots=40")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"pool.values"}
        inspect_slots.main([f"--out_dir={out}", "--recall", "--rows=3"])
        return
    said = refusal(inspect_slots.main, [f"--out_dir={out}", "--recall"], capsys)
    assert "--recall" in said and "no memory layers" in said
    given = [f"--init_from={out}", f"--dataset={new}", f"--out_dir={tmp_path / 'no'}"]
    said = refusal(update.main, given, capsys)
    assert f"init_from={out}" in said and "no memory layers" in said
