"""Checks and speeds on a GPU, for the tables in bench/README.md. More recall: reproduce.py --tier=gpu.

    python bench/gpu.py                          at most 45 minutes on one H100; goes on where it was stopped
    python bench/gpu.py --minutes=9              the parts that fit into nine minutes; then the same again
    python bench/gpu.py --only=lookup            one part, even if it is done
    python bench/gpu.py --device=cpu             a miniature of every part: does the command work?

Each part is a process of its own with a time limit, so that a failure or a crash loses one part. Results are
kept in --out, with card and versions; the tables are printed from there.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from bench import lookup, speed, training
from data.files import write_file
from model import GPTConfig

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = """--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --mem_keys=16 --mem_topk=4
    --mem_heads=2 --gradient_accumulation_steps=2 --device=cpu --compile=false --warmup_iters=1""".split()


def miniature(preset):
    """Options that make a preset tiny."""
    return [*MINIATURE, f"--mem_count={int('memory' in preset)}"]


def tests(device, folder):
    """The tests of the kernels, the layer and the model, which run on the GPU if there is one."""
    files = [ROOT / "tests" / f"test_{name}.py" for name in ("kernels", "memory", "model")]
    some = [] if device.type == "cuda" else ["-n0", "-k", "same_bits"]
    command = [sys.executable, "-m", "pytest", *some, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-3000:])
    if done.returncode:
        raise RuntimeError(done.stdout[-1500:])
    return {"summary": done.stdout.strip().splitlines()[-1]}


def lookups(device, folder):
    """Every implementation against float64; the table of python bench/lookup.py."""
    cuda = device.type == "cuda"
    torch.set_float32_matmul_precision(
        "highest"
    )  # the PyTorch path has a product, which TF32 would spoil
    passed = {}
    for name in ("pytorch", "triton") if cuda else ("pytorch",):
        print(f"\n{name}")
        passed[name] = lookup.check(
            *lookup.PATHS[name], device, **({} if cuda else {"widths": (1, 24)})
        )
    if cuda:
        passed["selection"] = lookup.check_select(device)
    small = dict(n=64, k=8, dtype=torch.float32, elements=2**16, cases=[("zipf", 2**10, 16)])
    return {
        "passed": passed,
        "table": lookup.benchmark(device, **(lookup.SHAPES["cuda"] if cuda else small)),
    }


def layer(device, folder):
    """The lookup and the layer's training step: against embedding_bag, against SwiGLU, with more slots."""
    cuda, context = device.type == "cuda", train.precision("auto", device)
    shape = dict(n_layer=2, n_head=2, n_embd=32, mem_keys=32)
    if cuda:
        shape = dict(n_layer=8, n_head=16, n_embd=1024, mem_keys=1024, mem_dtype="bfloat16")
    config, (tokens, repeats) = GPTConfig(**shape, mem_count=1), (16384, 20) if cuda else (64, 2)
    times = speed.lookup_times(config, device, tokens, repeats)
    return times | speed.layer_times(config, device, tokens, context, repeats)


def generation(device, folder):
    """Text at batch 1 from a model of GPT-2's size: the first one and those after it."""
    shape, count, new_tokens = dict(vocab_size=99, n_layer=2, n_embd=48, mem_keys=32), 1, 10
    if device.type == "cuda":
        shape, count, new_tokens = dict(vocab_size=50257), 3, 200
    memory, dense = GPTConfig(**shape, mem_count=count, mem_dtype="bfloat16"), GPTConfig(**shape)
    return speed.generation_times(
        memory, dense, device, train.precision("auto", device), new_tokens
    )


def preset_training(preset, compiled):
    def run(device, folder):
        options, steps, size = [f"--compile={str(compiled).lower()}"], 10, ()  # of 15 micro-steps
        if device.type == "cpu":
            options, steps, size = miniature(preset), 2, (2**13, 300)
        training.random_dataset(folder, *size)
        options = [*options, f"--dataset={folder}"]
        result = training.throughput(preset, options, steps, folder)
        print(training.describe(preset, result, result), flush=True)
        result["shares"] = training.shares(preset, options, folder, warmup=3, steps=1)
        for part, share in result["shares"].items():
            print(f"  {part:24} {share:6.1%} of a step")
        return result

    form = "compiled" if compiled else "eager"
    run.__doc__ = f"{preset}, {form}: tokens a second, memory, shares of a step."
    return run


