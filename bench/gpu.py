"""All that is to be known of a GPU, in one command: checks, speeds and memory, for the tables of the README.

    python bench/gpu.py                          at most 25 minutes on one H100; goes on where it was stopped
    python bench/gpu.py --minutes=9              as many parts as fit into nine minutes; then the same command again
    python bench/gpu.py --only=lookup            one part, also if it is done already
    python bench/gpu.py --device=cpu             a miniature of every part, without torch.compile: says that the command works

Each part has a process of its own and a time limit, so that a failure or a crash loses one part. What is done stands in --out, with
card and versions; the tables are printed from there.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from bench import lookup, speed, training
from data.dataset import write_file
from model import GPTConfig

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --gradient_accumulation_steps=2 --mem_keys=16 --mem_topk=4 "
    "--mem_heads=2 --device=cpu --compile=false --warmup_iters=1"
).split()


def miniature(preset):
    """Options that make a preset tiny."""
    return [*MINIATURE, f"--mem_count={int('memory' in preset)}"]


def tests(device, folder):
    """Those of the kernels, the layer and the model, which run on the GPU where there is one."""
    files = [ROOT / "tests" / f"test_{name}.py" for name in ("kernels", "memory", "model")]
    some = [] if device.type == "cuda" else ["-n0", "-k", "same_bits"]
    done = subprocess.run([sys.executable, "-m", "pytest", *some, *files], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-3000:])
    if done.returncode:
        raise RuntimeError(done.stdout[-1500:])
    return {"summary": done.stdout.strip().splitlines()[-1]}


def lookups(device, folder):
    """Every implementation against float64; the table of python kernels.py."""
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision("highest")  # the PyTorch path has a product, which TF32 would spoil
    paths = {"pytorch": (lookup.torch_forward, lookup.torch_backward, lookup.torch_adam)}
    if cuda:
        paths["triton"] = lookup.triton_forward, lookup.triton_backward, lookup.triton_adam
    passed = {}
    for name, path in paths.items():
        print(f"\n{name}")
        passed[name] = lookup.check(*path, device, **({} if cuda else {"widths": (1, 24)}))
    if cuda:
        passed["selection"] = lookup.check_select(device)
    small = dict(n=64, k=8, dtype=torch.float32, elements=2**16, cases=[("zipf", 2**10, 16)])
    return {"passed": passed, "table": lookup.benchmark(device, **(lookup.SHAPES["cuda"] if cuda else small))}


def layer(device, folder):
    """The lookup and the layer's training step: against embedding_bag, against SwiGLU, with more slots."""
    cuda, context = device.type == "cuda", train.precision("auto", device)
    shape = dict(n_layer=8, n_head=16, n_embd=1024, mem_dtype="bfloat16") if cuda else dict(n_layer=2, n_head=2, n_embd=32)
    config = GPTConfig(**shape, mem_count=1, mem_keys=1024 if cuda else 32)
    tokens, repeats = (16384, 20) if cuda else (64, 2)
    times = speed.lookup_times(config, device, tokens, repeats)
    return times | speed.layer_times(config, device, tokens, context, repeats)


def generation(device, folder):
    """Text at batch 1 from a model of GPT-2's size: the first one and those after it."""
    options = dict(vocab_size=50257) if device.type == "cuda" else dict(vocab_size=99, n_layer=2, n_embd=48, mem_keys=32)
    memory = GPTConfig(**options, mem_count=1 if device.type == "cpu" else 3, mem_dtype="bfloat16")
    dense = GPTConfig(**options)
    new_tokens = 200 if device.type == "cuda" else 10
    return speed.generation_times(memory, dense, device, train.precision("auto", device), new_tokens)


def preset_training(preset, compiled):
    def run(device, folder):
        if device.type == "cpu":
            training.random_dataset(folder, 2**13, 300)
            options, steps = [*miniature(preset), f"--dataset={folder}"], 2
        else:
            training.random_dataset(folder)
            options, steps = [f"--compile={str(compiled).lower()}", f"--dataset={folder}"], 10  # of 15 micro-steps
        result = training.throughput(preset, options, steps, folder)
        print(training.describe(preset, result, result), flush=True)
        result["shares"] = training.shares(preset, options, folder, warmup=3, steps=1)
        for part, share in result["shares"].items():
            print(f"  {part:24} {share:6.1%} of a step")
        return result

    run.__doc__ = f"{preset}, {'compiled' if compiled else 'eager'}: tokens a second, memory, shares of a step."
    return run


