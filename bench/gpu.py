"""Run the checks and measurements on a GPU, for the tables of bench/README.md.

    python bench/gpu.py --minutes=8     the most important parts come first
    python bench/gpu.py --minutes=4     again, for the parts that are not done yet
    python bench/gpu.py --only=tiles    one part, even if it is done
    python bench/gpu.py --device=cpu    short forms of the commands, to test them

Each part is a command with a time limit, so a crash or a hang loses only one part. The output of
all parts is written to --out after each part. Runs of train.py are in a folder beside it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runtime.arguments import Parser, path_argument
from runtime.device import choose_device
from runtime.files import fail, write_file

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Part:
    """A command of python. seconds: an estimate for an H100; the part does not start with less
    time left. limit: seconds after which it is killed."""

    seconds: int
    limit: int
    command: str


TRAIN = "train.py --compile=false --overwrite --out_dir=FOLDER"
SHORT = "--max_iters=300 --eval_interval=300 --log_interval=150 --eval_iters=1"
TORCHRUN = "-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node=1"
# A step of a preset has all its micro-steps. One compiles, three are timed, one is profiled.
GPU_PARTS = {
    "checks": Part(45, 90, "bench/kernels.py --only=checks"),
    "lookup": Part(35, 75, "bench/kernels.py --only=times"),
    "memory": Part(80, 140, "bench/speed.py --preset=gpt2-memory --compile --repeats=3"),
    "dense": Part(60, 110, "bench/speed.py --preset=gpt2-dense --compile --repeats=3"),
    "layer": Part(50, 90, "bench/speed.py --repeats=10"),  # and generation at batch 1
    "demo": Part(70, 110, f"{TRAIN}/demo --dtype=bfloat16"),
    "python": Part(20, 50, f"{TRAIN}/python {SHORT}"),
    "torchrun": Part(25, 60, f"{TORCHRUN} {TRAIN}/torchrun {SHORT}"),  # with NCCL
    "tiles": Part(75, 110, "bench/kernels.py --only=tiles"),
    "memory eager": Part(35, 70, "bench/speed.py --preset=gpt2-memory --repeats=3"),
    "dense eager": Part(30, 60, "bench/speed.py --preset=gpt2-dense --repeats=3"),
    "tests": Part(90, 150, "-m pytest -n4 tests/test_kernels.py tests/test_memory.py"),
}
PREPARE = "data/facts/prepare.py --people=9 --biographies=20 --overwrite --out=FOLDER/facts"
SMALL = "--dataset=FOLDER/facts --device=cpu --max_iters=2 --eval_iters=1"
CPU_PARTS = {
    "checks": Part(5, 60, "bench/kernels.py --only=checks --device=cpu"),
    "lookup": Part(5, 60, "bench/kernels.py --only=times --device=cpu"),
    "memory": Part(5, 60, "bench/speed.py --preset=facts-memory --device=cpu --repeats=1"),
    "layer": Part(5, 60, "bench/speed.py --device=cpu --repeats=1"),
    "facts": Part(5, 60, PREPARE),
    "demo": Part(5, 60, f"{TRAIN}/demo {SMALL} --dtype=bfloat16"),
    "torchrun": Part(5, 60, f"{TORCHRUN} {TRAIN}/torchrun {SMALL}"),
    "tests": Part(5, 60, "-m pytest -n0 tests/test_kernels.py -k same_bits"),
}


def run_part(command, limit, folder):
    """Return the output of a command, its time, and an error or ""."""
    words = [word.replace("FOLDER", str(folder)) for word in command.split()]
    began = time.monotonic()
    with open(folder / "output.txt", "w") as f:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=f, stderr=f, start_new_session=True
        )
        try:
            process.wait(timeout=limit)
            failed = ""
            if process.returncode != 0:
                failed = f"it ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            failed = f"killed after {limit:.0f} s"
        finally:  # and all processes that it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = round(time.monotonic() - began)
    output = (folder / "output.txt").read_text(errors="replace")
    return {"command": command, "seconds": seconds, "failed": failed, "output": output}


def last_evaluation(path):
    """The last line of a log of train.py that has a validation loss, or "" """
    lines = [""]
    if path.exists():
        lines += [line for line in path.read_text().splitlines() if "val_loss" in line]
    return lines[-1]


def run_parts(parts, names, done, out, end):
    """Run parts until time.monotonic() is `end`. done: the content of the file `out`"""
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        part = parts[name]
        left = end - time.monotonic()
        print(f"\n=== {name}: python {part.command}", flush=True)
        if left < part.seconds:
            print(f"left for another call: {left:.0f} s of {part.seconds} are left", flush=True)
            continue
        result = run_part(part.command, min(left, part.limit), folder)
        result["log"] = last_evaluation(folder / name / "log.jsonl")
        done["parts"][name] = result
        write_file(out, json.dumps(done, indent=1))
        print(result["output"][-4000:], result["log"])
        print(f"=== {result['seconds']} s {result['failed']}", flush=True)


def open_results(out, device):
    """Return the content of --out. Raises ValueError if it comes from another machine."""
    machine = f"{device.type}, PyTorch {torch.__version__}"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    if not out.exists():
        return {"machine": machine, "parts": {}}
    done = json.loads(out.read_text())
    if done["machine"] != machine:
        raise ValueError(f"--out={out} has numbers of {done['machine']}; give another file")
    return done


def print_tables(done):
    """Print the Markdown rows in the output of the parts, for bench/README.md."""
    print(f"\n{done['machine']}")
    for name, result in done["parts"].items():
        print(f"\n{name}: `python {result['command']}`, {result['seconds']} s {result['failed']}")
        lines = result["output"].splitlines()
        rows = [line for line in lines if line.startswith("|")]
        if not rows:
            rows = lines[-3:]
        print("\n".join([*rows, result["log"]]))


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="cpu or cuda; default: a GPU if possible")
    results = "results; default: %(default)s"
    add("--out", type=path_argument, default=ROOT / "out/gpu.json", help=results)
    add("--minutes", type=float, default=12, help="for all parts; default: %(default)s")
    add("--only", action="append", metavar="PART", help="can be given again")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    device = choose_device(args.device)
    parts = CPU_PARTS
    if device.type == "cuda":
        parts = GPU_PARTS
    out = args.out.resolve()
    done = open_results(out, device)
    passed = [name for name, result in done["parts"].items() if not result["failed"]]
    names = args.only
    if not names:
        names = [name for name in parts if name not in passed]
        names.sort(key=lambda name: name in done["parts"])  # failed parts come last
    for name in names:
        if name not in parts:
            raise ValueError(f"--only={name}: must be one of {', '.join(parts)}")
    run_parts(parts, names, done, out, end)
    print_tables(done)
    failed = [name for name, result in done["parts"].items() if result["failed"]]
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyboardInterrupt) as error:
        fail(error)
