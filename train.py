"""Train a GPT, with or without memory layers.

    python train.py                          --preset=facts-memory: it learns made-up facts
    python train.py --preset=facts-dense     the same compute without a memory, to compare
    python train.py --mem_keys=64 --out_dir=out/small            any option overrides a preset
    python train.py --resume --out_dir=out/small                 continue that run
    python train.py --init_from=out/small --dataset=facts-new    finetune that model
    torchrun --standalone --nproc_per_node=2 train.py --gradient_accumulation_steps=2 --batch_size=8

Options are the fields of TrainConfig and of GPTConfig (model.py). A preset (presets.py) replaces
some of their defaults.
"""

import contextlib
import json
import math
import os
import signal
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

PARENT = os.getppid()  # torchrun may be killed during the slow imports below
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # a few sparse operators need it
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out

import torch
from torch.nn.utils import clip_grad_norm_

from data.dataset import Dataset, answer_questions, check_suits, find_folder, hash_questions
from data.dataset import open_dataset
from kernels import RowAdam
from model import GPT, GPTConfig
from presets import PRESETS
from runtime.checkpoint import FORMAT, check_unoccupied, clear_run, cut_log, read_checkpoint
from runtime.checkpoint import save_tensors
from runtime.device import check_memory, choose_device, compiled, explain_compile_errors, precision
from runtime.distributed import Ranks, StopSignal, check_processes, exit_at_once, fail_on_rank
from runtime.distributed import command_to_resume, lost_another_process
from runtime.distributed import output_from_rank_0_only, processes_per_table
from runtime.files import UserError, append_to_file, explain_out_of_memory
from runtime.files import ignore_stream_errors, lock_folder
from runtime.options import check_options, make_configs, option, parse_command_line
from runtime.options import options_from_preset, options_to_finetune, options_to_resume
from runtime.progress import Clock, Progress, announce, evaluation_bar, note_on_unused
from runtime.progress import note_on_warmup, summarize
from runtime.training_state import restore_optimizers, whole_state

