"""Training and sampling as a user runs them: real processes, real folders, kills, full disks and wrong input."""

import math
import os
import pickle
import re
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.cuda._utils import _get_device_index

import sample
import train
from data.dataset import open_dataset
from edit import update
from helpers import (
    SMALL,
    SYSTEMS,
    assert_same_checkpoint,
    contents,
    load,
    log_of,
    prepare,
    prepare_here,
    refusal,
    steps_done,
    train_here,
    wait_until,
)
from kernels import lookup
from memory import ValuePool
from model import GPT, GPTConfig
from processes import Process, run_program, run_train, start_program
from runtime.checkpoint import read_checkpoint, save_tensors
from runtime.device import check_memory, choose_device

STEPS = "--max_iters=12 --eval_interval=5 --gradient_accumulation_steps=2".split()
# Its learning rate does not depend on max_iters: any number of its steps is a run of its own.
ENDLESS = "--max_iters=1000000 --eval_interval=5 --learning_rate=1e-3 --min_lr=1e-3".split()
ENDLESS += ["--warmup_iters=2"]


def train_small(data, out, *options):
    train_here(*SMALL, f"--dataset={data}", f"--out_dir={out}", *options)


def resume(out, *options):
    train_here("--resume", f"--out_dir={out}", *options)


def start_training(facts, out):
    """A process that trains until it gets a signal."""
    return start_program("train.py", *SMALL, f"--dataset={facts}", f"--out_dir={out}", *ENDLESS)


def assert_goes_on_as_if_nothing_had_happened(facts, out, folder):
    """The run in out, of ENDLESS: it is resumed, and compared to one that was left alone."""
    steps = load(out / "ckpt.pt")["iter"] + 3
    resume(out, f"--max_iters={steps}")
    train_small(facts, folder / "alone", *ENDLESS, f"--max_iters={steps}")
    assert_same_checkpoint(folder / "alone", out)


# --- runs that end early ----------------------------------------------------------------------------------------------


def test_resume_after_a_kill_is_bitwise_identical(facts, tmp_path):
    out = tmp_path / "out"
    process = start_training(facts, out)
    wait_until((out / "ckpt.pt").exists, process)
    process.kill()
    process.communicate()
    assert load(out / "ckpt.pt")["iter"] % 5 == 0
    with open(out / "log.jsonl", "a") as log:
        log.write('{"it')  # as if the kill had come in the middle of a line
    assert_goes_on_as_if_nothing_had_happened(facts, out, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_resume_is_bitwise_identical(facts, tmp_path, number):
    out = tmp_path / "out"
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={out}", *ENDLESS]
    process = start_program("train.py", *options, "--max_iters=2000000000")
    wait_until(lambda: steps_done(out) >= 12, process)
    process.send_signal(number)
    said, errors = process.communicate()
    assert process.returncode == 128 + number and "Traceback" not in errors, errors
    announced = "Stopping after this step or evaluation, with a checkpoint. A second Ctrl-C"
    assert (announced in errors) == (number == signal.SIGINT)
    assert number.name in said and f"--resume --out_dir={out}" in said
    assert "steps of 64 tokens (2 x 32), an evaluation every 5" in said  # what it will do
    assert re.search(r"Training should take about \d+ days\.", said)
    before_the_first_step = said.split("Training should take")[0]
    assert re.search(r"matrix products alone take about \d+ days", before_the_first_step)
    stopped = load(out / "ckpt.pt")["iter"]
    assert stopped >= 4 and log_of(out)[-1]["iter"] == stopped
    assert_goes_on_as_if_nothing_had_happened(facts, out, tmp_path)


@pytest.mark.parametrize("system", SYSTEMS)
def test_resume_of_each_system_is_bitwise_identical(facts, tmp_path, system, monkeypatch):
    """With values in bfloat16, rounded at random, from the seed and the step: the noise, too, must go on where it stopped. Moments
    stay float32."""
    options = "--mem_dtype=bfloat16", *STEPS, *SYSTEMS[system]
    train_small(facts, tmp_path / "whole", *options)
    kept = copies_of_checkpoints(monkeypatch, tmp_path / "kept")
    train_small(facts, tmp_path / "halved", *options)
    shutil.copy(kept / "5.pt", tmp_path / "halved" / "ckpt.pt")
    resume(tmp_path / "halved")
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "halved")
    checkpoint = load(tmp_path / "halved" / "ckpt.pt")
    tables = [x for name, x in checkpoint["model"].items() if name.endswith("pool.values")]
    assert len(tables) == {"moe": 0, "both": 2}.get(system, 1)
    assert all(table.dtype == torch.bfloat16 for table in tables)
    for table, state in zip(tables, checkpoint["optimizers"][1:], strict=True):
        assert state["state"][0]["means"].dtype == torch.float32
        assert state["state"][0]["means"].shape == table.shape