def torchrun(device, folder):
    """One process started by torchrun (NCCL on a GPU) against the same started by python: speed, and the loss after some steps."""
    preset, options, steps, size = "gpt2-smoke", ["--n_layer=12", "--compile=false"], 100, (2**20, 50257)
    if device.type == "cpu":
        preset, options, steps, size = "gpt2-memory", miniature("gpt2-memory"), 2, (2**13, 300)
    training.random_dataset(folder, *size)
    launchers = {"python": (), "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")}
    result = {}
    for name, launcher in launchers.items():
        out = Path(folder) / name
        result[name] = training.throughput(preset, [*options, f"--dataset={folder}"], steps, out, launcher)
        print(f"{name}: {result[name]['tokens_per_s']:,.0f} tokens/s, loss {result[name]['loss']:.6f}")
    result["ratio"] = result["torchrun"]["tokens_per_s"] / result["python"]["tokens_per_s"]
    return result


FACTS = (
    "--n_embd=256 --mem_keys=512 --batch_size=64 --max_iters=5000 --learning_rate=2e-3 --warmup_iters=200 --eval_interval=1000000 "
    "--log_interval=50"
).split()


def facts(preset):
    def run(device, folder):
        people, options = 10_000, FACTS
        if device.type == "cpu":
            people, options = 10, [*miniature(preset), "--max_iters=2", "--eval_iters=1"]
        prepare = [sys.executable, ROOT / "data" / "facts" / "prepare.py", f"--people={people}", "--out", Path(folder) / "data"]
        subprocess.run(prepare, check=True, capture_output=True)
        began = time.perf_counter()
        lines = training.run_training([f"--preset={preset}", f"--dataset={folder}/data", *options], Path(folder) / preset)
        result = {name: lines[-1][name] for name in ("iter", "recall", "val_loss")} | {"people": people, "options": options}
        result["tokens_per_s"] = statistics.median(line["tokens_per_s"] for line in lines)
        result["seconds"] = time.perf_counter() - began
        print(f"{preset}, {people:,} people: recall {result['recall']:.1%}, {result['tokens_per_s']:,.0f} tokens/s")
        return result

    run.__doc__ = f"{preset} with ten times the demo's people and four times its width: recall."
    return run


PARTS = {  # name: (function, seconds it may take on a GPU); what matters most comes first
    "lookup": (lookups, 240),
    "gpt2-memory compiled": (preset_training("gpt2-memory", True), 240),
    "gpt2 compiled": (preset_training("gpt2", True), 160),
    "layer": (layer, 90),
    "generation": (generation, 90),
    "torchrun": (torchrun, 120),
    "tests": (tests, 300),
    "gpt2-memory eager": (preset_training("gpt2-memory", False), 200),
    "gpt2 eager": (preset_training("gpt2", False), 160),
    "facts-memory": (facts("facts-memory"), 200),
    "facts-dense": (facts("facts-dense"), 200),
}


# --- running the parts ------------------------------------------------------------------------------------------------


def versions(device):
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"card": card, "torch": torch.__version__, "triton": getattr(lookup.triton, "__version__", None)}


RUNNING = set()  # processes of parts


def kill(process):
    """And all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_part(name, device, seconds):
    """In a process of its own, killed with all that it has started once its time is over. Returns what goes into the file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, f"--device={device}", f"--part={name}", f"--out={folder}/result.json"]
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if device.type == "cpu" else {})
        process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
        began = time.monotonic()
        RUNNING.add(process)
        try:
            _, errors = process.communicate(timeout=seconds)
            failed = f"ended with {process.returncode}: {errors[-3000:]}" if process.returncode else None
        except subprocess.TimeoutExpired:
            failed = f"not done after {seconds:.0f} s"
        kill(process)
        process.wait()
        RUNNING.remove(process)
        took = {"took": time.monotonic() - began}
        return took | ({"failed": failed} if failed else {"result": json.loads(Path(folder, "result.json").read_text())})


def cell(value, form="{:,.0f}"):
    return "not yet measured" if value is None else form.format(value)


