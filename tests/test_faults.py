"""Nothing lost, nobody surprised: what runs, folders and programs do when disks, signals, files and people are unkind."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

import train
from data.dataset import Dataset, open_dataset
from helpers import (
    ROOT,
    SMALL,
    TORCHRUN,
    assert_refused,
    children,
    contents,
    handlers,
    prepare,
    refusal,
    run,
    start,
    steps_done,
    wait_for_end,
    wait_until,
)

# --- what could be lost -----------------------------------------------------------------------------------------------


def test_a_run_removes_what_a_run_has_written_and_nothing_else(facts, finished, tmp_path):
    mine = ["ckpt-from-friend.pt", "best-of-all.pt", "draft.tmp", "ckpt.pt.old.tmp"]
    for name in mine:
        (tmp_path / name).write_text(name)
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path}", "--max_iters=1"]
    assert run("train.py", *options).returncode == 0
    for name in ("ckpt.pt.77.tmp", "log.jsonl.7.tmp"):
        (tmp_path / name).write_text(name)
    assert run("train.py", *options, "--overwrite").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*mine, "ckpt.pt", "log.jsonl"]
    )
    assert all((tmp_path / name).read_text() == name for name in mine)
    before = contents(tmp_path)
    for command in (
        ["train.py", *SMALL, f"--dataset={facts}", "--out_dir="],
        ["data/facts/prepare.py", "--out="],
    ):
        done = subprocess.run(
            [sys.executable, ROOT / command[0], *command[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert_refused(done, "out", "must name a folder")
    assert contents(tmp_path) == before


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
replace, left = os.replace, [int(sys.argv.pop(1))]
def killed(*paths):
    left[0] -= 1
    os.kill(os.getpid(), signal.SIGKILL) if left[0] < 0 else replace(*paths)
os.replace = killed
{program}
"""


@pytest.mark.parametrize("program", ["facts", "shakespeare", "shakespeare --encoding=gpt2"])
def test_a_dataset_is_whole_or_refused_at_whatever_file_a_kill_comes(request, tmp_path, program):
    if "gpt2" in program:
        request.getfixturevalue("gpt2")
    name, *options = program.split()
    (tmp_path / "text").write_text("One thing after another. " * 400)
    options += ["--people=9"] if name == "facts" else [f"--file={tmp_path / 'text'}"]
    killed = KILLED.format(root=str(ROOT), program=f"import data.{name}.prepare as p; p.main()")
    assert run(f"data/{name}/prepare.py", *options, "--out", tmp_path / "whole").returncode == 0
    for kills in range(9):
        out = tmp_path / "out"
        done = run("-c", killed, kills, *options, "--out", out)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        with pytest.raises(
            (ValueError, FileNotFoundError), match=r"prepare\.py|must name a folder"
        ):
            open_dataset(out, 32, 0)
        assert (
            run(f"data/{name}/prepare.py", *options, "--out", out).returncode == 0
        )  # no need of --overwrite
        assert {path.name: text for path, text in contents(out).items()} == {
            path.name: text for path, text in contents(tmp_path / "whole").items()
        }
        shutil.rmtree(out)
    assert kills >= 3


def test_a_dataset_that_lacks_its_meta_json_is_not_taken_for_one_of_nanogpt(facts, tmp_path):
    shutil.copytree(facts, tmp_path / "data")
    (tmp_path / "data" / "meta.json").unlink()
    with pytest.raises(ValueError, match="half made"):
        Dataset(tmp_path / "data")


def test_a_dataset_is_not_replaced_unasked(facts, tmp_path):
    shutil.copytree(facts, tmp_path / "data")
    (tmp_path / "text").write_text("One thing after another. " * 400)
    text = (
        "data/shakespeare/prepare.py",
        f"--file={tmp_path / 'text'}",
        "--out",
        tmp_path / "data",
    )
    for done in (run(*text), prepare("--seed=4", "--out", tmp_path / "data")):
        assert_refused(done, "holds a dataset already", "--overwrite", "--out")
    assert [*contents(tmp_path / "data").values()] == [*contents(facts).values()]
    assert run(*text, "--overwrite").returncode == 0
    assert (
        Dataset(tmp_path / "data").vocab_size == 256
        and not (tmp_path / "data" / "recall.jsonl").exists()
    )