@pytest.mark.slow
def test_the_demo_is_the_same_twice_and_after_a_resume(facts, tmp_path, monkeypatch):
    kept = copies_of_checkpoints(monkeypatch, tmp_path / "kept")
    demo = [
        f"--dataset={facts}",
        "--device=cpu",
        "--max_iters=8",
        "--eval_interval=4",
        "--eval_iters=1",
    ]
    for name in ("one", "again", "halved"):
        train_here(*demo, f"--out_dir={tmp_path / name}")
    shutil.copy(kept / "4.pt", tmp_path / "halved" / "ckpt.pt")
    resume(tmp_path / "halved")
    assert_same_checkpoint(tmp_path / "one", tmp_path / "again")
    assert_same_checkpoint(tmp_path / "one", tmp_path / "halved")


def copies_of_checkpoints(monkeypatch, folder):
    """Keep each checkpoint that train.py writes, as STEP.pt."""
    folder.mkdir()
    save_tensors = train.save_tensors

    def save_and_copy(path, checkpoint):
        save_tensors(path, checkpoint)
        shutil.copy(path, folder / f"{checkpoint['iter']}.pt")

    monkeypatch.setattr(train, "save_tensors", save_and_copy)
    return folder


def test_micro_steps_add_up_to_the_step_of_a_larger_batch(facts, tmp_path):
    """The same windows, the same mean: only rounding may differ. Eight micro-steps read more rows than the table has."""
    for size in (8, 1):
        options = (
            f"--batch_size={size}",
            f"--gradient_accumulation_steps={8 // size}",
            "--max_iters=12",
            "--warmup_iters=11",
        )
        train_small(facts, tmp_path / str(size), *options, "--mem_layers=0,1", "--mem_keys=8")
    for one, other in zip(log_of(tmp_path / "8"), log_of(tmp_path / "1"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-5)
    one, other = (load(tmp_path / name / "ckpt.pt")["model"] for name in ("8", "1"))
    for name, weights in one.items():
        assert (weights - other[name]).norm() < 1e-3 * weights.norm(), name


def test_a_folder_of_nanogpt_trains_unchanged_and_its_pickle_is_not_read(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50257, (3000,), generator=generator).numpy().astype("<u2")
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"{split}.bin")
    train_small(tmp_path, tmp_path / "out", "--max_iters=3")
    checkpoint = read_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert checkpoint["vocabulary"] == "gpt2"
    assert GPT.from_checkpoint(f"{tmp_path}/out/ckpt.pt").config.vocab_size == 50257
    (tmp_path / "meta.pkl").write_bytes(b"anything")
    said = refusal(
        train.main, [*SMALL, f"--dataset={tmp_path}", f"--out_dir={tmp_path / 'other'}"], capsys
    )
    assert "meta.pkl" in said and "pickle" in said