DEFAULT_PRESET = "facts-memory"
BATCH = "--batch_size (and raise --gradient_accumulation_steps)"
LESS_MEMORY = f"lower {BATCH}, --block_size, --mem_keys, or --ngram_rows"


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError, naming the option, for an invalid value."""

    out_dir: str = option("out", "folder for checkpoint and log; with a preset: out/PRESET")
    resume: bool = option(False, "continue the run in out_dir, with its options")
    overwrite: bool = option(False, "replace the run in out_dir")
    dataset: str = option("facts", "a folder in data/, or a path to one with train.bin, val.bin")
    init_from: str = option("", "folder of a run to finetune: start from its weights and options")
    background: str = option(
        "", "with init_from: a second dataset to evaluate; default: what that run was trained on"
    )
    batch_size: int = option(8, "sequences per micro-step", 1)
    gradient_accumulation_steps: int = option(1, "micro-steps per step, summed over processes", 1)
    max_iters: int = option(1000, "training steps in all; the learning rate decays over them", 1)
    learning_rate: float = option(6e-4, "peak learning rate of the network (AdamW)", below=1e31)
    min_lr: float = option(0.0, "learning rate of the network at the end", below=1e31)
    warmup_iters: int = option(50, "steps over which the learning rate rises to its peak")
    mem_learning_rate: float = option(3e-3, "learning rate of the values (RowAdam)", 1e-30, 1e31)
    mem_decay: float = option(0.0, "0: constant mem_learning_rate; else decay from this multiple")
    weight_decay: float = option(0.1, "AdamW weight decay of matrices; norms and values have none")
    beta1: float = option(0.9, "decay of the first moment in AdamW and RowAdam", below=1)
    beta2: float = option(0.98, "decay of the second moment in AdamW and RowAdam", below=1)
    grad_clip: float = option(1.0, "limit of the network's gradient norm; 0: no limit", below=1e31)
    eval_interval: int = option(250, "steps between evaluations, each followed by a checkpoint", 1)
    eval_iters: int = option(20, "batches per estimate of the loss", 1)
    log_interval: int = option(10, "steps between log lines", 1)
    seed: int = option(1, "seed of the initialisation and of the data order", below=2**63)
    device: str = option("auto", "cpu, cuda, mps; auto: the fastest available")
    dtype: str = option("auto", "auto: bfloat16 on a GPU", choices=("auto", "float32", "bfloat16"))
    compile: str = option(
        "auto", "torch.compile; auto: on a GPU", choices=("auto", "true", "false")
    )
    memory_parallel: int = option(
        1, "processes that share one table; each holds a part of its columns", 1
    )
    timeout: int = option(
        600, "seconds a process waits for another one; give it again with --resume", 1
    )

    def __post_init__(self):
        check_options(self)
        if not self.out_dir.strip():
            raise ValueError("--out_dir=: must name a folder; is it an unset variable?")
        if self.resume and self.overwrite:
            raise ValueError("--resume continues the run, --overwrite removes it: give only one")
        if self.min_lr > self.learning_rate:
            way_out = "give a lower --min_lr; for a constant rate, the same"
            more = f"more than --learning_rate={self.learning_rate:g}"
            name = f"--min_lr={self.min_lr:g} (given, or of the earlier run)"
            raise ValueError(f"{name}: {more}; {way_out}")
        if 0 < self.mem_decay < 1:
            raise ValueError(f"--mem_decay={self.mem_decay}: must be 0, or at least 1")
        if self.mem_decay > 0 and self.min_lr > self.mem_decay * self.mem_learning_rate:
            more = "more than --mem_decay times --mem_learning_rate, which decays to it"
            raise ValueError(f"--min_lr={self.min_lr:g}: {more}")
        if self.background and not self.init_from:
            raise ValueError("--background needs --init_from, the folder of a run to finetune")
        if self.init_from and Path(self.init_from).resolve() == Path(self.out_dir).resolve():
            way_out = "--init_from names the same folder; give another one"
            raise ValueError(f"--out_dir={self.out_dir}: {way_out}")

    @property
    def warmup(self):
        """Steps of the warmup: a tenth of a run in which warmup_iters would not reach the peak."""
        if self.warmup_iters >= self.max_iters:
            return self.max_iters // 10
        return self.warmup_iters


@dataclass
class Run:
    """What train() needs. data: from open_dataset; data["old"] is the background's, if any.
    notes: to print at the start."""

    config: TrainConfig
    model: GPT
    optimizers: list
    data: dict
    device: torch.device
    ranks: Ranks
    step: int = 0
    seconds: float = 0.0
    notes: list = field(default_factory=list)


# --- optimisers and learning rates ----------------------------------------------------


def make_optimizers(model, config):
    """Return AdamW for the network and a RowAdam for each pool, which updates only the rows that
    a step has read. eps only guards against 0 / 0: with half a million tokens per step, a row's
    gradient is 1e-9, below the usual eps."""
    groups = model.parameter_groups()
    betas = (config.beta1, config.beta2)
    network = [
        {"params": groups["matrices"], "weight_decay": config.weight_decay},
        {"params": groups["norm_weights"], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(network, config.learning_rate, betas, eps=1e-15, fused=True)
    optimizers = [adamw]
    for pool in model.pools().values():
        optimizers.append(RowAdam(pool, config.mem_learning_rate, betas, seed=config.seed))
    return optimizers


def learning_rate(config, it, largest):
    """Linear warmup to the largest rate, then cosine decay to min_lr at max_iters. it: from 0."""
    if it < config.warmup:
        return largest * (it + 1) / (config.warmup + 1)
    progress = (it - config.warmup) / (config.max_iters - config.warmup)
    return config.min_lr + (largest - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def note_on_schedule(old, config, step):
    """Say how the rate changes if a run continues with another schedule. old: its TrainConfig"""
    same = ("max_iters", "warmup_iters", "learning_rate", "min_lr")
    if all(getattr(old, name) == getattr(config, name) for name in same):
        return ""
    last = learning_rate(old, step - 1, old.learning_rate)
    now = learning_rate(config, step, config.learning_rate)
    note = f"Learning rate: {last:.1e} in the last step, on the old schedule; {now:.1e} now"
    if config.min_lr < config.learning_rate:
        note += ". For a constant rate, give --learning_rate=R --min_lr=R; for a warmup"
        note += f", start a new run from these weights: --init_from={config.out_dir}"
    if config.warmup_iters != old.warmup_iters:
        note += ". --warmup_iters counts from step 0"
    return note


def memory_rate(config, it):
    """The values' learning rate is constant. With mem_decay (UltraMem) it is a cosine as above,
    times a factor that falls from mem_decay to 1."""
    if config.mem_decay == 0:
        return config.mem_learning_rate
    factor = config.mem_decay + (1 - config.mem_decay) * it / config.max_iters
    return learning_rate(config, it, config.mem_learning_rate) * factor


def optimizer_step(run, network):
    """Clip the gradients of the network, set the learning rates, and step. Returns the network's
    rate."""
    config = run.config
    if config.grad_clip > 0:
        clip_grad_norm_(network, config.grad_clip)
    lr = learning_rate(config, run.step, config.learning_rate)
    for group in run.optimizers[0].param_groups:
        group["lr"] = lr
    for optimizer in run.optimizers[1:]:
        optimizer.param_groups[0]["lr"] = memory_rate(config, run.step)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return lr


# --- data and evaluation --------------------------------------------------------------


def batches(windows, numbers, size, device):
    """Yield the inputs and targets of each numbered micro-step, two tensors (B, T). windows:
    dataset.Batches"""
    for i in numbers:
        batch = torch.from_numpy(windows.windows(range(i * size, (i + 1) * size)))  # (B, T + 1)
        if device.type == "cuda":
            batch = batch.pin_memory()  # for an asynchronous copy
        batch = batch.to(device, non_blocking=True)
        yield batch[:, :-1], batch[:, 1:]


def training_batches(run):
    """Yield the micro-steps of this rank. The data of a step do not depend on the number of
    ranks."""
    micro_steps = run.config.gradient_accumulation_steps
    first = run.step * micro_steps + run.ranks.rank
    end = (run.config.max_iters + 1) * micro_steps  # one is fetched ahead
    numbers = range(first, end, run.ranks.world)
    return batches(run.data["train"], numbers, run.config.batch_size, run.device)


@torch.no_grad()
def mean_loss(model, windows, config, device):
    """Mean loss over eval_iters batches, the same ones every time."""
    total = 0.0
    pairs = batches(windows, range(config.eval_iters), config.batch_size, device)
    for idx, targets in evaluation_bar(pairs, config.eval_iters):
        _, loss = model(idx, targets)
        total += loss.item()
    return total / config.eval_iters


def recall(model, questions, separator):
    """Return the share of closed-book questions that greedy decoding answers exactly."""
    answers = answer_questions(model, questions, separator)
    right = 0
    for question, answer in zip(questions, answers, strict=True):
        right += answer == question["answer_ids"]
    return right / len(questions)


def evaluate(model, data, config, device):
    """Return losses, recall if the dataset has questions, and how evenly memories are used."""
    result = {"train_loss": mean_loss(model, data["train_eval"], config, device)}
    with contextlib.ExitStack() as recording:
        usages = {}
        for name, pool in model.pools().items():
            usages[name] = recording.enter_context(pool.record_usage())
        result["val_loss"] = mean_loss(model, data["val_eval"], config, device)
    for name, usage in usages.items():
        for measure, value in usage.summary().items():
            result[f"{name}_{measure}"] = value
    if not math.isfinite(result["val_loss"]):
        return result  # report() raises an error
    if data["questions"]:
        result["recall"] = recall(model, data["questions"], data["separator"])
    if "old" in data:
        old = data["old"]
        result["old_val_loss"] = mean_loss(model, old["val_eval"], config, device)
        if old["questions"]:
            result["old_recall"] = recall(model, old["questions"], data["separator"])
    return result


# --- the loop -------------------------------------------------------------------------


def train(run):
    """Train to max_iters, or until a signal. Returns the last line of the log."""
    config = run.config
    model = compiled(run.model, config.compile, run.device)
    network = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    context = precision(config.dtype, run.device)
    micro_steps = config.gradient_accumulation_steps // run.ranks.world
    pairs = training_batches(run)
    inputs, targets = next(pairs)
    stop = StopSignal()
    bar = Progress(run, hidden=run.ranks.rank > 0)
    clock = Clock(run, tokens_in_step(run))
    while run.step < config.max_iters:
        # forward and backward; fetch the next batch while a GPU still works on this one
        loss = torch.zeros((), device=run.device)
        for _ in range(micro_steps):
            with context:
                _, micro_loss = model(inputs, targets)
            micro_loss = micro_loss / micro_steps
            micro_loss.backward()
            loss += micro_loss.detach()
            inputs, targets = next(pairs)

        # average the gradients over all ranks (the pool averages its own), then step
        run.ranks.average_gradients(network)
        lr = optimizer_step(run, network)
        run.step += 1
        bar.update()

        # log, evaluate, save
        evaluating = run.step % config.eval_interval == 0 or run.step == config.max_iters
        stopped_by = stop.of_all(run.ranks)
        if run.step % config.log_interval == 0 or evaluating or stopped_by:
            line = {"iter": run.step, "loss": run.ranks.mean(loss.item()), "lr": lr}
            clock.stop(line)
            if evaluating:
                bar.note_evaluation()
            report(run, line, evaluating)
            bar.show(line)
            if evaluating or stopped_by:
                save(run)
            clock.start()
        if stopped_by and run.step < config.max_iters:
            end_early(run, bar, stopped_by)
    bar.close()
    return line


def tokens_in_step(run):
    c = run.config
    return c.batch_size * c.gradient_accumulation_steps * run.model.config.block_size


def report(run, line, evaluating):
    """Complete a log line, with an evaluation if one is due, and write it."""
    if "loss" in line:
        check_finite(line["loss"], "loss", run)
    if run.device.type == "cuda":
        line["gpu_gib"] = torch.cuda.max_memory_allocated(run.device) / 2**30
        line["gpu_gib_reserved"] = torch.cuda.max_memory_reserved(run.device) / 2**30
    if evaluating:
        run.ranks.check_same_weights(run.model)
        with precision(run.config.dtype, run.device):
            line.update(evaluate(run.model, run.data, run.config, run.device))
        check_finite(line["val_loss"], "validation loss", run)
    if run.ranks.rank == 0:
        append_to_file(Path(run.config.out_dir, "log.jsonl"), json.dumps(line) + "\n")


def check_finite(number, what, run):
    if not math.isfinite(number):
        diverged = f"is {number} at step {run.step}: training has diverged"
        c = run.config
        way_out = "Try a smaller --learning_rate"
        if isinstance(c, TrainConfig):  # and not that of an update
            way_out += f" (now {c.learning_rate:g}) or --mem_learning_rate"
            way_out += f" (now {c.mem_learning_rate:g}), or a longer --warmup_iters"
        raise UserError(f"the {what} {diverged}. {way_out}")


def save(run):
    """Rank 0 writes ckpt.pt. All ranks must call this: each may hold a part of the table."""
    largest = [p.detach().norm(math.inf).item() for p in run.model.parameters()]
    check_finite(run.ranks.mean(sum(largest)), "largest weight", run)  # NaN if any is NaN
    weights, optimizers = whole_state(run.model, run.optimizers)
    checkpoint = {
        "format": FORMAT,
        "iter": run.step,
        "seconds": run.seconds,
        "model": weights,
        "optimizers": optimizers,
        "model_config": asdict(run.model.config),
        "train_config": asdict(run.config),
        "vocabulary": run.data["vocabulary"],
        "separator": run.data["separator"],
        "fingerprint": run.data["fingerprint"],
        "background": run.data.get("old", {}).get("fingerprint", ""),
        "meta": run.data["meta"],
    }
    if run.ranks.rank == 0:
        save_tensors(Path(run.config.out_dir, "ckpt.pt"), checkpoint)


def end_early(run, bar, number):
    """After a signal and a checkpoint: print how to continue, and exit."""
    bar.close()
    if run.ranks.rank == 0:
        name = signal.Signals(number).name
        print(f"Stopped by {name} after step {run.step}; ckpt.pt is saved.")
        print(f"Continue with: {command_to_resume(run.config)}")
        if run.ranks.by_torchrun:
            print("torchrun may print a traceback now. It is torchrun's, and nothing is lost.")
    exit_at_once(128 + number)


# --- start and end --------------------------------------------------------------------


def prepare(given, ranks):
    """Check everything that can be wrong, and return a Run. given: options of the command line.
    An earlier run stays untouched until all checks have passed."""
    config, model_config = make_configs(complete_options(given), TrainConfig, GPTConfig)
    check_processes(config, model_config, ranks.world)
    device = choose_device(config.device, ranks.local)
    ranks.make_groups(processes_per_table(config, model_config))
    torch.manual_seed(config.seed)
    if ranks.local == 0:
        find_folder(config.dataset)  # generates the facts if they are missing
    ranks.wait()
    folder = find_folder(config.dataset)
    dataset = Dataset(folder)
    sizes = {"vocab_size": dataset.vocab_size, "separator": dataset.separator}
    model_config = replace(model_config, **sizes)
    data = open_dataset(folder, model_config.block_size, config.seed)
    if config.init_from and not config.resume:
        check_suits(read_checkpoint(config.init_from), data, "dataset", config)
    with torch.device("meta"):  # takes no memory
        check_memory(GPT(model_config, initialize=False, group=ranks.group), device)
    out_dir = Path(config.out_dir)
    if ranks.rank == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock_folder(out_dir)  # from here on no other process may write a checkpoint
        if not config.resume:
            check_unoccupied(out_dir, "ckpt.pt", config.overwrite)
    ranks.wait()
    model = make_model(config, model_config, device, ranks)
    run = Run(config, model, make_optimizers(model, config), data, device, ranks)
    run.notes = [note_on_warmup(config), note_on_unused(given, model)]
    if config.init_from:
        add_background(run, check=not config.resume)
    if config.resume:
        continue_run(run, out_dir / "ckpt.pt", folder)
    ranks.wait()  # all checks have passed on all ranks
    if ranks.rank == 0:
        if config.resume:
            cut_log(out_dir, run.step)
        else:
            clear_run(out_dir)
    return run


def complete_options(given):
    """Add the options of a preset or an earlier run to the given ones."""
    classes = (TrainConfig, GPTConfig)
    if given.get("resume"):
        return options_to_resume(given, classes, DEFAULT_PRESET)
    if "init_from" in given:
        return options_to_finetune(given, classes)
    return options_from_preset(given, PRESETS, DEFAULT_PRESET)


def make_model(config, model_config, device, ranks):
    folder = config.init_from
    if config.resume:
        folder = config.out_dir
    if folder:
        return GPT.from_checkpoint(folder, device, ranks.group, ranks.replicas).train()
    with device:  # draw the weights there; on a CPU this takes seconds
        return GPT(model_config, group=ranks.group, replicas=ranks.replicas)


def continue_run(run, path, folder):
    checkpoint = read_checkpoint(path)
    name = f"the run in {run.config.out_dir}"
    if checkpoint["fingerprint"] != run.data["fingerprint"]:
        what = f"{folder} is not what {name} was trained on"
        raise ValueError(f"--dataset={run.config.dataset}: {what}")
    before = checkpoint["background"]
    if before and "old" in run.data and run.data["old"]["fingerprint"] != before:
        way_out = "restore it, or do without one: --background="
        what = f"not what {name} was evaluated on; {way_out}"
        raise ValueError(f"--background={run.config.background}: {what}")
    run.step = checkpoint["iter"]
    run.seconds = checkpoint["seconds"]
    if run.step >= run.config.max_iters:
        way_out = "to go on, give a larger --max_iters"
        raise ValueError(f"{name} is complete at step {run.step}; {way_out}")
    old_config = TrainConfig(**checkpoint["train_config"])
    run.notes.append(note_on_schedule(old_config, run.config, run.step))
    restore_optimizers(path, run.optimizers)


def add_background(run, check=True):
    """Open the background of a finetuning run as data["old"]. check: compare it with the run in
    init_from, which may be gone on a resume"""
    c = run.config
    if not c.background:
        return
    old = open_dataset(find_folder(c.background), run.model.config.block_size, c.seed)
    if check:
        check_suits(read_checkpoint(c.init_from), old, "background", c)
    asked = {question["prompt"] for question in run.data["questions"]}
    # leave out questions that have new answers
    old["questions"] = [q for q in old["questions"] if q["prompt"] not in asked]
    old["fingerprint"] += hash_questions(old["questions"])
    run.data["old"] = old


def main(argv):
    with output_from_rank_0_only():
        given = parse_command_line(argv, __doc__, (TrainConfig, GPTConfig), PRESETS)
    run = None
    try:
        with explain_out_of_memory(LESS_MEMORY), explain_compile_errors():
            # check it before the processes use it to find each other
            timeout = TrainConfig(timeout=given.get("timeout", TrainConfig.timeout)).timeout
            ranks = Ranks(timeout, PARENT)
            run = prepare(given, ranks)
            if ranks.rank == 0:
                announce(run, tokens_in_step(run))
            if run.config.init_from and run.step == 0:
                report(run, {"iter": 0, "tokens": 0, "seconds": 0.0}, evaluating=True)
            result = train(run)
    except KeyboardInterrupt:
        exit_at_once(130)
    except Exception as error:
        if run is None:
            fail_on_rank(error)
        if not lost_another_process(error) and not isinstance(error, (UserError, OSError)):
            raise  # a bug keeps its traceback
        if ranks.rank == 0:
            print(file=sys.stderr)  # below the progress bar
        fail_on_rank(error, way_on(run))
    if ranks.rank == 0:
        tokens = run.step * tokens_in_step(run)
        summarize(run, tokens, result)
    ranks.end()


def way_on(run):
    """How to continue after an error."""
    if Path(run.config.out_dir, "ckpt.pt").exists():
        return "The last checkpoint is complete: continue with --resume"
    return "Start again with --overwrite"


if __name__ == "__main__":
    ignore_stream_errors()
    main(sys.argv[1:])
