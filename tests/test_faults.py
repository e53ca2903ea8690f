"""Nothing lost, nobody surprised: what runs, folders and programs do when disks, signals, files and people are unkind."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sample
import train
from data.dataset import Dataset, open_dataset
from helpers import (
    ROOT,
    SMALL,
    assert_refused,
    children,
    contents,
    load,
    log_of,
    prepare_here,
    refusal,
    run,
    steps_done,
    train_here,
    wait_for_end,
    wait_until,
)
from processes import Process, run_train, start_program, start_torchrun
from runtime.device import choose_device, memory_of

TEXT = "One thing after another. " * 400
ENDLESS = ["--max_iters=100000", "--eval_interval=100000"]
TWO_STEPS = "--gradient_accumulation_steps=2"  # one for each rank


# --- what could be lost -----------------------------------------------------------------------------------------------


def test_a_run_removes_what_a_run_has_written_and_nothing_else(facts, tmp_path):
    others = ["ckpt-from-friend.pt", "best-of-all.pt", "draft.tmp", "ckpt.pt.old.tmp"]
    for name in others:
        (tmp_path / name).write_text(name)
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path}", "--max_iters=1"]
    train_here(*options)
    for name in ("ckpt.pt.77.tmp", "log.jsonl.7.tmp"):
        (tmp_path / name).write_text(name)
    train_here(*options, "--overwrite")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted([*others, "ckpt.pt", "log.jsonl"])
    assert all((tmp_path / name).read_text() == name for name in others)


def test_a_folder_without_a_name_is_not_the_current_one(facts, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    monkeypatch.chdir(tmp_path)
    said = refusal(train.main, [*SMALL, f"--dataset={facts}", "--out_dir="], capsys)
    assert "out_dir=: must name a folder" in said
    with pytest.raises(SystemExit):
        prepare_here("facts", "--out=")
    assert "--out: must name a folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def prepare_until_signal(number, files, kind, *arguments):
    """prepare.py, which gets a signal when it has written so many files, and would name the next."""
    replace = os.replace
    written = []

    def replace_or_end(*paths):
        if len(written) == files:
            os.kill(os.getpid(), number)
        written.append(paths)
        replace(*paths)

    os.replace = replace_or_end
    prepare_here(kind, *arguments)


@pytest.mark.parametrize(
    "program",
    ["facts", "shakespeare", pytest.param("shakespeare --encoding=gpt2", marks=pytest.mark.slow)],
)
def test_a_dataset_is_whole_or_refused_at_whatever_file_a_kill_comes(request, tmp_path, program):
    if "gpt2" in program:
        request.getfixturevalue("gpt2")
    (tmp_path / "text").write_text(TEXT)
    kind, *options = program.split()
    options += ["--people=9"] if kind == "facts" else [f"--file={tmp_path / 'text'}"]
    whole = tmp_path / "whole"
    prepare_here(kind, *options, "--out", whole)
    for files in range(9):
        out = tmp_path / f"out{files}"
        process = Process(prepare_until_signal, signal.SIGKILL, files, kind, *options, "--out", out)
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        with pytest.raises((ValueError, FileNotFoundError), match=r"prepare\.py|give a dataset"):
            open_dataset(out, 32, 0)
        prepare_here(kind, *options, "--out", out)  # no need of --overwrite
        assert files_in(out) == files_in(whole)
    assert files >= 3


def files_in(folder):
    return {path.name: content for path, content in contents(folder).items()}


def test_ctrl_c_ends_prepare_py_quietly(tmp_path):
    out = tmp_path / "data"
    process = Process(prepare_until_signal, signal.SIGINT, 0, "facts", "--people=9", "--out", out)
    _, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors
    assert contents(out) == {}


def test_a_dataset_that_lacks_its_meta_json_is_not_taken_for_one_of_nanogpt(facts, tmp_path):
    shutil.copytree(facts, tmp_path / "data")
    (tmp_path / "data" / "meta.json").unlink()
    with pytest.raises(ValueError, match="half made"):
        Dataset(tmp_path / "data")


def test_a_dataset_is_not_replaced_unasked(facts, tmp_path, capsys):
    out = tmp_path / "data"
    shutil.copytree(facts, out)
    (tmp_path / "text").write_text(TEXT)
    text = ("shakespeare", f"--file={tmp_path / 'text'}", "--out", out)
    for command in (text, ("facts", "--people=9", "--seed=4", "--out", out)):
        with pytest.raises(SystemExit) as ended:
            prepare_here(*command)
        words = ("holds a dataset already", "--overwrite", "--out")
        assert all(word in str(ended.value.code) for word in words)
    assert files_in(out) == files_in(facts)
    prepare_here(*text, "--overwrite")
    assert Dataset(out).vocab_size == 256 and not (out / "recall.jsonl").exists()


def test_of_two_prepare_py_at_once_one_makes_the_dataset(tmp_path):
    out = tmp_path / "both"
    out.mkdir()
    command = ["data/facts/prepare.py", "--people=300"]
    both = [start_program(*command, f"--seed={seed}", "--out", out) for seed in (1, 2)]
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1] and "holds a dataset already" in said[codes.index(1)], said
    seed = codes.index(0) + 1
    prepare_here("facts", "--people=300", f"--seed={seed}", "--out", tmp_path / "alone")
    assert files_in(out) == files_in(tmp_path / "alone")


def test_two_runs_do_not_share_a_folder(facts, tmp_path, capsys):
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path}"]
    first = start_program("train.py", *options, "--max_iters=100000")
    wait_until((tmp_path / "ckpt.pt").exists, first)
    for other in (options, [*options, "--overwrite"], ["--resume", f"--out_dir={tmp_path}"]):
        said = refusal(train.main, other, capsys)
        assert f"another process is at work in {tmp_path}" in said
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert first.returncode == 128 + signal.SIGTERM
    iters = [line["iter"] for line in log_of(tmp_path)]
    assert iters == list(range(1, len(iters) + 1))
    assert load(tmp_path / "ckpt.pt")["iter"] == iters[-1]


def test_a_folder_is_locked_before_its_checkpoint_is_read(finished, tmp_path, monkeypatch):
    """Or the run that still writes to it would lose what it saves meanwhile."""
    out = tmp_path / "out"
    later = tmp_path / "later"
    shutil.copytree(finished, out)
    shutil.copytree(finished, later)
    train_here("--resume", f"--out_dir={later}", "--max_iters=6")
    lock_folder = train.lock_folder

    def wait_for_the_other(folder):  # which saves once more
        shutil.copy(later / "ckpt.pt", out)
        lock_folder(folder)

    monkeypatch.setattr(train, "lock_folder", wait_for_the_other)
    train_here("--resume", f"--out_dir={out}", "--max_iters=7")
    assert [line["iter"] for line in log_of(out)] == [1, 2, 3, 4, 7]


def test_weights_that_are_no_numbers_are_not_saved(finished, tmp_path, monkeypatch, capsys):
    """A signal comes in the step that diverges: its loss was fine."""
    shutil.copytree(finished, tmp_path / "out")
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    make = train.make_optimizers

    def make_optimizers(model, config):
        def spoil(*_):
            model.norm.weight.data[0] = float("nan")
            os.kill(os.getpid(), signal.SIGTERM)

        optimizers = make(model, config)
        optimizers[0].register_step_post_hook(spoil)
        return optimizers

    monkeypatch.setattr(train, "make_optimizers", make_optimizers)
    arguments = ["--resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=9", "--eval_interval=9"]
    said = refusal(train.main, arguments, capsys)
    assert "largest weight is nan" in said
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


# --- torchrun ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_to_torchrun_and_to_all_its_processes_saves(facts, tmp_path):
    """As a scheduler sends it. Each process gets it twice, the other time from torchrun."""
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path}", *ENDLESS, TWO_STEPS]
    options.append("--batch_size=200")  # steps long enough for both to arrive in one
    job = start_torchrun(2, "train.py", *options)
    wait_until(lambda: steps_done(tmp_path) > 1, job)
    for process in (*children(job), job.pid):
        os.kill(process, signal.SIGTERM)
    said, errors = job.communicate(timeout=60)
    step = load(tmp_path / "ckpt.pt")["iter"]
    assert said.count(f"Stopped by SIGTERM after step {step}") == 1, errors
    assert steps_done(tmp_path) == step


@pytest.mark.slow
def test_processes_do_not_outlive_a_torchrun_that_is_killed_early(facts, tmp_path):
    """While they import: later, the next test."""
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path}", *ENDLESS, TWO_STEPS]
    job = start_torchrun(2, "train.py", *options)
    wait_until(lambda: len(children(job)) == 2, job)
    time.sleep(0.5)  # Python has begun
    processes = children(job)
    job.kill()
    wait_for_end(processes, 30)
    job.communicate()


@pytest.mark.slow
def test_sampling_while_a_sharded_run_saves(facts, tmp_path, capsys):
    """The file is replaced by another: a reader has the whole of one of them."""
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path}", "--memory_parallel=2"]
    options += [TWO_STEPS, "--eval_interval=1", "--max_iters=100000"]
    job = start_torchrun(2, "train.py", *options)
    wait_until((tmp_path / "ckpt.pt").exists, job)
    steps = set()
    while len(steps) < 6 and job.poll() is None:
        sample.main([f"--out_dir={tmp_path}", "--num_samples=1", "--max_new_tokens=1"])
        steps.add(load(tmp_path / "ckpt.pt")["iter"])
    assert len(steps) == 6
    processes = children(job)
    job.kill()  # torchrun itself: its processes save and end
    job.communicate()
    wait_for_end(processes, 10)
    assert steps_done(tmp_path) == load(tmp_path / "ckpt.pt")["iter"]


# --- full disks, short memory -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size):
    """What this process writes beyond it fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_names_the_file_that_could_not_be_written(facts, finished, tmp_path, capsys):
    out = tmp_path / "out"
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={out}", *ENDLESS]
    with largest_file(1000):
        said = refusal(train.main, options, capsys)
    assert f"could not write {out / 'log.jsonl'}" in said and "Start again with --overwrite" in said
    with largest_file(9000), pytest.raises(SystemExit) as ended:
        prepare_here("facts", "--people=9", "--out", tmp_path / "data")
    assert f"{tmp_path / 'data'}/" in ended.value.code and "File too large" in ended.value.code
    (tmp_path / "text").write_text(TEXT)
    for option in ("--encoding=bytes", f"--vocabulary_of={finished}"):
        text = [f"--file={tmp_path / 'text'}", option, "--out", tmp_path / "data"]
        with largest_file(1000), pytest.raises(SystemExit) as ended:
            prepare_here("shakespeare", *text)
        assert f"could not write to {tmp_path / 'data'} (File too large)" in ended.value.code