@pytest.mark.slow
def test_a_preset_trains_on_real_text_and_writes_some(gpt2, wikitext, tmp_path, capsys):
    files = ("--file", wikitext[0], "--val_file", wikitext[1])
    prepare_here("shakespeare", *files, "--encoding=gpt2", "--out", tmp_path)
    small = "--n_layer=2 --n_embd=32 --block_size=32 --batch_size=4 --mem_keys=16 --eval_iters=1 --device=cpu".split()
    folders = (f"--dataset={tmp_path}", f"--out_dir={tmp_path / 'out'}")
    train_here(
        "--preset=shakespeare-memory",
        *folders,
        *small,
        "--max_iters=60",
        "--learning_rate=3e-2",
        "--warmup_iters=3",
        "--log_interval=1",
    )
    log = log_of(tmp_path / "out")
    assert log[-1]["val_loss"] < 9.5 < 10.7 < log[0]["loss"]  # it begins at log 50,257 = 10.8
    capsys.readouterr()
    sample.main([folders[1], "--num_samples=1", "--max_new_tokens=20", "--start= The game"])
    text = capsys.readouterr().out
    assert text.startswith(" The game") and len(text.split()) > 5


def test_resume_refuses_the_state_of_another_optimiser(finished, tmp_path, capsys):
    checkpoint = load(finished / "ckpt.pt")
    checkpoint["optimizers"][1]["state"][0] = {"step": 3, "exp_avg": torch.zeros(3)}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    said = refusal(train.main, ["--resume", f"--out_dir={tmp_path}", "--max_iters=80"], capsys)
    assert "optimisers" in said and "ckpt.pt" in said


def write_without_end(path, checkpoint):
    checkpoint["padding"] = torch.zeros(10_000_000)
    while True:
        save_tensors(path, checkpoint)


def test_a_kill_while_a_checkpoint_is_written_leaves_one_that_loads(finished, tmp_path):
    path = tmp_path / "ckpt.pt"
    half_written = 0
    for _ in range(2):
        process = Process(write_without_end, path, load(finished / "ckpt.pt"))
        temporary = Path(f"{path}.{process.pid}.tmp")
        wait_until(path.exists, process)
        wait_until(lambda file=temporary: size_of(file) > 1_000_000, process)
        process.kill()
        process.communicate()
        half_written += temporary.exists()
        assert read_checkpoint(path)["iter"] == 4
    assert half_written > 0  # at least one of the kills came while it was writing


