"""Train a GPT, with memory layers or without.

    python train.py                                 a small Memory+ model on facts it has to remember; minutes on a laptop
    python train.py --preset=facts-dense            the same compute without a memory, to compare
    python train.py --preset=facts-memory --mem_keys=64 --out_dir=out/small     any option over any preset
    python train.py --resume --out_dir=out/small    go on where that run stopped, to the same numbers

Options are the fields of TrainConfig below and of GPTConfig in model.py. Read from the bottom: main, train, evaluate.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import difflib
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import time
import typing
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # Apple GPUs lack a few sparse operators: those run on the CPU
import torch
from tqdm import tqdm

from data.dataset import Dataset, atomic_write, find_folder, open_dataset, write_file
from kernels import RowAdam
from model import GPT, GPTConfig, option


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError, naming the option, for a value that makes no sense."""

    out_dir: str = option("out", "folder for checkpoints and log; a preset has its own, out/PRESET")
    resume: bool = option(False, "go on with the run in out_dir, with its options")
    overwrite: bool = option(False, "replace the run in out_dir")
    dataset: str = option("facts", "a folder in data/, or the path of one with train.bin and val.bin")
    batch_size: int = option(8, "sequences in a micro-step")
    gradient_accumulation_steps: int = option(1, "micro-steps in a step")
    max_iters: int = option(1000, "steps to train for; the learning rate falls over all of them")
    learning_rate: float = option(6e-4, "largest learning rate of the network (AdamW)")
    min_lr: float = option(0.0, "learning rate of the network that the cosine ends at")
    warmup_iters: int = option(50, "steps over which the learning rate rises to its largest")
    mem_learning_rate: float = option(3e-3, "learning rate of the memory's values (RowAdam)")
    weight_decay: float = option(0.1, "AdamW's decay of matrices; gains and memory values are not decayed")
    beta1: float = option(0.9, "decay of the mean of the gradient, AdamW and RowAdam")
    beta2: float = option(0.98, "decay of the mean of its square, AdamW and RowAdam")
    grad_clip: float = option(1.0, "largest norm of the network's gradient; 0: any")
    eval_interval: int = option(250, "steps between evaluations, each followed by a checkpoint")
    eval_iters: int = option(20, "batches in an estimate of the loss")
    log_interval: int = option(10, "steps between lines of the log")
    seed: int = option(1, "of first values, order of the data, and dropout")
    device: str = option("auto", "cpu, cuda, mps; auto: the fastest there is")
    dtype: str = option("auto", "float32 or bfloat16; auto: bfloat16 on a GPU that has it")
    compile: str = option("auto", "true, false; auto: torch.compile on a GPU")

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "eval_iters", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("learning_rate", "min_lr", "weight_decay", "grad_clip", "warmup_iters"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be 0 to 2**63 - 1")
        if not 0 < self.mem_learning_rate < math.inf:
            raise ValueError(f"mem_learning_rate={self.mem_learning_rate}: must be above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0 and below 1")
        for name, choices in (("dtype", ("auto", "float32", "bfloat16")), ("compile", ("auto", "true", "false"))):
            object.__setattr__(self, name, getattr(self, name).lower())  # nanoGPT's True and False will do
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)}: must be one of {', '.join(choices)}")


