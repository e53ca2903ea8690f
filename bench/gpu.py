"""Checks and speeds on a GPU, for the tables of bench/README.md. On one H100, by estimate:

    python bench/gpu.py --minutes=8     the kernels, the gpt2 presets, the demo: what tells most
    python bench/gpu.py --minutes=4     again: goes on where it stopped
    python bench/gpu.py --only=tiles    one part, even if it is done
    python bench/gpu.py --device=cpu    a miniature of every part: does the command work?

Each part is a process with a time limit: a crash or a hang loses one part. --out holds what has
been measured, and is written after each part.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from pathlib import Path

import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # before bench/, which has a kernels.py
from bench import kernels, speed
from presets import PRESETS
from runtime.device import choose_device
from runtime.files import fail, write_file

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = dict(
    n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=2, gradient_accumulation_steps=2,
    mem_keys=16, mem_topk=4, mem_heads=2,
)  # fmt: skip


# --- the parts: device -> what is written to --out ------------------------------------


def checks(device):
    if device.type == "cpu":
        return {path: kernels.check_path(path, device, widths=(24,)) for path in kernels.PATHS}
    passed = {path: kernels.check_path(path, device) for path in kernels.PATHS}
    passed["selection"] = kernels.check_select(device)
    return passed


def lookup(device):
    if device.type == "cpu":
        shape = kernels.Shape("zipf", 2**10, 16, n=64, k=8, dtype=torch.float32)
        return kernels.benchmark(device, [shape], elements=2**16)
    return kernels.benchmark(device, kernels.GPU_SHAPES, elements=2**29)


def tiles(device):
    if device.type == "cpu":
        shape = kernels.Shape("zipf", 16, 16, n=1, k=2, dtype=torch.float32)
        return kernels.tiles(device, shape, N=8, K=2, repeats=1)
    return kernels.tiles(device, kernels.GPU_SHAPES[0], N=1024, K=32)


def fit(options, device):
    """On a CPU a tiny model of the same kind."""
    if device.type == "cpu":
        return {**options, **MINIATURE, "mem_count": min(1, options.get("mem_count", 0))}
    return options


def preset(name, compiled, device):
    """Steps with all their micro-steps: one that compiles, three for the speed, one profiled."""
    compiled = compiled and device.type == "cuda"
    return speed.preset_speed(fit(PRESETS[name], device), device, compiled, repeats=3)


def layer(device):
    return speed.layer_times(fit(speed.GPU_MODEL, device), device, repeats=10)


def generation(device):
    """Tokens a second of the first text and of later ones."""
    rates = {}
    for name in ("gpt2-memory", "gpt2-dense"):
        training = speed.Training(fit(PRESETS[name], device), device)
        rates[name] = training.generation(new_tokens=20)
        print(f"{name}: {rates[name]} tokens a second, the first text and later ones", flush=True)
    return rates


def demo(device):
    """All its 3,500 steps, or those of 85 seconds."""
    lines = train_demo([], ["--dtype=bfloat16"], device, seconds=85)
    last = [line for line in lines if "recall" in line][-1]
    print(f"recall {last['recall']:.1%} at step {last['iter']}", flush=True)
    return last


def torchrun(device):
    """The last lines of two logs: of one process started by python, and by torchrun (NCCL)."""
    options = ["--max_iters=200", "--eval_interval=200", "--log_interval=100", "--eval_iters=1"]
    launch = "-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node=1"
    result = {}
    for name, launcher in {"python": [], "torchrun": launch.split()}.items():
        result[name] = train_demo(launcher, options, device, seconds=60)[-1]
        print(name, result[name], flush=True)
    return result


def train_demo(launcher, options, device, seconds):
    """Train it as a user does. Returns the lines of its log."""
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cpu":
            prepare = [sys.executable, ROOT / "data/facts/prepare.py", f"--out={folder}/facts"]
            subprocess.run([*prepare, "--people=9", "--biographies=20"], check=True)
            options = [*options, f"--dataset={folder}/facts", "--max_iters=2", "--eval_iters=1"]
        out = Path(folder, "out")
        options = [f"--device={device.type}", "--compile=false", f"--out_dir={out}", *options]
        command = [sys.executable, *launcher, ROOT / "train.py", *options]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, check=True, timeout=seconds, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def tests(device):
    """The tests of kernels and layer, which run on the GPU."""
    which = ["-n4", "tests/test_kernels.py", "tests/test_memory.py"]
    if device.type == "cpu":
        which = ["-n0", "tests/test_kernels.py", "--collect-only"]
    command = [sys.executable, "-m", "pytest", *which]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-3000:], flush=True)
    done.check_returncode()
    return done.stdout.splitlines()[-1]


# part: (function, seconds that it takes on an H100 by estimate, seconds after which it is killed).
# What tells most comes first. A part is not begun with less time left than the estimate.
PARTS = {
    "checks": (checks, 45, 90),
    "lookup": (lookup, 35, 75),
    "gpt2-memory compiled": (partial(preset, "gpt2-memory", True), 80, 140),
    "gpt2-dense compiled": (partial(preset, "gpt2-dense", True), 60, 110),
    "layer": (layer, 25, 60),
    "demo": (demo, 65, 105),
    "generation": (generation, 25, 60),
    "torchrun": (torchrun, 45, 130),
    "tiles": (tiles, 60, 100),
    "gpt2-memory eager": (partial(preset, "gpt2-memory", False), 35, 70),
    "gpt2-dense eager": (partial(preset, "gpt2-dense", False), 30, 60),
    "tests": (tests, 90, 150),
}


# --- running the parts ----------------------------------------------------------------


def run_parts(names, device, out, end):
    """Run parts until a time.monotonic()."""
    if device.type == "cpu":
        run_process(names, device, out, end - time.monotonic())  # one start for all
        return
    for name in names:
        _, estimate, limit = PARTS[name]
        left = end - time.monotonic()
        if left < estimate:
            print(f"\n=== {name}: {left:.0f} s are left, it takes {estimate}", flush=True)
        else:
            run_process([name], device, out, min(limit, left))


def run_process(names, device, out, seconds):
    """Run parts in a process, which is killed after its time with all that it has started."""
    for name in names:
        save(out, name, {"failed": f"it crashed, or was killed after {seconds:.0f} s"})
    command = [sys.executable, __file__, f"--device={device.type}", f"--out={out}"]
    command += [f"--part={name}" for name in names]
    environment = dict(os.environ)
    if device.type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"killed after {seconds:.0f} s", flush=True)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_here(names, device, out):
    for name in names:
        print(f"\n=== {name}", flush=True)
        began = time.monotonic()
        try:
            outcome = {"result": PARTS[name][0](device)}
        except Exception as error:
            traceback.print_exc()
            outcome = {"failed": f"{type(error).__name__}: {error}"}
        outcome["seconds"] = round(time.monotonic() - began)
        print(f"=== {name} took {outcome['seconds']} s", flush=True)
        save(out, name, outcome)


def save(out, name, outcome):
    done = json.loads(out.read_text())
    done["parts"][name] = outcome
    write_file(out, json.dumps(done, indent=1))


def open_results(out, device):
    """The parts in a file; it is made if there is none. Raises ValueError if its numbers are of
    another machine."""
    machine = f"CPU, PyTorch {torch.__version__}"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        machine = f"{card}, PyTorch {torch.__version__}, Triton {kernels.triton.__version__}"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, json.dumps({"machine": machine, "parts": {}}))
    done = json.loads(out.read_text())
    if done["machine"] != machine:
        raise ValueError(f"--out={out} has numbers of {done['machine']}; give another file")
    return done["parts"]


# --- tables ---------------------------------------------------------------------------


def print_tables(out):
    """What bench/README.md shows, in Markdown."""
    done = json.loads(out.read_text())
    got = {name: part["result"] for name, part in done["parts"].items() if "result" in part}
    print(f"\n{done['machine']}\n\n| | forward | backward | `RowAdam` | `F.embedding_bag` |")
    print("|---|---|---|---|---|")
    for row in got.get("lookup", []):
        cells = [f"{row['reads']}, {row['S']:,} slots of {row['D']}"]
        for part in ("forward", "backward", "RowAdam"):
            cells.append(f"{row[part]:,.0f} GB/s ({row[part] / row['copy']:.0%})")
        cells.append(f"{row['bag']:.1f} / {row['bag with backward']:.1f} times as long")
        print(f"| {' | '.join(cells)} |")
    columns = [name for name in PARTS if name.startswith("gpt2")]
    print(f"\n| | {' | '.join(columns)} |\n|---|---|---|---|---|")
    labels = ("tokens a second", "MFU", "peak memory, GiB", "first step, s", *speed.PARTS)
    for label in labels:
        cells = [label]
        for name in columns:
            value = got.get(name, {}).get(label, "not yet measured")
            cells.append(format_number(value))
        print(f"| {' | '.join(cells)} |")
    for name in ("checks", "layer", "generation", "demo", "torchrun", "tests"):
        print(f"\n{name}: {got.get(name, 'not yet measured')}")


def format_number(value):
    if isinstance(value, str):
        return value
    return f"{value:,.4g}"


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="auto", help="cpu or cuda; default: a GPU if possible")
    add("--out", type=Path, default=ROOT / "out/gpu.json", help="results; default: %(default)s")
    add("--minutes", type=float, default=12, help="for all parts; default: %(default)s")
    add("--only", choices=PARTS, action="append", metavar="PART", help="can be given again")
    add("--part", choices=PARTS, action="append", help=SUPPRESS)  # of a process of run_process
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    device = choose_device(args.device)
    if args.part:
        run_here(args.part, device, args.out)
        return
    parts = open_results(args.out, device)
    names = args.only
    if not names:
        names = [name for name in PARTS if "result" not in parts.get(name, {})]
        names.sort(key=lambda name: name in parts)  # those that have failed come last
    run_parts(names, device, args.out, end)
    print_tables(args.out)
    parts = open_results(args.out, device)
    failed = [f"{name} ({part['failed']})" for name, part in parts.items() if "failed" in part]
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyboardInterrupt) as error:
        fail(error)