def size_of(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def train_on_a_full_disk(*arguments):
    """What is written beyond 100,000 bytes fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    run_train(*arguments)


def test_a_full_disk_keeps_the_checkpoint_before(facts, finished, tmp_path):
    new = tmp_path / "new"
    process = Process(train_on_a_full_disk, *SMALL, f"--dataset={facts}", f"--out_dir={new}")
    _, errors = process.communicate()
    assert process.returncode == 1 and f"could not write {new / 'ckpt.pt'}" in errors
    assert "Start again with --overwrite" in errors and "Traceback" not in errors
    assert [path.name for path in new.iterdir()] == ["log.jsonl"]

    old = tmp_path / "old"
    shutil.copytree(finished, old)
    before = (old / "ckpt.pt").read_bytes()
    process = Process(train_on_a_full_disk, "--resume", f"--out_dir={old}", "--max_iters=8")
    _, errors = process.communicate()
    assert process.returncode == 1 and f"could not write {old / 'ckpt.pt'}" in errors
    assert "The last checkpoint is complete: continue with --resume" in errors
    assert (old / "ckpt.pt").read_bytes() == before
    resume(old, "--max_iters=8")


def test_a_diverging_loss_stops_with_a_message_and_keeps_what_was_there(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    diverge = "--max_iters=40 --warmup_iters=0 --learning_rate=1e30 --log_interval=3 --eval_interval=50".split()
    said = refusal(train.main, ["--resume", f"--out_dir={tmp_path / 'out'}", *diverge], capsys)
    assert "training has diverged" in said and "learning_rate (now 1e+30)" in said
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_resume_takes_new_rates_and_the_folder_it_is_given(finished, tmp_path):
    """A copied run goes on where it now lies, with the options of the command line, in both optimisers."""
    before = contents(finished)
    shutil.copytree(finished, tmp_path / "copy")
    rates = "--mem_learning_rate=0.007", "--weight_decay=0.03", "--beta1=0.8"
    resume(tmp_path / "copy", "--max_iters=6", *rates)
    assert contents(finished) == before
    network, pool = load(tmp_path / "copy" / "ckpt.pt")["optimizers"]
    assert [group["weight_decay"] for group in network["param_groups"]] == [0.03, 0.0]
    assert pool["param_groups"][0]["lr"] == 0.007
    assert network["param_groups"][0]["betas"][0] == pool["param_groups"][0]["betas"][0] == 0.8


def test_resume_and_recall_refuse_data_that_have_been_prepared_anew(facts, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(facts, data)
    train_small(data, out, "--max_iters=2")
    assert prepare("--seed=5", "--overwrite", "--out", data).returncode == 0
    for main, options in ((train.main, ["--resume", "--max_iters=4"]), (sample.main, ["--recall"])):
        said = refusal(main, [*options, f"--out_dir={out}"], capsys)
        assert str(data) in said and "trained on" in said


# --- what only a GPU runs, as far as a machine without one carries ----------------------------------------------------


def test_a_gpu_is_named_by_its_index(monkeypatch):
    """torch.cuda.set_device refuses "cuda": PyTorch's own function that reads a device's index says so, no GPU needed."""
    chosen, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device))
    )
    devices = [
        choose_device("cuda"),
        choose_device("auto"),
        choose_device("cuda:2"),
        choose_device("cuda", number=3),
    ]
    assert chosen == [0, 0, 2, 3] and [device.index for device in devices] == chosen


def test_a_model_is_built_on_its_device_and_a_table_that_is_loaded_is_not_drawn(
    finished, monkeypatch
):
    config = GPTConfig(mem_count=3, mem_keys=4096)  # 51 GB, were they drawn on the CPU
    with torch.device("meta"):
        model = GPT(config)
    check_memory(model, torch.device("meta"))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    want = load(finished / "ckpt.pt")["model"]
    monkeypatch.setattr(ValuePool, "initialize", None)
    got = GPT.from_checkpoint(finished / "ckpt.pt").state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


# --- what a run reports -----------------------------------------------------------------------------------------------


def test_the_log_says_what_happened(facts, tmp_path):
    train_small(facts, tmp_path, *STEPS)
    log = log_of(tmp_path)
    assert [line["iter"] for line in log] == list(range(1, 13))
    evaluations = [line for line in log if "val_loss" in line]
    assert [line["iter"] for line in evaluations] == [5, 10, 12]
    names = {"train_loss", "val_loss", "recall", "mem_used", "mem_kl", "mem_top1"}
    assert names <= evaluations[-1].keys()
    first, *_, last = [line["val_loss"] for line in evaluations]
    assert last < first < 8.0  # log(1712) + 0.5: logits of spread 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_model_learns_facts_and_sample_asks_for_them(facts, tmp_path, capsys, dtype):
    """Nine people in 100 steps. The table that sample.py prints must agree with what training logged."""
    rates = "--learning_rate=8e-3 --mem_learning_rate=1e-2 --eval_interval=100 --log_interval=50".split()
    size = "--n_embd=64 --block_size=64 --batch_size=16 --max_iters=100".split()
    train_small(facts, tmp_path, *rates, *size, f"--mem_dtype={dtype}")
    recall = log_of(tmp_path)[-1]["recall"]
    said = capsys.readouterr().out
    assert f"recall       {recall:.1%} of 54 closed-book questions" in said
    assert f"python sample.py --out_dir={tmp_path} --recall" in said
    assert recall > 0.5  # chance is below 1%

    sample.main([f"--out_dir={tmp_path}", "--recall", "--rows=0", "--device=cpu"])
    asked = capsys.readouterr().out.splitlines()
    rows = [line for line in asked if line.endswith(("right", "wrong"))]
    assert len(rows) == 54 and sum(row.endswith("right") for row in rows) == round(recall * 54)
    for row in rows:
        _, expected, got, verdict = re.split(r"\s{2,}", row)
        assert (expected == got) == (verdict == "right"), row
    assert asked[-1].split() == ["all", f"{recall:.1%}", "of", "54"]


def test_a_run_that_finetunes_reports_what_it_learns_and_what_it_forgets(
    facts, finished, tmp_path, capsys
):
    """All weights change; the run that it begins with stays as it is."""
    assert prepare("--new=5", "--out", tmp_path / "new").returncode == 0
    before = contents(finished)
    options = ("--max_iters=4", "--eval_interval=2", "--warmup_iters=1")
    folders = (
        f"--init_from={finished}",
        f"--dataset={tmp_path / 'new'}",
        f"--out_dir={tmp_path / 'out'}",
    )
    train_here(*folders, *options)
    assert contents(finished) == before
    said = capsys.readouterr().out
    first, *_, last = log_of(tmp_path / "out")
    price = (
        f"{last['old_val_loss']:.3f} validation (nats a token), {first['old_val_loss']:.3f} before"
    )
    assert f"old loss     {price}" in said and "% before\n" in said
    assert first["iter"] == 0 and last["iter"] == 4 and last["val_loss"] < first["val_loss"]
    assert {"recall", "old_recall", "old_val_loss"} <= first.keys() & last.keys()
    assert first["old_val_loss"] == pytest.approx(log_of(finished)[-1]["val_loss"], rel=1e-5)
    one, two = (load(folder / "ckpt.pt")["model"] for folder in (finished, tmp_path / "out"))
    assert not any(torch.equal(one[name], two[name]) for name in one)


# --- sampling ---------------------------------------------------------------------------------------------------------


def sample_with_input(path, *arguments):
    """python sample.py ARGUMENTS < PATH"""
    os.dup2(os.open(path, os.O_RDONLY), 0)
    run_program("sample.py", *arguments)


def test_sample_goes_on_from_argument_file_and_standard_input(finished, tmp_path, capsys):
    options = [f"--out_dir={finished}", "--max_new_tokens=20", "--num_samples=2", "--device=cpu"]
    start = "Tin was born in"
    file = tmp_path / "start.txt"
    file.write_text(start)

    def said(*more):
        sample.main([*options, *more])
        return capsys.readouterr()

    by_argument = said(f"--start={start}")
    assert by_argument.out.count(start) == 2 and "tokens/s" in by_argument.err
    assert said(f"--start=FILE:{file}").out == by_argument.out
    by_input, _ = Process(sample_with_input, file, *options, "--start=-").communicate()
    assert by_input == by_argument.out
    assert said(f"--start={start}", "--seed=2").out != by_argument.out


@pytest.mark.parametrize("ended_by", ["Ctrl-C", "the reader"])
def test_sample_streams_what_it_generates_and_ends_quietly(finished, tmp_path, ended_by):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    options = [f"--out_dir={finished}", "--max_new_tokens=1000000", "--device=cpu"]
    process = start_program("sample.py", *options, stdout=pipe)
    with open(pipe) as reader:
        assert len(reader.read(300)) == 300  # long before the end
        assert process.poll() is None
        if ended_by == "Ctrl-C":
            process.send_signal(signal.SIGINT)
            reader.read()
    _, errors = process.communicate()
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert process.returncode == (130 if ended_by == "Ctrl-C" else 0)


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (["--mem_key=32"], ["--mem_key=32"]),
        (["extra"], ["extra"]),
        (["--n_layer=two"], ["--n_layer", "two"]),
        (["--mem_gate=perhaps"], ["--mem_gate", "perhaps"]),
        (["--mem_layers=1,x"], ["--mem_layers", "1,x"]),
        (["--preset=nothing"], ["--preset", "nothing", "facts-memory"]),
        (["--n_embd=30", "--n_head=4"], ["n_embd=30", "n_head=4"]),
        (["--mem_topk=99"], ["mem_topk=99", "mem_keys=16"]),
        (["--mem_layers=2"], ["no block 2", "0 to 1"]),
        (["--batch_size=0"], ["batch_size=0"]),
        (["--mem_keys=9999999"], ["does not fit", "mem_keys"]),
        (["--seed=99999999999999999999"], ["seed=99999999999999999999"]),
        (["--mem_learning_rate=0"], ["mem_learning_rate=0"]),
        (["--learning_rate=-1"], ["learning_rate=-1"]),
        (["--learning_rate=nan"], ["learning_rate=nan"]),
        (["--device=tpu9"], ["device=tpu9", "device=cpu"]),
        (["--dtype=int8"], ["dtype=int8", "bfloat16"]),
        (["--block_size=100000"], ["too few for block_size=100000"]),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_written(facts, tmp_path, capsys, options, words):
    said = refusal(
        train.main,
        [f"--dataset={facts}", f"--out_dir={tmp_path / 'out'}", *SMALL, *options],
        capsys,
    )
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_a_missing_or_broken_dataset_is_named(facts, tmp_path, capsys):
    def refused(folder, *words):
        said = refusal(
            train.main, [f"--dataset={folder}", f"--out_dir={tmp_path / 'out'}", *SMALL], capsys
        )
        assert all(word in said for word in words), said

    refused(tmp_path / "nowhere", "there is no dataset", "nowhere", "prepare.py --file=TEXT")
    (tmp_path / "unprepared").mkdir()
    (tmp_path / "unprepared" / "prepare.py").touch()
    refused(tmp_path / "unprepared", "train.bin", f"run: python {tmp_path / 'unprepared'}")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in facts.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    for content, words in (
        (b"", ["0 bytes"]),
        (b"\1\0\1", ["3 bytes"]),
        (b"\xff\xff" * 99, ["token id 65535", "1711"]),
    ):
        (broken / "train.bin").write_bytes(content)
        refused(broken, str(broken / "train.bin"), *words)
    assert not (tmp_path / "out").exists()


def test_an_occupied_folder_is_not_overwritten_unasked(facts, finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = contents(out)
    said = refusal(train.main, [*SMALL, f"--dataset={facts}", f"--out_dir={out}"], capsys)
    assert all(word in said for word in ("holds a run already", "--resume", "--overwrite"))
    assert contents(out) == before
    train_small(facts, out, "--max_iters=3", "--overwrite")
    assert [line["iter"] for line in log_of(out)] == [1, 2, 3]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--n_embd=64"], ["n_embd=64", "n_embd=32"]),
        (["--seed=9"], ["seed=9", "seed=1"]),
        (["--batch_size=8"], ["batch_size=8", "batch_size=2"]),
        (["--preset=facts-dense"], ["preset"]),
        (["--mem_count=0"], ["mem_count=0", "mem_count=1"]),
        ([], ["complete at step 4", "max_iters"]),
    ],
)
def test_resume_refuses_what_would_make_it_another_run(finished, capsys, options, words):
    before = (finished / "ckpt.pt").read_bytes()
    said = refusal(train.main, ["--resume", f"--out_dir={finished}", *options], capsys)
    assert all(word in said for word in words), said
    assert (finished / "ckpt.pt").read_bytes() == before


class Boom:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def wrong_checkpoints(good, folder):
    """(name, contents, words of the message) of files that are not to be loaded."""
    whole = load(good)
    yield "truncated", good.read_bytes()[:-1000], ["damaged"]
    yield "empty", b"", ["ckpt.pt"]
    yield "text", b"These are not weights.", ["not a checkpoint"]
    yield "code", pickle.dumps(Boom(folder / "executed")), ["not a checkpoint"]
    yield (
        "code in a zip",
        {"format": "nanomem-5", "model": Boom(folder / "executed")},
        ["was not loaded"],
    )
    yield "another program's", {"state_dict": {}}, ["not a checkpoint of this version of nanomem"]
    yield "wider", whole | {"model_config": whole["model_config"] | {"n_embd": 64}}, ["do not fit"]
    yield (
        "from the future",
        whole | {"model_config": whole["model_config"] | {"n_wings": 2}},
        ["do not fit", "n_wings"],
    )
    yield (
        "without weights",
        {name: value for name, value in whole.items() if name != "model"},
        ["do not fit"],
    )


def test_a_checkpoint_that_is_not_one_is_refused_and_never_executed(finished, tmp_path, capsys):
    for name, content, words in wrong_checkpoints(finished / "ckpt.pt", tmp_path):
        path = tmp_path / name / "ckpt.pt"
        path.parent.mkdir()
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = path.read_bytes()
        with pytest.raises(ValueError) as caught:
            GPT.from_checkpoint(path)
        assert str(path) in str(caught.value) and all(
            word in str(caught.value) for word in words
        ), f"{name}: {caught.value}"
        if name in ("truncated", "code", "wider"):
            said = refusal(sample.main, [f"--out_dir={path.parent}"], capsys)
            assert all(word in said for word in (str(path), *words)), said
        if name in ("truncated", "code"):
            said = refusal(train.main, ["--resume", f"--out_dir={path.parent}"], capsys)
            assert all(word in said for word in (str(path), *words)), said
        assert path.read_bytes() == before
    assert not (tmp_path / "executed").exists()
    said = refusal(sample.main, [f"--out_dir={tmp_path / 'nowhere'}"], capsys)
    assert "no checkpoint" in said and "nowhere" in said


def test_a_checkpoint_of_an_older_version_is_refused_by_name(facts, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "old")
    path = tmp_path / "old" / "ckpt.pt"
    checkpoint = load(path)
    checkpoint["format"] = "nanomem-3"
    torch.save(checkpoint, path)
    before = contents(tmp_path)
    old = path.parent
    new = [f"--init_from={old}", f"--dataset={facts}", f"--out_dir={tmp_path / 'new'}"]
    for main, options in (
        (train.main, ["--resume", f"--out_dir={old}", "--max_iters=8"]),
        (train.main, new),
        (sample.main, [f"--out_dir={old}"]),
        (update.main, new),
    ):
        said = refusal(main, options, capsys)
        assert str(path) in said and "not a checkpoint of this version" in said
        assert "its format is 'nanomem-3'" in said and said.count("\n") == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "options, words",
    [
        (["--temperature=-1"], ["--temperature"]),
        (["--top_p=2"], ["--top_p"]),
        (["--num_samples=none"], ["--num_samples"]),
        (["--start=FILE:nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_sample_names_a_wrong_option(finished, capsys, options, words):
    said = refusal(sample.main, [f"--out_dir={finished}", *options], capsys)
    assert all(word in said for word in words), said


def test_recall_needs_questions(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Once upon a time. " * 500)
    prepare_here("shakespeare", "--file", tmp_path / "text.txt", "--out", tmp_path / "text")
    train_small(tmp_path / "text", tmp_path / "out", "--max_iters=2")
    assert "recall.jsonl" in refusal(
        sample.main, [f"--out_dir={tmp_path / 'out'}", "--recall"], capsys
    )
    sample.main([f"--out_dir={tmp_path / 'out'}", "--max_new_tokens=5", "--device=cpu"])


def test_a_run_that_finetunes_has_a_folder_of_its_own_and_outlives_its_parent(
    facts, finished, tmp_path
):
    """And no other default than the update of the same data."""
    given = {"init_from": str(finished), "dataset": str(facts)}
    options = train.complete_options(given)
    assert options["out_dir"] == "out/facts-finetuned"
    assert train.make_configs(options, train.TrainConfig, GPTConfig)[0].background == str(facts)
    parent, out = tmp_path / "parent", tmp_path / "out"
    shutil.copytree(finished, parent)
    train_here(f"--init_from={parent}", f"--dataset={facts}", f"--out_dir={out}", "--max_iters=2")
    shutil.rmtree(parent)
    train_here("--resume", f"--out_dir={out}", "--max_iters=3")
    last = log_of(out)[-1]
    assert last["iter"] == 3 and "old_val_loss" in last


# --- the steps themselves ---------------------------------------------------------------------------------------------


def test_training_equals_a_loop_written_down_once_more(facts, tmp_path):
    """PyTorch's own AdamW and SparseAdam, the norm clipped by hand, both learning rates from the formulas in the help texts."""
    steps, warmup, largest, smallest, values_rate, clip = 6, 2, 1e-2, 1e-3, 5e-3, 0.5
    train_small(
        facts, tmp_path, f"--max_iters={steps}", f"--warmup_iters={warmup}", f"--learning_rate={largest}",
        f"--min_lr={smallest}", f"--mem_learning_rate={values_rate}", "--mem_decay=4", f"--grad_clip={clip}", "--weight_decay=0.3",
    )  # fmt: skip
    got = GPT.from_checkpoint(tmp_path / "ckpt.pt")
    torch.manual_seed(1)
    model = GPT(got.config)
    values = model.pool.values
    model.pool.lookup = partial(lookup, values)  # autograd's own gradient, sparse
    network = [p for p in model.parameters() if p is not values]
    options = dict(lr=1.0, betas=(0.9, 0.98), eps=1e-15)
    groups = [
        {"params": [p for p in network if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in network if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw, sparse = (
        torch.optim.AdamW(groups, **options),
        torch.optim.SparseAdam([values], **options),
    )
    windows = open_dataset(facts, 32, 1)["train"]

    def cosine(t, top):
        if t < warmup:
            return top * (t + 1) / (warmup + 1)
        share = (t - warmup) / (steps - warmup)
        return smallest + (top - smallest) * (1 + math.cos(math.pi * share)) / 2

    clipped = []
    for t in range(steps):
        ids = torch.from_numpy(windows.windows([2 * t, 2 * t + 1]))
        loss = F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
        assert loss.item() == pytest.approx(log_of(tmp_path)[t]["loss"], abs=1e-4)
        assert log_of(tmp_path)[t]["lr"] == pytest.approx(cosine(t, largest))
        model.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in network).sqrt()
        clipped.append(norm > clip)
        for p in network:
            p.grad *= min(1.0, clip / norm)
        for group in adamw.param_groups:
            group["lr"] = cosine(t, largest)
        sparse.param_groups[0]["lr"] = cosine(t, values_rate) * (4 - 3 * t / steps)
        adamw.step()
        sparse.step()
    assert any(clipped)
    for (name, a), b in zip(got.named_parameters(), model.parameters(), strict=True):
        assert (a - b).norm() < 1e-3 * b.norm(), name


def test_recall_is_the_share_of_answers_that_are_right_to_the_last_token():
    class Model:
        def complete(self, prompts, lengths):
            assert prompts == [[0, 7], [0, 8], [0, 9]] and lengths == [2, 1, 2]
            return [[1, 2], [3], [4, 9]]

    asked = [(7, [1, 2]), (8, [3]), (9, [4, 5])]
    questions = [{"prompt_ids": [prompt], "answer_ids": answer} for prompt, answer in asked]
    assert train.recall(Model(), questions, separator=0) == 2 / 3