# Within a family the presets have the same data, the same steps, and FLOPs a token within 3% of each other.
FACTS = dict(dataset="facts", n_layer=4, n_head=4, n_embd=64, block_size=128, max_iters=1800, eval_interval=300)
FACTS |= dict(mem_keys=128, mem_topk=16, mem_learning_rate=1e-2)
SHAKESPEARE = dict(dataset="shakespeare", n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, learning_rate=2e-3)
SHAKESPEARE |= dict(mem_keys=128, mem_topk=16, mem_learning_rate=3e-3)
GPT2 = dict(dataset="openwebtext", n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=32, beta2=0.95, min_lr=6e-5)
GPT2 |= dict(gradient_accumulation_steps=15, max_iters=18000, warmup_iters=700)  # 18,000 * 491,520 tokens: OpenWebText once
GPT2 |= dict(eval_interval=1000, eval_iters=50, mem_keys=1024, mem_dtype="bfloat16", mem_learning_rate=1e-3)
SMALL = GPT2 | dict(n_layer=8, n_head=8, n_embd=512, block_size=512, mem_keys=512, gradient_accumulation_steps=8)
SMALL |= dict(max_iters=8000, warmup_iters=400, eval_interval=500, learning_rate=1e-3, min_lr=1e-4)  # 1.05e9 tokens
SMOKE = SHAKESPEARE | dict(dataset="openwebtext", batch_size=8, max_iters=300, eval_interval=100)  # does everything work?
PRESETS = {
    "facts-memory": FACTS | dict(mem_count=1, learning_rate=4e-3),
    "facts-dense": FACTS | dict(learning_rate=8e-3),
    "facts-pkm": FACTS | dict(mem_count=1, mem_gate=False, mem_qk_norm=False, learning_rate=4e-3),
    "shakespeare-memory": SHAKESPEARE | dict(mem_count=1),
    "shakespeare-dense": SHAKESPEARE,
    "gpt2": GPT2,
    "gpt2-memory": GPT2 | dict(mem_count=3),
    "gpt2-small-memory": SMALL | dict(mem_count=2),
    "gpt2-smoke": SMOKE | dict(mem_count=1),
}


# --- command line -----------------------------------------------------------------------------------------------------


def to_bool(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError
    return text.lower() in ("true", "1")


def to_numbers(text):
    return tuple(int(part) for part in text.split(",") if part)


def parse_options(argv):
    """argv -> {option: value} of what was given on the command line, presets not yet applied. Exits 2 on what it cannot read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--preset", default=argparse.SUPPRESS, help=f"{', '.join(PRESETS)} (default: the first)")
    known = ["preset"]
    for title, cls in (("training", TrainConfig), ("model", GPTConfig)):
        group = parser.add_argument_group(title)
        types = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.name == "vocab_size":  # the dataset says
                continue
            known.append(f.name)
            kind = {bool: to_bool, tuple[int, ...]: to_numbers}.get(types[f.name], types[f.name])
            optional_value = {"nargs": "?", "const": True} if kind is to_bool else {}  # --resume alone means true
            help = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
            group.add_argument(f"--{f.name}", type=kind, metavar="", default=argparse.SUPPRESS, help=help, **optional_value)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], known, n=1)
        parser.error(f"unknown option {unknown[0]}" + (f"; did you mean --{close[0]}?" if close else "; see --help"))
    return vars(options)


def make_configs(options, vocab_size=None):
    """{option: value} -> TrainConfig, GPTConfig. Raises ValueError for values that do not fit."""
    names = {f.name for f in dataclasses.fields(GPTConfig)}
    train_options = {name: value for name, value in options.items() if name not in names}
    model_options = {name: value for name, value in options.items() if name in names}
    if vocab_size is not None:
        model_options["vocab_size"] = vocab_size
    return TrainConfig(**train_options), GPTConfig(**model_options)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(path, checkpoint):
    """Tensors and plain values only. Whole or not at all: a full disk or a kill leaves the checkpoint that was there."""
    try:
        with atomic_write(path) as f:
            torch.save(checkpoint, f)
    except (OSError, RuntimeError) as error:
        kept = "The one before is untouched: go on with --resume" if Path(path).exists() else "There was none before: start again"
        raise OSError(f"could not write the checkpoint {path} ({error}). {kept} when there is room on the disk") from None


def load_checkpoint(path, device="cpu"):
    """The checkpoint as a dictionary, its "model" a GPT with its weights. Nothing in the file is executed.

    Raises FileNotFoundError or ValueError, naming the file, for one that is missing, damaged, or something else."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; out_dir= must name the folder of a run that has saved one")
    try:
        mmap = zipfile.is_zipfile(path)  # as torch.save writes: read what is used, so that sampling leaves out the moments
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is not a checkpoint, or holds more than tensors and plain values: it was not loaded") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != "nanomem-1":
        raise ValueError(f"{path} is not a checkpoint of nanomem")
    try:
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        TrainConfig(**checkpoint["train_config"])
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: the weights do not fit the configuration beside them ({str(error)[:300]})") from None
    return {**checkpoint, "model": model.to(device)}