@pytest.mark.parametrize("size", [50_000, 200_000])  # too small for the log, for the checkpoint
def test_a_full_disk_leaves_the_checkpoint_that_was_there(finished, tmp_path, capsys, size):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "log.jsonl").write_text("#" * 100_000 + "\n")
    checkpoint = (tmp_path / "out" / "ckpt.pt").read_bytes()
    before = contents(tmp_path / "out")
    assert size < len(checkpoint)
    resume = ["--resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=9"]
    with largest_file(size):
        said = refusal(train.main, resume, capsys)
    if size == 50_000:
        assert f"could not write {tmp_path / 'out' / 'log.jsonl'}" in said
        assert contents(tmp_path / "out") == before
    else:
        assert f"could not write {tmp_path / 'out' / 'ckpt.pt'}" in said
        assert "continue with --resume" in said
        assert (tmp_path / "out" / "ckpt.pt").read_bytes() == checkpoint
        assert len(contents(tmp_path / "out")) == len(before)  # no temporary file


def train_in_little_memory(*arguments):
    """In a quarter of a GiB more than there is now."""
    with open("/proc/self/statm") as f:
        pages = int(f.read().split()[0])
    size = pages * resource.getpagesize() + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    run_train(*arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_is_short_names_the_options_to_lower(facts, tmp_path):
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path}", "--batch_size=2000"]
    process = Process(train_in_little_memory, *options)
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors
    words = ("train.py: out of memory", "lower --batch_size", "block_size")
    assert all(word in errors for word in words), errors