def torchrun(device, folder):
    """One process started by torchrun (NCCL on a GPU) against one started by python: speed, and the loss."""
    preset, options, steps, size = (
        "shakespeare-memory",
        ["--n_layer=12", "--compile=false"],
        100,
        (2**20,),
    )
    if device.type == "cpu":
        options, steps, size = miniature(preset), 2, (2**13, 300)
    training.random_dataset(folder, *size)
    command = (
        "-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc_per_node=1".split()
    )
    launchers, result = {"python": (), "torchrun": command}, {}
    for name, launcher in launchers.items():
        out = Path(folder) / name
        result[name] = training.throughput(
            preset, [*options, f"--dataset={folder}"], steps, out, launcher
        )
        print(
            f"{name}: {result[name]['tokens_per_s']:,.0f} tokens/s, loss {result[name]['loss']:.6f}"
        )
    result["ratio"] = result["torchrun"]["tokens_per_s"] / result["python"]["tokens_per_s"]
    return result


def run_script(script, *arguments):
    """Run a script of ours as a user does. Returns what it prints."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(map(str, arguments))}:\n{done.stderr[-2000:]}")
    return done.stdout


def facts(device, folder):
    """The demo: its recall in float32 and bfloat16; killed and resumed; taught new facts; inspected."""
    where, people, new, steps = [f"--device={device}"], 2000, 100, 400
    length, update = [], ["--update_slots=4096", "--max_iters=200"]
    if device.type == "cpu":
        where += ["--compile=false", "--batch_size=2", "--eval_iters=1"]
        people, new, steps = 20, 5, 40
        length, update = ["--max_iters=4"], ["--update_slots=64", "--max_iters=4"]
    folder, result = Path(folder), {}
    run_script("data/facts/prepare.py", f"--people={people}", f"--out={folder}/facts")
    run_script("data/facts/prepare.py", f"--people={people}", f"--new={new}", f"--out={folder}/new")
    demo = ["--preset=facts-memory", f"--dataset={folder}/facts", *where]
    for dtype in "float32", "bfloat16":
        result[dtype] = last = training.run_training(
            [*demo, *length, f"--dtype={dtype}"], folder / dtype
        )[-1]
        print(
            f"{dtype}: recall {last['recall']:.1%}, {last['tokens_per_s']:,.0f} tokens/s",
            flush=True,
        )

    short = [*demo, f"--max_iters={steps}", f"--eval_interval={steps // 4}", "--compile=false"]
    whole, out = training.run_training(short, folder / "whole")[-1], folder / "killed"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = subprocess.Popen([sys.executable, train.__file__, *short, f"--out_dir={out}"], **quiet)
    while killed.poll() is None and not (out / "ckpt.pt").exists():
        time.sleep(0.01)
    killed.kill()
    if killed.wait() != -signal.SIGKILL:
        raise RuntimeError(f"train.py was not killed, but ended with {killed.returncode}")
    run_script("train.py", "--resume", f"--out_dir={out}")
    resumed = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    result["resumed"] = [run["val_loss"] for run in (whole, resumed)]
    print(
        "killed and resumed: validation loss {1:.4f} instead of {0:.4f}".format(*result["resumed"])
    )
    apart = abs(resumed["val_loss"] - whole["val_loss"])  # not 0: a GPU adds in any order
    if resumed["iter"] != steps or apart > 0.2:
        raise RuntimeError(f"killed and resumed: {resumed} instead of {whole}")

    base, out = f"{folder}/bfloat16", folder / "update"
    update += ["--update=memory", f"--init_from={base}", f"--dataset={folder}/new"]
    lines = training.run_training([*update, *where], out)
    first, last = lines[0], lines[-1]
    result["update"] = {name: [first[name], last[name]] for name in ("recall", "old_recall")}
    print(
        "recall before and after an update: {recall} new, {old_recall} old".format(
            **result["update"]
        )
    )
    delta = [
        f"--out_dir={base}",
        f"--delta={out}/delta.pt",
        f"--dataset={folder}/new",
        f"--device={device}",
    ]
    said = run_script("sample.py", *delta, "--recall").splitlines()[-1]
    if abs(float(said.split()[1].rstrip("%")) / 100 - last["recall"]) > 0.01:
        raise RuntimeError(f"with its delta: {said}, in training {last['recall']:.1%}")
    reads = run_script("sample.py", *delta, "--start=The", "--inspect", "--json")
    result["inspected"] = [len(json.loads(line)["reads"]) for line in reads.splitlines()]
    if not all(result["inspected"]):
        raise RuntimeError(f"slots that tokens read: {result['inspected']}")
    return result


def tiles(device, folder):
    """Each kernel with other tiles than its own, the fastest first."""
    shape = dict(n=2, k=2, S=16, widths=(64,), dtype=torch.float32, N=8, K=4, repeats=1)
    if device.type == "cuda":
        shape = dict(
            n=16384, k=128, S=2**20, widths=(1024, 256), dtype=torch.bfloat16, N=1024, K=32
        )
    return lookup.tiles(device, **shape)


PARTS = {  # name: (function, seconds it may take on a GPU), the most important first
    "lookup": (lookups, 240),
    "gpt2-memory compiled": (preset_training("gpt2-memory", True), 320),
    "gpt2-dense compiled": (preset_training("gpt2-dense", True), 160),
    "layer": (layer, 90),
    "generation": (generation, 90),
    "facts": (facts, 420),
    "torchrun": (torchrun, 120),
    "tests": (tests, 300),
    "gpt2-memory eager": (preset_training("gpt2-memory", False), 200),
    "gpt2-dense eager": (preset_training("gpt2-dense", False), 160),
    "tiles": (tiles, 400),
}


# --- running the parts ------------------------------------------------------------------------------------


def versions(device):
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "card": card,
        "torch": torch.__version__,
        "triton": getattr(lookup.triton, "__version__", None),
    }


def run_part(name, device, seconds):
    """In a process of its own, which is killed after its time with all that it has started."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, __file__, f"--device={device}", f"--part={name}", f"--out={out}"]
        interpreted = {"TRITON_INTERPRET": "1"} if name == "tiles" and device.type == "cpu" else {}
        options = dict(start_new_session=True, stderr=subprocess.PIPE, env=os.environ | interpreted)
        process = subprocess.Popen(command, text=True, **options)
        began, failed = time.monotonic(), None
        try:
            _, errors = process.communicate(timeout=seconds)
            if process.returncode:
                failed = f"ended with {process.returncode}: {errors[-3000:]}"
        except subprocess.TimeoutExpired:
            failed = f"not done after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        took = {"took": time.monotonic() - began}
        if failed:
            return took | {"failed": failed}
        return took | {"result": json.loads(out.read_text())}