def tables(done):
    """The README's tables, in Markdown."""
    got = {name: part.get("result") or {} for name, part in done["parts"].items()}
    lines = [f"{done['card']}, PyTorch {done['torch']}, Triton {done['triton']}"]
    if rows := got.get("lookup", {}).get("table"):
        copy = f"{rows[0]['copy_GB/s']:,.0f} GB/s"
        lines += ["", f"| a copy moves {copy} | forward | backward | RowAdam | embedding_bag, times as long |"]
        lines += ["|---|---|---|---|---|"]
        for row in rows:
            cells = [f"{row[f'{name}_GB/s']:,.0f} ({row[f'{name}_share']:.0%})" for name in ("forward", "backward", "RowAdam")]
            bag = "does not fit" if row["embedding_bag"] is None else " / ".join(f"{ratio:.1f}" for ratio in row["embedding_bag"])
            lines.append(f"| {row['slots']}, {row['S']:,} slots of {row['D']} | {' | '.join(cells)} | {bag} |")
    if times := got.get("layer"):
        lines += ["", f"A layer's training step: {times['memory_ms']:.2f} ms, SwiGLU's {times['swiglu_ms']:.2f} ms: "]
        lines[-1] += f"{times['memory_ms'] / times['swiglu_ms']:.2f} times as long; straightforward {times['plain_ms']:.2f} ms"
    lines += ["", "| | gpt2 | gpt2-memory | gpt2, eager | gpt2-memory, eager |", "|---|---|---|---|---|"]
    runs = [got.get(f"{preset} {form}", {}) for form in ("compiled", "eager") for preset in ("gpt2", "gpt2-memory")]
    for label, name, form in (
        ("tokens a second", "tokens_per_s", "{:,.0f}"), ("MFU", "mfu", "{:.1%}"), ("peak memory, GiB", "gpu_gib", "{:.1f}"),
        ("reserved, GiB", "gpu_gib_reserved", "{:.1f}"), ("waiting for data", "data_wait", "{:.2%}"),
    ):  # fmt: skip
        lines.append(f"| {label} | " + " | ".join(cell(run.get(name), form) for run in runs) + " |")
    for part in training.PARTS:
        lines.append(f"| {part} | " + " | ".join(cell(run.get("shares", {}).get(part), "{:.1%}") for run in runs) + " |")
    if texts := got.get("generation"):
        lines += ["", "| tokens a second at batch 1 | first text | later texts |", "|---|---|---|"]
        lines += [f"| {name} | {texts[f'{name}_first']:,.0f} | {texts[f'{name}_later']:,.0f} |" for name in ("memory", "dense")]
    if one := got.get("torchrun"):
        losses = ", ".join(f"{one[name]['loss']:.6f}" for name in ("python", "torchrun"))
        lines += ["", f"torchrun with one process / python: {one['ratio']:.3f}; losses {losses}"]
    for preset in ("facts-memory", "facts-dense"):
        if run := got.get(preset):
            lines += ["", f"{preset}, {run['people']:,} people: recall {run['recall']:.1%}, {run['tokens_per_s']:,.0f} tokens/s"]
    if checks := got.get("lookup", {}).get("passed"):
        lines += ["", "checks against float64: " + ", ".join(f"{name} {'ok' if ok else 'FAILED'}" for name, ok in checks.items())]
    lines += ["", f"tests: {got.get('tests', {}).get('summary', 'not run')}"]
    for name, part in done["parts"].items():
        lines += [f"{name} FAILED: {part['failed'].strip().splitlines()[-1]}"] if "failed" in part else []
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="auto", help="cpu or cuda; default: cuda where there is one")
    add("--out", type=Path, default=ROOT / "out" / "gpu.json", help="what has been measured (default: %(default)s)")
    add("--minutes", type=float, default=25, help="begin no part that may not end by then (default: %(default)s)")
    add("--only", choices=list(PARTS), action="append", help="this part, done or not; can be given again", metavar="PART")
    add("--part", choices=list(PARTS), help=argparse.SUPPRESS)  # of the process that runs one
    args = parser.parse_args()
    began = time.monotonic()
    try:
        device = train.choose_device(args.device)
    except ValueError as error:
        sys.exit(f"gpu.py: {error}")
    if args.part:
        with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:  # which whoever kills this process removes
            args.out.write_text(json.dumps(PARTS[args.part][0](device, folder)))
        return

    done = versions(device) | {"parts": {}}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if any(before.get(name) != done[name] for name in ("card", "torch", "triton")):
            other = f"{before.get('card')}, PyTorch {before.get('torch')}, Triton {before.get('triton')}"
            sys.exit(f"gpu.py: {args.out} has the numbers of {other}; give another --out")
        done = before
    args.out.parent.mkdir(parents=True, exist_ok=True)
    parts = done["parts"]
    names = args.only or [name for name in PARTS if "result" not in parts.get(name, {})]
    names.sort(key=lambda name: name in parts)  # what has failed comes after what was never tried

    def attempt(name):
        seconds, left = PARTS[name][1], began + 60 * args.minutes - time.monotonic()
        if left < min(seconds, 54 * args.minutes):
            return print(f"\n{name}: left for the next call, {left:.0f} s are too few", flush=True)
        print(f"\n=== {name}: {PARTS[name][0].__doc__}", flush=True)
        return run_part(name, device, min(seconds, left))

    with ThreadPoolExecutor(2 if device.type == "cpu" else 1) as pool:  # a miniature measures nothing: two parts at a time
        try:
            for name, part in zip(names, pool.map(attempt, names), strict=True):
                if part:
                    parts[name] = part
                    print(f"=== {name}: " + part.get("failed", f"took {part['took']:.0f} s"), flush=True)
                    write_file(args.out, json.dumps(done, indent=1))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                kill(process)
            sys.exit(130)
    print("\n" + tables(done))
    failed = [name for name, part in parts.items() if "failed" in part]
    sys.exit(f"gpu.py: failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