def test_two_runs_do_not_share_a_folder(facts, tmp_path):
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path}"]
    first = start(sys.executable, "train.py", *options, "--max_iters=100000")
    wait_until((tmp_path / "ckpt.pt").exists, first)
    for other in (options, [*options, "--overwrite"], ["--resume", f"--out_dir={tmp_path}"]):
        assert_refused(run("train.py", *other), f"another process is at work in {tmp_path}")
    first.send_signal(signal.SIGTERM)
    assert first.communicate(timeout=60) and first.returncode == 128 + signal.SIGTERM
    iters = [json.loads(line)["iter"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (
        iters == list(range(1, len(iters) + 1))
        and train.load_checkpoint(tmp_path / "ckpt.pt")["iter"] == iters[-1]
    )


def test_a_folder_is_held_before_its_checkpoint_is_read(finished, tmp_path, monkeypatch):
    """Or the run that still writes to it would lose what it saves meanwhile."""
    order = []
    shutil.copytree(finished, tmp_path / "out")
    for name in ("hold", "load_checkpoint"):
        original = getattr(train, name)
        monkeypatch.setattr(
            train, name, lambda *a, f=original, n=name, **k: order.append(n) or f(*a, **k)
        )
    with handlers():
        train.main(["--resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=5"])
    assert order[:2] == ["hold", "load_checkpoint"]


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
    assert "largest weight is nan" in said and (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_of_two_prepare_py_at_once_one_makes_the_dataset(tmp_path):
    program = [sys.executable, "data/facts/prepare.py", "--people=300", "--out", tmp_path / "both"]
    programs = [[*program[:2], f"--seed={seed}", *program[2:]] for seed in (1, 2)]
    (tmp_path / "both").mkdir()
    both = [start(*program) for program in programs]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    winner = programs[[process.returncode for process in both].index(0)]
    assert start(*winner[:-1], tmp_path / "alone").wait(60) == 0
    assert [*contents(tmp_path / "both").values()] == [*contents(tmp_path / "alone").values()]


def test_sigterm_to_torchrun_and_to_all_its_processes_saves(facts, tmp_path):
    """As a scheduler sends it. Each process gets it twice, the other time from torchrun."""
    options = [
        *SMALL,
        f"--dataset={facts}",
        f"--out_dir={tmp_path}",
        "--gradient_accumulation_steps=2",
        "--max_iters=100000",
    ]
    options += [
        "--eval_interval=100000",
        "--batch_size=200",
    ]  # steps long enough for both to arrive in one
    job = start(*TORCHRUN, "--nproc_per_node=2", "train.py", *options)
    wait_until(lambda: steps_done(tmp_path) > 1, job)
    for process in (*children(job), job.pid):
        os.kill(process, signal.SIGTERM)
    said, errors = job.communicate(timeout=60)
    step = train.load_checkpoint(tmp_path / "ckpt.pt")["iter"]
    assert f"Stopped by SIGTERM after step {step}" in said and steps_done(tmp_path) == step, errors


@pytest.mark.parametrize("seconds", [0, 1])
def test_processes_do_not_outlive_a_torchrun_that_is_killed_early(facts, tmp_path, seconds):
    """While they import: later, test_sampling_while_a_sharded_run_saves."""
    options = [
        *SMALL,
        f"--dataset={facts}",
        f"--out_dir={tmp_path}",
        "--gradient_accumulation_steps=2",
        "--max_iters=100000",
    ]
    job = start(*TORCHRUN, "--nproc_per_node=2", "train.py", *options)
    wait_until(lambda: len(children(job)) == 2, job)
    time.sleep(0.3 + seconds)  # Python has begun
    processes = children(job)
    job.kill()
    wait_for_end(processes, 30)
    job.communicate()


# --- what is said -----------------------------------------------------------------------------------------------------


def test_a_full_disk_and_memory_that_is_short_are_said_by_name(facts, finished, tmp_path):
    def limit(kind, size):
        return lambda: resource.setrlimit(kind, (size, size))

    out = tmp_path / "out"
    options = [*SMALL, f"--dataset={facts}", f"--out_dir={out}"]
    done = run(
        "train.py",
        *options,
        "--eval_interval=1000",
        "--max_iters=1000",
        preexec_fn=limit(resource.RLIMIT_FSIZE, 50_000),
    )
    assert_refused(done, f"could not write {out / 'log.jsonl'}", "Start again with --overwrite")
    shutil.copytree(finished, tmp_path / "finished")
    (tmp_path / "finished" / "log.jsonl").write_text(
        "#" * 100_000 + "\n"
    )  # longer than what PyTorch 2.9 writes to /tmp
    before = contents(tmp_path / "finished")
    resume = ["--resume", f"--out_dir={tmp_path / 'finished'}", "--max_iters=9"]
    done = run("train.py", *resume, preexec_fn=limit(resource.RLIMIT_FSIZE, 50_000))
    assert_refused(done, f"{tmp_path / 'finished' / 'log.jsonl'}")
    assert contents(tmp_path / "finished") == before
    done = prepare("--out", tmp_path / "data", preexec_fn=limit(resource.RLIMIT_FSIZE, 9000))
    assert_refused(done, "prepare.py: ", f"{tmp_path / 'data'}/", "File too large")
    shutil.rmtree(out)
    done = run(
        "train.py", *options, "--batch_size=40000", preexec_fn=limit(resource.RLIMIT_AS, 5 * 2**30)
    )
    assert_refused(done, "out of memory", "lower batch_size", "block_size")


def test_a_checkout_that_cannot_be_written_to_says_where_facts_can_be_made(tmp_path):
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    limits = resource.RLIMIT_FSIZE, (10, 10)
    done = run(
        tmp_path / "train.py",
        f"--out_dir={tmp_path / 'out'}",
        preexec_fn=lambda: resource.setrlimit(*limits),
    )
    assert_refused(
        done,
        "prepare.py: ",
        "File too large",
        "train.py: ",
        "data/facts could not be made",
        "--out FOLDER",
    )


def test_ctrl_c_ends_prepare_py_quietly(tmp_path):
    process = start(
        sys.executable, "data/facts/prepare.py", "--people=2000", "--out", tmp_path / "data"
    )
    assert "biographies" in process.stderr.read(60)
    process.send_signal(signal.SIGINT)
    assert (
        "Traceback" not in process.communicate(timeout=20)[1]
        and process.returncode == 130
        and not (tmp_path / "data").exists()
    )


@pytest.mark.parametrize(
    "command",
    [
        "train.py OPTIONS >/dev/full 2>&-",
        "train.py OPTIONS 2>/dev/full | true",
        "-I train.py OPTIONS >&- <&-",
        "-I sample.py --out_dir=RUN --max_new_tokens=9 --num_samples=1 2>&- >NAME.txt",
        "-I bench/kernels.py --only=checks --device=cpu >NAME.txt",
        "data/facts/prepare.py --people=9 --out OUT 2>&- >/dev/full",
    ],
)
def test_closed_and_full_streams_and_a_strict_path_end_nothing(facts, finished, tmp_path, command):
    options = " ".join([*SMALL, f"--dataset={facts}", f"--out_dir={tmp_path / 'out'}"])
    command = (
        command.replace("OPTIONS", options)
        .replace("RUN", str(finished))
        .replace("OUT", str(tmp_path / "data"))
    )
    command = f"set -o pipefail; {sys.executable} {command.replace('NAME', str(tmp_path / 'said'))}"
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (
        done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr
    ), done.stderr
    if "train.py" in command:
        assert (
            train.load_checkpoint(tmp_path / "out" / "ckpt.pt")["iter"] == 4
            and steps_done(tmp_path / "out") == 4
        )
    elif "prepare.py" in command:
        assert Dataset(tmp_path / "data").questions()
    else:
        assert len((tmp_path / "said.txt").read_text()) > 9


def test_a_sample_that_cannot_be_printed_is_an_error(finished):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "sample.py", f"--out_dir={finished}"],
            cwd=ROOT,
            stdout=full,
            stderr=-1,
            text=True,
        )
    assert_refused(done, "sample.py: standard output", "No space left")
    assert "Exception" not in done.stderr


def test_sampling_while_a_sharded_run_saves(facts, tmp_path):
    """The file is replaced by another: a reader has the whole of one of them."""
    options = [
        *SMALL,
        f"--dataset={facts}",
        f"--out_dir={tmp_path}",
        "--memory_parallel=2",
        "--gradient_accumulation_steps=2",
    ]
    job = start(
        *TORCHRUN,
        "--nproc_per_node=2",
        "train.py",
        *options,
        "--eval_interval=1",
        "--max_iters=100000",
    )
    wait_until((tmp_path / "ckpt.pt").exists, job)
    steps = {train.load_checkpoint(tmp_path / "ckpt.pt")["iter"] for _ in range(150)}
    assert len(steps) > 8
    processes = children(job)
    job.kill()  # torchrun itself: its processes save and end
    job.communicate()
    wait_for_end(processes, 10)
    assert steps_done(tmp_path) == train.load_checkpoint(tmp_path / "ckpt.pt")["iter"]
