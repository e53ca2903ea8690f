"""How fast does a preset train, and what takes the time? Trains it for some steps, then profiles a few more.

    python bench/training.py gpt2-dense gpt2-memory --steps=300     tokens/s, MFU, peak memory, profile
    python bench/training.py shakespeare-memory --steps=20 --batch_size=4      any option of train.py

Trains on --dataset, or on random tokens: these read the rows more evenly than text does.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from data.dataset import describe_vocabulary, write_dataset
from data.presets import PRESETS
from kernels import RowAdam
from memory import ValuePool
from model import GPT, GPTConfig

# The profiler's names of parts of a step that do not overlap. The rest is attention, networks, and the loss.
PARTS = {
    "choosing the slots": "nanomem::select",  # without the products of queries and sub-keys
    "lookup, forward": "nanomem::lookup_forward",
    "lookup, backward": "nanomem::lookup_backward_into",
    "taking out the gradient": "take_gradient",
    "products of experts": "aten::_grouped_mm",
    "RowAdam": "RowAdam.update",
    "AdamW": "aten::_fused_adamw_",  # the range around it is open when the profiler stops
}


def record_parts():
    """Give names to parts of a step that are no operators. Nothing else is to run in this process."""
    ValuePool.take_gradient = torch.profiler.record_function("take_gradient")(
        ValuePool.take_gradient
    )
    RowAdam.update = torch.profiler.record_function("RowAdam.update")(RowAdam.update)


def random_dataset(folder, tokens=2**22, vocab_size=50257):
    ids = np.random.default_rng(0).integers(vocab_size, size=tokens, dtype=np.uint16)
    vocabulary = "gpt2"
    if vocab_size != 50257:
        words = [bytes([i]) for i in range(256)] + [b"%03d" % i for i in range(256, vocab_size)]
        vocabulary = describe_vocabulary("random", r"[\s\S]", words, {})
    write_dataset(folder, ids, ids[: tokens // 8], vocabulary, vocab_size - 1, overwrite=True)


def run_training(arguments, folder, launcher=()):
    """Train in a process of its own, and wait for it. Returns the lines of its log."""
    command = [
        sys.executable,
        *launcher,
        train.__file__,
        *arguments,
        f"--out_dir={folder}",
        "--overwrite",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "3090": 71e12,
}


def mfu(tokens_per_s, folder):
    """{"mfu": share of the bf16 FLOPs of the card's data sheet}, or {} for a card not in the list."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    config = GPTConfig(**train.read_checkpoint(folder / "ckpt.pt")["model_config"])
    with torch.device("meta"):
        flops = 3 * sum(GPT(config).flops_per_token(config.block_size).values())
    peak = next((peak for name, peak in PEAK_FLOPS.items() if name in card), None)
    return {"mfu": tokens_per_s * flops / peak} if peak else {}


def throughput(preset, options, steps, folder, launcher=()):
    """Medians over the second half of a run's log."""
    arguments = [f"--preset={preset}", *options, f"--max_iters={steps}", f"--eval_interval={steps}"]
    arguments += [f"--log_interval={max(1, steps // 20)}", "--eval_iters=1"]
    out_dir = Path(folder) / preset
    lines = run_training(arguments, out_dir, launcher)
    lines = lines[len(lines) // 2 :]
    names = ("tokens_per_s", "gpu_gib", "gpu_gib_reserved", "loss")
    result = {
        name: statistics.median(line[name] for line in lines) for name in names if name in lines[-1]
    }
    return result | mfu(result["tokens_per_s"], out_dir)


def shares_of(events, on_gpu):
    """{part: share of the time of a step}, from torch.profiler's averages.

    On a GPU each kernel's time is in several of them: its own, that of the operation that started it, and
    those of the ranges around it, once for the CPU and once for the GPU. So a step is the sum of the kernels
    themselves, and a part what was started in the CPU's range of that name. But RowAdam starts its kernel
    outside any operation, and the profiler links none to a range alone."""
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    if on_gpu:
        kernels = [
            e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation
        ]
        step = sum(event.self_device_time_total for event in kernels)
        parts = PARTS | {"RowAdam": "adam_kernel"}
        times = {event.key: event.device_time_total for event in on_cpu}
        times |= {event.key: event.self_device_time_total for event in kernels}
        times["adam_kernel"] = times.get("adam_kernel", 0) + times.get(
            "aten::random_", 0
        )  # bits to round by
    else:
        step = sum(event.cpu_time_total for event in on_cpu if event.key.startswith("ProfilerStep"))
        parts, times = PARTS, {event.key: event.cpu_time_total for event in on_cpu}
    return {part: times.get(name, 0) / step for part, name in parts.items()}


def shares(preset, options, folder, warmup=6, steps=6):
    """Profile `steps` steps of the training loop, after some that warm up."""
    argv = [f"--preset={preset}", *options, f"--out_dir={folder}/profile-{preset}", "--overwrite"]
    argv += ["--eval_interval=1000000", "--log_interval=1000000", "--eval_iters=1"]
    argv.append(f"--max_iters={warmup + steps}")
    run = train.start(train.parse_options(argv), train.Ranks())
    on_gpu = run.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [
        torch.profiler.ProfilerActivity.CUDA
    ] * on_gpu
    schedule = torch.profiler.schedule(wait=warmup - 2, warmup=1, active=steps)
    found = []
    profiler = torch.profiler.profile(
        activities=activities,
        schedule=schedule,
        on_trace_ready=lambda p: found.append(p.key_averages()),
    )

    def after_step(*_):
        if on_gpu:
            torch.cuda.synchronize()  # or the first step that counts has kernels of the one before
        profiler.step()

    run.optimizers[-1].register_step_post_hook(after_step)
    record_parts()
    train.save_checkpoint = lambda *_: None  # gigabytes that nobody will read
    with profiler:
        train.train(run)
    return shares_of(found[0], on_gpu)


def describe(preset, measured, first):
    text = f"{preset}: {measured['tokens_per_s']:,.0f} tokens/s"
    text += f", MFU {measured['mfu']:.1%}" if "mfu" in measured else ""
    if "gpu_gib" in measured:
        text += f", {measured['gpu_gib']:.1f} GiB ({measured['gpu_gib_reserved']:.1f} reserved)"
    return f"{text}; {measured['tokens_per_s'] / first['tokens_per_s']:.2f} of the first"


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, names = parser.add_argument, list(PRESETS)
    add("preset", nargs="+", choices=names, help=", ".join(names), metavar="PRESET")
    add("--steps", type=int, default=300, help="steps that are timed (default: %(default)s)")
    add("--dataset", help="as in train.py (default: random tokens)")
    add(
        "--profile",
        action="store_true",
        help="only print the shares of a step of one preset, as JSON",
    )
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
            # in a process of its own, whose memory is free again when it ends
            profile = [sys.executable, __file__, preset, "--profile", *options]
            done = subprocess.run(profile, capture_output=True, text=True, check=True).stdout
            for part, share in json.loads(done.splitlines()[-1]).items():
                print(f"  {part:24} {share:6.1%} of a step", flush=True)


if __name__ == "__main__":
    main()