# --- the parts of a run -----------------------------------------------------------------------------------------------


def choose_device(name):
    """A torch.device. Raises ValueError for one that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # what is left in float32 may use TF32
        elif platform.libc_ver()[0] == "glibc":  # it gives large blocks back to the system as soon as they are free, and a step
            libc = ctypes.CDLL(None)  # has to take them again, page by page: 7% of its time
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name} cannot be used here ({str(error).splitlines()[0]}); try device=cpu") from None
    return device


def precision(name, device):
    """The context to compute in: autocast to bfloat16, or float32 throughout."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return torch.autocast(device.type, torch.bfloat16) if name == "bfloat16" else contextlib.nullcontext()


def learning_rate(config, it):
    """Linear warmup, then a cosine from learning_rate to min_lr at max_iters. it counts from 0."""
    if it < config.warmup_iters:
        return config.learning_rate * (it + 1) / (config.warmup_iters + 1)
    progress = (it - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.min_lr + (config.learning_rate - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model, config):
    """AdamW for the network; RowAdam for the pool, which moves only the rows that a step has read."""
    groups = model.parameter_groups()
    network = [
        {"params": groups["matrices"], "weight_decay": config.weight_decay},
        {"params": groups["gains"], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers = [torch.optim.AdamW(network, lr=config.learning_rate, betas=betas)]
    if groups["pool"]:
        optimizers.append(RowAdam(groups["pool"], lr=config.mem_learning_rate, betas=betas, seed=config.seed))
    return optimizers


def inputs_and_targets(windows, device):
    """windows (B, T + 1), a CPU tensor -> two tensors (B, T) on the device."""
    windows = windows.to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]


def prefetch(batches, numbers, device):
    """Yield batches(n) for each n of numbers as a CPU tensor. While the device computes with one, a thread prepares the next."""

    def prepare(n):
        windows = torch.from_numpy(batches(n))
        return windows.pin_memory() if device.type == "cuda" else windows  # for a copy that nobody waits for

    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device if device.type == "cuda" else None, initargs=(device,)) as thread:
        waiting = collections.deque()
        for n in numbers:
            waiting.append(thread.submit(prepare, n))
            if len(waiting) == 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@torch.no_grad()
def mean_loss(model, batches, config, device):
    """Mean loss over eval_iters batches, the same ones every time."""
    total = 0.0
    for i in range(config.eval_iters):
        windows = torch.from_numpy(batches(range(i * config.batch_size, (i + 1) * config.batch_size)))
        total += model(*inputs_and_targets(windows, device))[1].item()
    return total / config.eval_iters


def answer(model, questions, separator):
    """What the model says to closed-book questions (Dataset.questions): lists of tokens, each as long as the right answer."""
    prompts = [[separator, *question["prompt_ids"]] for question in questions]
    return model.complete(prompts, [len(question["answer_ids"]) for question in questions])


def evaluate(model, data, config, device):
    """Losses, recall if the dataset asks questions, and how evenly a memory is used. Leaves the random state alone."""
    model.eval()
    usage = contextlib.nullcontext() if model.pool is None else model.pool.record_usage()
    result = {"train_loss": mean_loss(model, data["train_eval"], config, device)}
    with usage as counts:
        result["val_loss"] = mean_loss(model, data["val_eval"], config, device)
    if data["questions"]:
        got = answer(model, data["questions"], data["separator"])
        right = sum(ids == question["answer_ids"] for ids, question in zip(got, data["questions"], strict=True))
        result["recall"] = right / len(data["questions"])
    if counts is not None:
        result |= {f"mem_{name}": value for name, value in counts.summary().items()}
    model.train()
    return result


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}  # bf16, dense


