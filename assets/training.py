"""How fast does a preset train, and where does the time go? Trains it for some steps, then profiles a few more.

    python assets/training.py gpt2 gpt2-memory --steps=300            tokens a second, MFU, peak memory, shares of a step
    python assets/training.py gpt2-smoke --steps=20 --batch_size=4    any option of train.py over the preset

Trains on --dataset, or on random tokens where there is none: then rows are read more evenly than by text.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from data.dataset import write_dataset

# What the profiler calls the parts of a step. Their times do not overlap; the rest is attention, networks, and the loss.
PARTS = {
    "choosing the slots": ("nanomem::select", "nanomem::select_backward"),  # without the products of queries and sub-keys
    "lookup": ("Lookup", "LookupBackward"),
    "adding up gradients": ("aten::coalesce",),
    "RowAdam": ("Optimizer.step#RowAdam.step",),
    "AdamW": ("Optimizer.step#AdamW.step",),
}


def random_dataset(folder, tokens=2**22, vocab_size=50257):
    ids = np.random.default_rng(0).integers(vocab_size, size=tokens, dtype=np.uint16)
    write_dataset(folder, ids, ids[: tokens // 8], "gpt2", vocab_size, 50256)


def throughput(preset, options, steps, folder):
    """Train in a process of its own. Returns what its log says, medians over the second half of it."""
    log_every = max(1, steps // 20)
    out = Path(folder) / preset
    command = [sys.executable, train.__file__, f"--preset={preset}", *options, f"--out_dir={out}", f"--max_iters={steps}"]
    command += [f"--log_interval={log_every}", f"--eval_interval={steps}", "--eval_iters=1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = lines[len(lines) // 2 :]
    names = ("tokens_per_s", "mfu", "gpu_gib", "data_wait", "loss")
    return {name: statistics.median(line[name] for line in lines) for name in names if name in lines[-1]}


def shares(preset, options, folder, warmup=6, steps=6):
    """Profile `steps` steps of the loop itself. Returns {part: share of the time of a step}."""
    argv = [f"--preset={preset}", *options, f"--out_dir={folder}/profile-{preset}", f"--max_iters={warmup + steps}"]
    argv += ["--eval_interval=1000000", "--log_interval=1000000", "--eval_iters=1"]
    arguments = train.start(train.parse_options(argv), train.Ranks())
    optimizers, device = arguments[1], arguments[4]
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    schedule = torch.profiler.schedule(wait=warmup - 2, warmup=1, active=steps)
    found = []
    profiler = torch.profiler.profile(
        activities=activities, schedule=schedule, on_trace_ready=lambda profile: found.append(profile.key_averages())
    )
    optimizers[-1].register_step_post_hook(lambda *_: profiler.step())
    with profiler:
        train.train(*arguments)

    def total(event):  # microseconds: of the kernels that an operation started, or of the operation itself on a CPU
        return event.device_time_total if on_gpu else event.cpu_time_total

    events = {event.key: event for event in found[0]}
    step = sum(total(event) for name, event in events.items() if name.startswith("ProfilerStep"))
    if on_gpu:  # what all kernels took
        step = sum(event.self_device_time_total for event in events.values() if not event.is_user_annotation)
    return {part: sum(total(events[name]) for name in names if name in events) / step for part, names in PARTS.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="+", choices=list(train.PRESETS), help=", ".join(train.PRESETS), metavar="PRESET")
    parser.add_argument("--steps", type=int, default=300, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--dataset", help="as in train.py (default: random tokens)")
    args, options = parser.parse_known_args()
    device = train.choose_device("auto")
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else device}; {args.steps} steps")
    with tempfile.TemporaryDirectory() as folder:
        if not args.dataset:
            random_dataset(folder)
        options.append(f"--dataset={args.dataset or folder}")
        rates = {}
        for preset in args.preset:
            measured = throughput(preset, options, args.steps, folder)
            rates[preset] = measured["tokens_per_s"]
            text = f"{measured['tokens_per_s']:,.0f} tokens/s, waiting for data {measured['data_wait']:.2%}"
            text += f", MFU {measured['mfu']:.1%}" if "mfu" in measured else ""
            text += f", {measured['gpu_gib']:.1f} GiB" if "gpu_gib" in measured else ""
            print(f"{preset}: {text}; {rates[preset] / rates[args.preset[0]]:.2f} of {args.preset[0]}", flush=True)
            for part, share in shares(preset, options, folder).items():
                print(f"  {part:20} {share:6.1%} of a step", flush=True)


if __name__ == "__main__":
    main()
