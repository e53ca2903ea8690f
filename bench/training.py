"""How fast does a preset train, and where does the time go? Trains it for some steps, then profiles a few more.

    python bench/training.py gpt2 gpt2-memory --steps=300            tokens a second, MFU, peak memory, shares of a step
    python bench/training.py gpt2-smoke --steps=20 --batch_size=4    any option of train.py over the preset

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
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from data.dataset import describe_vocabulary, write_dataset
from memory import ValuePool

# What the profiler calls the parts of a step. Their times do not overlap; the rest is attention, networks, and the loss.
PARTS = {
    "choosing the slots": ("nanomem::select",),  # without the products of queries and sub-keys
    "lookup, forward": ("nanomem::lookup_forward",),
    "lookup, backward": ("nanomem::lookup_backward_into",),
    "taking out the gradient": ("combine_gradient",),
    "RowAdam": ("Optimizer.step#RowAdam.step",),
    "AdamW": ("Optimizer.step#AdamW.step",),
}


def random_dataset(folder, tokens=2**22, vocab_size=50257):
    ids = np.random.default_rng(0).integers(vocab_size, size=tokens, dtype=np.uint16)
    words = [bytes([i]) for i in range(256)] + [b"%03d" % i for i in range(256, vocab_size)]
    vocabulary = "gpt2" if vocab_size == 50257 else describe_vocabulary("random", r"[\s\S]", words, {})
    write_dataset(folder, ids, ids[: tokens // 8], vocabulary, vocab_size - 1, overwrite=True)


def run_training(arguments, folder, launcher=()):
    """Train in a process of its own, and wait for it. Returns the lines of its log."""
    command = [sys.executable, *launcher, train.__file__, *arguments, f"--out_dir={folder}", "--overwrite"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def throughput(preset, options, steps, folder, launcher=()):
    """What the log of a run says: medians over the second half of it."""
    arguments = [f"--preset={preset}", *options, f"--max_iters={steps}", f"--log_interval={max(1, steps // 20)}"]
    lines = run_training([*arguments, f"--eval_interval={steps}", "--eval_iters=1"], Path(folder) / preset, launcher)
    lines = lines[len(lines) // 2 :]
    names = ("tokens_per_s", "mfu", "gpu_gib", "gpu_gib_reserved", "data_wait", "loss")
    return {name: statistics.median(line[name] for line in lines) for name in names if name in lines[-1]}


def shares_of(events, on_gpu):
    """{part: share of the time of a step}, from torch.profiler's averages.

    On a GPU the averages hold each kernel's time several times: as its own, as that of the operation that started it, and of the
    ranges around that, which stand there once for the CPU and once for the GPU. So the step is the sum of the kernels themselves,
    and a part what was started within the CPU's range of that name; but RowAdam starts its kernel outside any operation, and the
    profiler links none to a range alone."""
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    if on_gpu:
        kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
        step = sum(event.self_device_time_total for event in kernels)
        parts = PARTS | {"RowAdam": ("adam_kernel",)}
        times = {event.key: event.device_time_total for event in on_cpu}
        times |= {event.key: event.self_device_time_total for event in kernels}
    else:
        step = sum(event.cpu_time_total for event in on_cpu if event.key.startswith("ProfilerStep"))
        parts, times = PARTS, {event.key: event.cpu_time_total for event in on_cpu}
    return {part: sum(times.get(name, 0) for name in names) / step for part, names in parts.items()}


def shares(preset, options, folder, warmup=6, steps=6):
    """Profile `steps` steps of the loop itself, after some that warm up."""
    argv = [f"--preset={preset}", *options, f"--out_dir={folder}/profile-{preset}", f"--max_iters={warmup + steps}"]
    argv += ["--eval_interval=1000000", "--log_interval=1000000", "--eval_iters=1", "--overwrite"]
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
    # A process that profiles does nothing else after it.
    ValuePool.combine_gradient = torch.profiler.record_function("combine_gradient")(ValuePool.combine_gradient)
    train.save_checkpoint = lambda *_: None  # gigabytes that nobody will read
    with profiler:
        train.train(*arguments)
    return shares_of(found[0], on_gpu)


def describe(preset, measured, first):
    text = f"{preset}: {measured['tokens_per_s']:,.0f} tokens/s, waiting for data {measured['data_wait']:.2%}"
    text += f", MFU {measured['mfu']:.1%}" if "mfu" in measured else ""
    text += f", {measured['gpu_gib']:.1f} GiB ({measured['gpu_gib_reserved']:.1f} reserved)" if "gpu_gib" in measured else ""
    return f"{text}; {measured['tokens_per_s'] / first['tokens_per_s']:.2f} of the first"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="+", choices=list(train.PRESETS), help=", ".join(train.PRESETS), metavar="PRESET")
    parser.add_argument("--steps", type=int, default=300, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--dataset", help="as in train.py (default: random tokens)")
    parser.add_argument("--profile", action="store_true", help="print the shares of a step of one preset and nothing else: JSON")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.dataset:
            random_dataset(folder)
        options.append(f"--dataset={args.dataset or folder}")
        if args.profile:
            print(json.dumps(shares(args.preset[0], options, folder)))
            return
        print(f"PyTorch {torch.__version__}; {args.steps} steps", flush=True)
        rates = []
        for preset in args.preset:
            rates.append(throughput(preset, options, args.steps, folder))
            print(describe(preset, rates[-1], rates[0]), flush=True)
            profile = [sys.executable, __file__, preset, "--profile", *options]  # its memory is free again when it ends
            done = subprocess.run(profile, capture_output=True, text=True, check=True).stdout
            for part, share in json.loads(done.splitlines()[-1]).items():
                print(f"  {part:24} {share:6.1%} of a step", flush=True)


if __name__ == "__main__":
    main()