def peak_flops(device):
    """Of the card, from its data sheet; None for one that is not in the list."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


# --- training ---------------------------------------------------------------------------------------------------------


def bound_gradient(pool):
    """Add up the gradients of each row of the table once there are more of them than rows: the micro-steps of a large batch read
    nearly all rows, each step anew."""
    if pool is not None and pool.values.grad._nnz() > len(pool.values):
        pool.values.grad = pool.values.grad.coalesce()


class Stop:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; the second one ends the process at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


def refuse_nan(number, it, config, what="loss"):
    if not math.isfinite(number):
        raise FloatingPointError(
            f"the {what} is {number} at step {it}: training has diverged. {config.out_dir} keeps what was saved before. "
            f"Try a smaller learning_rate (now {config.learning_rate:g}) or mem_learning_rate "
            f"(now {config.mem_learning_rate:g}), or a longer warmup_iters"
        )


def train(model, optimizers, data, config, device, state):
    """The loop. state: {"iter", "best_val_loss", "seconds"}, updated in place. Returns the last evaluation. Exits with 128 and
    the number of the signal if one stops the run, after saving."""
    out_dir, stop = Path(config.out_dir), Stop()
    context = precision(config.dtype, device)
    compiled = config.compile == "true" or (config.compile == "auto" and device.type == "cuda" and os.name == "posix")
    run_model = torch.compile(model) if compiled else model
    network = [p for group in optimizers[0].param_groups for p in group["params"]]
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * model.config.block_size
    flops_per_step = 3 * sum(model.flops_per_token(model.config.block_size).values()) * tokens_per_step
    peak, result = peak_flops(device), None

    def save(name, with_optimizers=True):
        # The loss of this step was that before its update.
        refuse_nan(sum(p.detach().norm(math.inf).item() for p in model.parameters()), state["iter"], config, "largest weight")
        checkpoint = {
            "format": "nanomem-1",
            "model_config": dataclasses.asdict(model.config),
            "train_config": dataclasses.asdict(config),
            "model": model.state_dict(),
            **{name: data[name] for name in ("vocabulary", "separator", "fingerprint")},
            "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None},
            **state,
        }
        if with_optimizers:
            checkpoint["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(out_dir / name, checkpoint)

    first, end = (n * config.gradient_accumulation_steps for n in (state["iter"], config.max_iters))  # micro-steps of the run
    numbers = (range(n * config.batch_size, (n + 1) * config.batch_size) for n in range(first, end))
    loader = prefetch(data["train"], numbers, device)
    bar = tqdm(total=config.max_iters, initial=state["iter"], unit="step", desc=out_dir.name, dynamic_ncols=True)
    shown, clock, since, waited = {}, time.perf_counter(), state["iter"], 0.0
    while state["iter"] < config.max_iters:
        it = state["iter"]
        lr = learning_rate(config, it)
        for group in optimizers[0].param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for micro in range(config.gradient_accumulation_steps):
            asked = time.perf_counter()
            windows = next(loader)
            waited += time.perf_counter() - asked
            with context:
                micro_loss = run_model(*inputs_and_targets(windows, device))[1] / config.gradient_accumulation_steps
            micro_loss.backward()
            loss += micro_loss.detach()
            if micro + 1 < config.gradient_accumulation_steps:
                bound_gradient(model.pool)
        if config.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(network, config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state["iter"] = it = it + 1
        bar.update()

        evaluating, stopped_by = it % config.eval_interval == 0 or it == config.max_iters, stop.signal
        if it % config.log_interval == 0 or evaluating or stopped_by:
            loss = loss.item()  # waits for the GPU
            refuse_nan(loss, it, config)
            now = time.perf_counter()
            state["seconds"] += now - clock
            line = {"iter": it, "loss": loss, "lr": lr, "tokens_per_s": (it - since) * tokens_per_step / (now - clock)}
            line["data_wait"] = waited / (now - clock)  # share of the time
            shown |= {"loss": f"{loss:.3f}", "tok/s": f"{line['tokens_per_s']:,.0f}"}
            if device.type == "cuda":
                line["gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
                shown["GPU"] = f"{line['gpu_gib']:.1f} GiB"
            if peak:
                line["mfu"] = line["tokens_per_s"] / tokens_per_step * flops_per_step / peak
                shown["mfu"] = f"{line['mfu']:.1%}"
            if evaluating:
                with context:
                    result = evaluate(model, data, config, device)
                refuse_nan(result["val_loss"], it, config)
                line |= result
                shown["val"] = f"{result['val_loss']:.3f}"
                shown |= {"recall": f"{result['recall']:.1%}"} if "recall" in result else {}
                shown |= {"mem": f"{result['mem_used']:.0%} used"} if "mem_used" in result else {}
            with open(out_dir / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            bar.set_postfix(shown)
            if evaluating and result["val_loss"] < state["best_val_loss"]:
                state["best_val_loss"] = result["val_loss"]
                save("best.pt", with_optimizers=False)
            if evaluating or stopped_by:
                save("ckpt.pt")
            clock, since, waited = time.perf_counter(), it, 0.0  # evaluation and saving are not training time
        if stopped_by and it < config.max_iters:  # at the last step the run is complete anyway
            bar.close()
            print(f"Stopped by {signal.Signals(stopped_by).name} after step {it}; {out_dir / 'ckpt.pt'} is saved.")
            print(f"Go on with: python train.py --resume --out_dir={out_dir}")
            sys.exit(128 + stopped_by)
    bar.close()
    return result


def describe(model):
    counts, flops = model.parameter_counts(), model.flops_per_token(model.config.block_size)
    c = model.config
    text = f"{counts['dense']:,} parameters"
    if counts["pool"]:
        layers = ", ".join(map(str, c.mem_layers))
        text += f" + {counts['pool']:,} in the memory ({c.mem_keys**2:,} slots of width {c.mem_value_dim}, read in block {layers})"
    return f"{text}; {sum(flops.values()) / 1e6:.3f} MFLOPs a token forward"


def summarize(model, result, config, state, questions):
    tokens = state["iter"] * config.batch_size * config.gradient_accumulation_steps * model.config.block_size
    print(f"\n{state['iter']:,} steps, {tokens:,} tokens in {state['seconds']:.0f} s of training")
    print(f"  {describe(model)}")
    print(f"  loss         {result['train_loss']:.3f} train, {result['val_loss']:.3f} validation (nats a token)")
    if "recall" in result:
        print(f"  recall       {result['recall']:.1%} of {len(questions):,} closed-book questions")
    if "mem_used" in result:
        used, kl, top1 = (result[f"mem_{name}"] for name in ("used", "kl", "top1"))
        print(f"  memory       {used:.1%} of slots read; KL from even use {kl:.2f} nats; the busiest 1% get {top1:.1%} of reads")
    print(f"  written to   {config.out_dir}/ckpt.pt (last), best.pt (lowest validation loss), log.jsonl")
    print("\nNext:")
    print(f"  python sample.py --out_dir={config.out_dir}" + (" --recall" if "recall" in result else ""))
    if model.pool is not None and config.dataset == "facts":
        print("  python train.py --preset=facts-dense      # the same compute without a memory")


def build_model(config):
    """A GPT. Raises ValueError if this machine cannot hold it."""
    try:
        return GPT(config)
    except RuntimeError as error:
        size = {"float32": 4, "bfloat16": 2}[config.mem_dtype]
        need = config.mem_keys**2 * config.mem_value_dim * size / 2**30 if config.mem_layers else 0
        reason = str(error).splitlines()[0]
        raise ValueError(f"the model does not fit ({reason}); with these mem_keys its table alone takes {need:,.1f} GiB") from None


def start(options):
    """Everything that can be wrong is found here, before training. Returns the arguments of train()."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("train.py runs in one process for now: start it with python, not with torchrun")
    if not options.get("resume"):
        name = options.pop("preset", next(iter(PRESETS)))
        if name not in PRESETS:
            raise ValueError(f"preset={name}: there is {', '.join(PRESETS)}")
        options = {"out_dir": f"out/{name}"} | PRESETS[name] | options
    else:
        if "preset" in options:
            raise ValueError("preset: a resumed run keeps its options; give --resume and --out_dir, and what you want to change")
        options["out_dir"] = options.get("out_dir", "out/facts-memory")
        path = Path(options["out_dir"]) / "ckpt.pt"
        checkpoint = load_checkpoint(path)
        if "optimizers" not in checkpoint:
            raise ValueError(f"{path} has weights only, like a best.pt: it can be sampled from, but training cannot go on from it")
        saved = {**checkpoint["train_config"], **checkpoint["model_config"]}
        fixed = {f.name for f in dataclasses.fields(GPTConfig)} | {"seed", "batch_size", "gradient_accumulation_steps"}
        for name in fixed & set(options):
            if options[name] != saved[name]:
                raise ValueError(f"{name}={options[name]}: the run in {path.parent} has {name}={saved[name]} and must keep it")
        options = saved | options
    config, _ = make_configs(options)
    device = choose_device(config.device)
    torch.manual_seed(config.seed)

    folder = find_folder(config.dataset)
    if config.resume:
        model = checkpoint["model"].to(device)
        if checkpoint["fingerprint"] != Dataset(folder).fingerprint():
            raise ValueError(f"dataset={config.dataset}: {folder} does not hold the data that {path} was trained on")
    else:
        model = build_model(make_configs(options, Dataset(folder).vocab_size)[1]).to(device)
    data = open_dataset(folder, model.config.block_size, config.seed)
    optimizers = make_optimizers(model, config)
    state = {"iter": 0, "best_val_loss": math.inf, "seconds": 0.0}

    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for half_written in out_dir.glob("*.tmp"):  # by a run that was killed
        half_written.unlink()
    log = out_dir / "log.jsonl"
    if config.resume:
        state = {name: checkpoint[name] for name in state}
        if state["iter"] >= config.max_iters:
            raise ValueError(f"the run in {out_dir} is complete at step {state['iter']}; to go on, give a larger max_iters")
        for optimizer, saved_state in zip(optimizers, checkpoint["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # with the rates and decays of this command line
            optimizer.load_state_dict(saved_state | {"param_groups": groups})
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if device.type == "cuda" and checkpoint["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"])
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill can cut the last one short
        write_file(log, "".join(line for line in whole if json.loads(line)["iter"] <= state["iter"]))
    else:
        old = [name for name in ("ckpt.pt", "best.pt", "log.jsonl") if (out_dir / name).exists()]
        if old and not config.overwrite:
            raise ValueError(
                f"{out_dir} holds a run already ({', '.join(old)}): go on with it (--resume), replace it (--overwrite), "
                "or give another --out_dir"
            )
        for name in old:
            (out_dir / name).unlink()
    return model, optimizers, data, config, device, state


def main(argv):
    options = parse_options(argv)
    try:
        model, optimizers, data, config, device, state = start(options)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:  # nothing has been trained yet
        sys.exit(130)
    print(f"{describe(model)}; on {device}", flush=True)
    try:
        result = train(model, optimizers, data, config, device, state)
    except (FloatingPointError, OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    summarize(model, result, config, state, data["questions"])


if __name__ == "__main__":
    main(sys.argv[1:])
