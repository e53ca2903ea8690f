"""What the tests of programs share: real processes, small models, folders to compare."""

import contextlib
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "--n_layer=2 --n_head=2 --n_embd=32 --n_ffn=0 --block_size=32 --mem_layers=1 --mem_keys=16 --mem_topk=4 --mem_heads=2 --batch_size=2 "
    "--eval_iters=1 --device=cpu --log_interval=1 --max_iters=4 --eval_interval=2"
).split()
SYSTEMS = {  # options of a model of at least two blocks
    "memory": [],  # of SMALL
    "moe": ["--system=moe", "--mem_layers=0,1", "--moe_experts=4", "--moe_topk=2"],
    "peer": ["--system=peer", "--mem_gate=false"],
    "ultramem": ["--system=ultramem", "--mem_gate=false", "--mem_softmax=false", "--mem_rank=2", "--mem_cores=2", "--mem_expand=4",
                 "--mem_layers=0", "--mem_skip=1", "--mem_value_dim=16", "--mem_decay=4"],
    "engram": ["--mem_layers=", "--ngram_layers=0,1", "--ngram_rows=99", "--ngram_heads=2"],
    "bigram": ["--mem_layers=", "--ngram_layers=0,1", "--ngram=bigram", "--ngram_rows=99"],
    "both": ["--ngram_layers=1", "--ngram_rows=99", "--ngram_heads=2"],
}  # fmt: skip


def run(*command, **options):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, **options)


def start(*command, **options):
    command = [str(part) for part in command]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def train_here(*arguments):
    """train.py in this process: to start another takes seconds."""
    with handlers():
        train.main([str(argument) for argument in arguments])


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def load(path):
    return torch.load(path, weights_only=True)


def prepare(*arguments, **options):
    return run("data/facts/prepare.py", "--people=9", "--biographies=20", *arguments, **options)


def prepare_here(kind, *arguments):
    """prepare.py of a dataset, in this process."""
    module = importlib.import_module(f"data.{kind}.prepare")
    module.main([str(argument) for argument in arguments])


def assert_refused(done, *words):
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def contents(*folders):
    return {
        path: path.read_bytes()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


def wait_until(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def children(job):
    return [
        int(pid)
        for pid in subprocess.run(
            ["pgrep", "-P", str(job.pid)], capture_output=True, text=True
        ).stdout.split()
    ]


def wait_for_end(processes, seconds):
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < end and len(processes) == 2
        time.sleep(0.05)


def steps_done(out):
    return (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0


@contextlib.contextmanager
def handlers():
    """Training takes over signals."""
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refusal(main, arguments, capsys):
    """What a program that must not go on says. In this process: to start another takes seconds."""
    with handlers(), pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = (
        f"{ended.value.code}\n" if isinstance(ended.value.code, str) else ""
    ) + capsys.readouterr().err
    assert ended.value.code not in (0, None) and "Traceback" not in said, said
    return said


def assert_same_checkpoint(a, b):
    """Weights, both optimisers and log, bit for bit; seconds and folder may differ."""
    one = dict(flatten(load(a / "ckpt.pt")))
    two = dict(flatten(load(b / "ckpt.pt")))
    for checkpoint in (one, two):
        for path in ("/seconds", "/train_config/out_dir", "/train_config/resume"):
            del checkpoint[path]
    assert one.keys() == two.keys() and sum(torch.is_tensor(value) for value in one.values()) > 50
    for path, value in one.items():
        same = torch.equal(value, two[path]) if torch.is_tensor(value) else value == two[path]
        assert same, path
    speeds = {"tokens_per_s": 0, "seconds": 0}
    for first, second in zip(log_of(a), log_of(b), strict=True):
        assert first | speeds == second | speeds


def flatten(value, path=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from flatten(item, f"{path}/{i}")
    else:
        yield path, value