def row(label, values, form="{:,.0f}"):
    """A row of Markdown."""
    cells = ["not yet measured" if value is None else form.format(value) for value in values]
    return f"| {' | '.join([label, *cells])} |"


def tables(done):
    """The tables of bench/README.md, in Markdown."""
    got = {name: part.get("result") or {} for name, part in done["parts"].items()}
    lines = [f"{done['card']}, PyTorch {done['torch']}, Triton {done['triton']}"]
    if rows := got.get("lookup", {}).get("table"):
        copy = f"a copy moves {rows[0]['copy_GB/s']:,.0f} GB/s"
        lines += ["", f"| {copy} | forward | backward | RowAdam | embedding_bag, times as long |"]
        lines += ["|---|---|---|---|---|"]
        for r in rows:
            names, bag = ("forward", "backward", "RowAdam"), r["embedding_bag"]
            cells = [f"{r[f'{name}_GB/s']:,.0f} ({r[f'{name}_share']:.0%})" for name in names]
            cells.append(
                "does not fit" if bag is None else " / ".join(f"{ratio:.1f}" for ratio in bag)
            )
            lines.append(row(f"{r['slots']}, {r['S']:,} slots of {r['D']}", cells, "{}"))
    if t := got.get("layer"):
        memory, swiglu, plain = (t[f"{name}_ms"] for name in ("memory", "swiglu", "plain"))
        lines += ["", f"A layer's training step: {memory:.2f} ms, SwiGLU's {swiglu:.2f} ms: "]
        lines[-1] += f"{memory / swiglu:.2f} times as long; straightforward {plain:.2f} ms"
    presets = "gpt2-dense", "gpt2-memory"
    lines += [
        "",
        "| | {} | {} | {}, eager | {}, eager |".format(*presets, *presets),
        "|---|---|---|---|---|",
    ]
    runs = [got.get(f"{preset} {form}", {}) for form in ("compiled", "eager") for preset in presets]
    for label, name, form in (
        ("tokens a second", "tokens_per_s", "{:,.0f}"), ("MFU", "mfu", "{:.1%}"),
        ("peak memory, GiB", "gpu_gib", "{:.1f}"), ("reserved, GiB", "gpu_gib_reserved", "{:.1f}"),
    ):  # fmt: skip
        lines.append(row(label, [run.get(name) for run in runs], form))
    for part in training.PARTS:
        lines.append(row(part, [run.get("shares", {}).get(part) for run in runs], "{:.1%}"))
    if texts := got.get("generation"):
        lines += ["", "| tokens a second at batch 1 | first text | later texts |", "|---|---|---|"]
        lines += [
            row(name, [texts[f"{name}_first"], texts[f"{name}_later"]])
            for name in ("memory", "dense")
        ]
    rates = [[run.get("tokens_per_s") for run in runs[i : i + 2]] for i in (0, 2)]
    ratios = [
        f"{memory / dense:.2f}" if memory and dense else "not yet measured"
        for dense, memory in rates
    ]
    lines += ["", f"gpt2-memory / gpt2-dense, tokens a second: {ratios[0]}; eager {ratios[1]}"]
    if demo := got.get("facts"):
        recalls = ", ".join(
            f"{demo[dtype]['recall']:.1%} in {dtype}" for dtype in ("float32", "bfloat16")
        )
        lines += ["", f"facts-memory: recall {recalls}"]
        new, old = demo["update"]["recall"], demo["update"]["old_recall"]  # before, after
        lines += [
            "an update: new facts {:.1%}, then {:.1%}; old ones {:.1%}, then {:.1%}".format(
                *new, *old
            )
        ]
        lines += ["killed and resumed: loss {1:.4f} instead of {0:.4f}".format(*demo["resumed"])]
    if one := got.get("torchrun"):
        losses = ", ".join(f"{one[name]['loss']:.6f}" for name in ("python", "torchrun"))
        lines += ["", f"torchrun with one process / python: {one['ratio']:.3f}; losses {losses}"]
    if checks := got.get("lookup", {}).get("passed"):
        verdicts = ", ".join(f"{name} {'ok' if ok else 'FAILED'}" for name, ok in checks.items())
        lines += ["", f"checks against float64: {verdicts}"]
    lines += ["", f"tests: {got.get('tests', {}).get('summary', 'not run')}"]
    for name, part in done["parts"].items():
        lines += (
            [f"{name} FAILED: {part['failed'].strip().splitlines()[-1]}"]
            if "failed" in part
            else []
        )
    return "\n".join(lines)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, out = parser.add_argument, ROOT / "out" / "gpu.json"
    add("--device", default="auto", help="cpu or cuda; default: cuda where there is one")
    add("--out", type=Path, default=out, help="what has been measured (default: %(default)s)")
    add(
        "--minutes",
        type=float,
        default=45,
        help="begin no part that may end later (default: %(default)s)",
    )
    add(
        "--only",
        choices=list(PARTS),
        action="append",
        help="this part; can be given again",
        metavar="PART",
    )
    add("--part", choices=list(PARTS), help=SUPPRESS)  # of the process that runs one
    args = parser.parse_args()
    began = time.monotonic()
    try:
        device = train.choose_device(args.device)
    except ValueError as error:
        sys.exit(f"gpu.py: {error}")
    if args.part:
        with tempfile.TemporaryDirectory(
            dir=args.out.parent
        ) as folder:  # removed by who kills this process
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
    names.sort(key=lambda name: name in parts)  # those that have failed come last
    for name in names:
        (part, seconds), left = PARTS[name], began + 60 * args.minutes - time.monotonic()
        if left < min(seconds, 54 * args.minutes):
            print(f"\n{name}: left for the next call, {left:.0f} s are too few", flush=True)
            continue
        print(f"\n=== {name}: {part.__doc__}", flush=True)
        try:
            parts[name] = run_part(name, device, min(seconds, left))
        except KeyboardInterrupt:
            sys.exit(130)
        print(
            f"=== {name}: " + parts[name].get("failed", f"took {parts[name]['took']:.0f} s"),
            flush=True,
        )
        write_file(args.out, json.dumps(done, indent=1))
    print("\n" + tables(done))
    failed = [name for name, part in parts.items() if "failed" in part]
    sys.exit(f"gpu.py: failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