def allocate_more_than_there_is():
    """Without touching it: Linux kills a process only when it does."""
    choose_device("cpu")
    swap = 1024 * int(re.search(r"SwapTotal: *(\d+)", Path("/proc/meminfo").read_text())[1])
    blocks = []
    for _ in range((memory_of(torch.device("cpu")) + swap) // 2**30):
        blocks.append(torch.empty(2**30, dtype=torch.uint8))
    print(f"got {len(blocks)}")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is limited")
def test_an_allocation_beyond_the_memory_fails_instead_of_the_process():
    said, errors = Process(allocate_more_than_there_is).communicate()
    assert "got" not in said and "can't allocate memory" in errors


@pytest.mark.slow
def test_a_checkout_that_cannot_be_written_to_says_where_facts_can_be_made(tmp_path):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    with largest_file(10):
        done = run(tmp_path / "train.py", f"--out_dir={tmp_path / 'out'}")
    assert_refused(done, "prepare.py: ", "File too large")
    assert_refused(done, "train.py: ", "data/facts could not be made", "--out FOLDER")


# --- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "-I train.py OPTIONS >&- <&- 2>/dev/full",
        "train.py OPTIONS 2>&- | true",
        "-I sample.py --out_dir=RUN --max_new_tokens=9 --num_samples=1 2>&- >NAME.txt",
        "data/facts/prepare.py --people=9 --out OUT 2>&- >/dev/full",
    ],
)
def test_closed_and_full_streams_and_a_strict_path_end_nothing(facts, finished, tmp_path, command):
    options = " ".join([*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path / 'out'}"])
    words = {
        "OPTIONS": options,
        "RUN": finished,
        "OUT": tmp_path / "data",
        "NAME": tmp_path / "said",
    }
    for word, value in words.items():
        command = command.replace(word, str(value))
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {command}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    if "train.py" in command:
        assert load(tmp_path / "out" / "ckpt.pt")["iter"] == 4
        assert steps_done(tmp_path / "out") == 4
    elif "prepare.py" in command:
        assert Dataset(tmp_path / "data").questions()
    else:
        assert len((tmp_path / "said.txt").read_text()) > 9


def test_a_sample_that_cannot_be_printed_is_an_error(finished):
    process = start_program("sample.py", f"--out_dir={finished}", stdout="/dev/full")
    _, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors and "Exception" not in errors
    assert "sample.py: standard output" in errors and "No space left" in errors
