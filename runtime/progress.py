"""What a run prints: its plan, a progress bar, a summary; and the clock of its training time."""

import json
import shlex
import sys
import time
from pathlib import Path

import torch

from runtime.bars import Bar
from runtime.distributed import rank_from_environment

LONG = 3600  # seconds; longer training on a CPU gets a hint
TABLE_OPTIONS = ("mem_dtype", "mem_learning_rate", "mem_decay")
SHORTER = (
    "Lower values make it shorter: --max_iters, --batch_size, --gradient_accumulation_steps, "
    "--block_size, --n_layer, --n_embd; for evaluations, --eval_iters"
)
SHOWN = {  # of a line of the log
    "loss": "{:.3f}",
    "tokens_per_s": "{:,.0f}",
    "gpu_gib": "{:.1f}",
    "val_loss": "{:.3f}",
    "recall": "{:.1%}",
    "old_val_loss": "{:.3f}",
    "old_recall": "{:.1%}",
}


class Progress:
    """A bar of the steps, with the latest of the numbers in SHOWN. run: its step, config.out_dir,
    config.max_iters"""

    def __init__(self, run, hidden=False):
        self.run = run
        self.numbers = {}
        self.first_step = run.step
        self.began = time.perf_counter()  # or the end of the first step, which is slower
        self.paused = 0.0
        self.estimated = False
        self.bar = Bar(
            desc=Path(run.config.out_dir).name,
            initial=run.step,
            total=run.config.max_iters,
            unit="step",
            disable=hidden,
        )

    def update(self):
        """Count one step. After ten of them, or a minute, print how long the rest takes."""
        self.bar.update()
        steps = self.run.step - self.first_step
        seconds = time.perf_counter() - self.began
        if steps == 1 and seconds < 60:
            self.began = time.perf_counter()
        elif not self.estimated and (steps == 10 or seconds >= 60):
            self.estimate(seconds / max(1, steps - 1))

    def estimate(self, seconds_per_step):
        self.estimated = True
        seconds = (self.bar.total - self.bar.n) * seconds_per_step
        if seconds < 90 or self.bar.disable:
            return
        self.bar.write(f"Training should take {about(seconds)}. Evaluations come on top")
        if seconds > LONG and self.run.device.type == "cpu":
            self.bar.write(SHORTER)

    def note_evaluation(self):
        """Say what takes long now."""
        self.paused = time.perf_counter()
        self.bar.set_postfix_str("evaluating")

    def show(self, line):
        """line: of the log"""
        if self.paused > 0:  # an evaluation has ended
            self.began += time.perf_counter() - self.paused
            self.paused = 0.0
        for name, form in SHOWN.items():
            if name in line:
                self.numbers[name] = form.format(line[name])
        self.bar.set_postfix(self.numbers)

    def close(self):
        self.bar.close()


def about(seconds):
    """6000 -> "about 1.7 hours" """
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    if seconds < 48 * 3600:
        return f"about {seconds / 3600:.1f} hours"
    return f"about {round(seconds / 86400)} days"


def evaluation_bar(items, total):
    """Yield items. If this takes longer than two seconds, show a bar below the run's."""
    hidden = rank_from_environment() != "0" or not sys.stderr.isatty()
    return Bar(items, "evaluating", total, leave=False, delay=2, disable=hidden)


class Clock:
    """Counts the training time of a run in run.seconds, without evaluations and checkpoints.
    tokens: read by a step"""

    def __init__(self, run, tokens):
        self.run = run
        self.tokens = tokens
        self.start()

    def start(self):
        self.began = time.perf_counter()
        self.first_step = self.run.step

    def stop(self, line):
        """Add the counts to a line of the log."""
        seconds = time.perf_counter() - self.began
        self.run.seconds += seconds
        line["tokens"] = self.run.step * self.tokens
        line["seconds"] = self.run.seconds
        line["tokens_per_s"] = (self.run.step - self.first_step) * self.tokens / seconds


def note_on_warmup(config):
    """Say that a warmup is shortened, or return "". config: a TrainConfig"""
    if config.warmup == config.warmup_iters:
        return ""
    too_long = f"--warmup_iters={config.warmup_iters} does not fit in {config.max_iters} steps"
    return f"{too_long}: the warmup has {config.warmup}"


def note_on_unused(given, model):
    """Name the given options that have no effect on a model, or return "" """
    names = []
    if model.pool is None:
        names += [name for name in given if name.startswith("mem_")]
    if model.ngram_pool is not None:  # these are for all tables
        names = [name for name in names if name not in TABLE_OPTIONS]
    if model.ngram_pool is None:
        names += [name for name in given if name.startswith("ngram")]
    if not model.config.mem_layers:
        names += [name for name in given if name.startswith("moe_")]
        names += [name for name in given if name in ("system", "memory_parallel")]
    removed = ("mem_count", "mem_layers", "ngram_layers")  # given to remove the layers
    unused = [f"--{name}" for name in names if name not in removed]
    if not unused:
        return ""
    return f"Without effect in this model: {', '.join(unused)}"


def announce(run, tokens):
    """Say what a run will do. tokens: read by a step"""
    c = run.config
    where = str(run.device)
    if run.ranks.by_torchrun:
        where += f" in {run.ranks.world} processes"
        if run.ranks.M > 1:
            where += f", {run.ranks.M} to a table"
    sequences = f"{c.batch_size * c.gradient_accumulation_steps} x {run.model.config.block_size}"
    steps = f"{c.max_iters:,} steps of {tokens:,} tokens ({sequences})"
    if run.step > 0:
        steps += f", from step {run.step:,} on"
    interval = min(c.eval_interval, c.max_iters)
    print(f"Training on {c.dataset}: {steps}, an evaluation every {interval:,}, on {where}")
    print(run.model.describe())
    size = size_of_checkpoint(run.model)
    print(f"Each evaluation is followed by a checkpoint of {size} (twice that while it is saved)")
    for note in run.notes:
        if note:
            print(note)
    if run.device.type == "cpu":
        seconds = least_seconds(run, tokens)
        if seconds > LONG:
            print(f"Its matrix products alone take {about(seconds)} on this CPU. {SHORTER}")
    sys.stdout.flush()


def least_seconds(run, tokens):
    """The time that a CPU would need for a run if all its FLOPs were in one large matrix product.
    tokens: read by a step"""
    a = torch.ones(1024, 1024)
    a @ a  # the first is slower
    began = time.perf_counter()
    a @ a
    flops_per_second = 2 * 1024**3 / (time.perf_counter() - began)
    model = run.model
    forward = sum(model.flops_per_token(model.config.block_size).values())
    steps = run.config.max_iters - run.step
    return 3 * forward * tokens * steps / flops_per_second / run.ranks.world


def size_of_checkpoint(model):
    """Weights, and two moments in float32: "16 MB" """
    size = 12 * model.parameter_counts()["dense"]
    parameters = dict(model.named_parameters())
    for name, x in model.state_dict().items():
        if name not in parameters:  # random numbers that belong to the model
            size += x.nbytes
    for pool in model.pools().values():
        size += (pool.values.itemsize + 8) * len(pool.values) * pool.dim
    return f"{size / 1e6:,.0f} MB"


def summarize(run, tokens, result):
    """Print the summary at the end of a run. tokens: the number read; result: the last line of
    the log"""
    print(f"\n{run.step:,} steps, {tokens:,} tokens in {run.seconds:.0f} s of training")
    print_results(run, result)
    if run.model.pool is not None:
        usage = "{mem_used:.1%} of slots read; the busiest 1% get {mem_top1:.1%} of reads"
        print(f"  memory       {usage.format(**result)}")
    if run.model.ngram_pool is not None:
        usage = "{ngram_used:.1%} of rows read; the busiest 1% get {ngram_top1:.1%} of reads"
        print(f"  n-grams      {usage.format(**result)}")
    print(f"  written to   {run.config.out_dir}/ckpt.pt, log.jsonl")
    command = ["sample.py", f"--out_dir={run.config.out_dir}"]
    if "recall" in result:
        command.append("--recall")
    print(f"\nNext: python {shlex.join(command)}")
    if run.config.init_from and result.get("recall", 1) < 0.9:
        command = ["train.py", "--resume", f"--out_dir={run.config.out_dir}"]
        command.append(f"--max_iters={2 * run.step}")
        print(f"Many answers are still wrong. To train twice as long: python {shlex.join(command)}")


def print_results(run, result):
    """Print losses and recall. result: the last line of the log. A run that finetunes or updates
    has evaluated at step 0; the numbers of then are printed, too."""
    before = {}
    with open(Path(run.config.out_dir, "log.jsonl"), "rb") as log:
        first = log.readline()
    if first.startswith(b'{"iter": 0,'):
        before = json.loads(first)
    train = f"{result['train_loss']:.3f} train, "
    print_result("val_loss", f"{train}{{}} validation (nats a token)", result, before)
    print_result("recall", f"{{}} of {count(run.data)}", result, before)
    if "old" in run.data:
        print_result("old_val_loss", "{} validation (nats a token)", result, before)
        print_result("old_recall", f"{{}} of {count(run.data['old'])}", result, before)


def print_result(name, form, result, before):
    """Print result[name] in a form, and what it was before."""
    if name not in result:
        return
    text = form.format(SHOWN[name].format(result[name]))
    if name in before:
        text += f", {SHOWN[name].format(before[name])} before"
    label = name.replace("val_", "").replace("_", " ")
    print(f"  {label:12} {text}")


def count(data):
    return f"{len(data['questions']):,} closed-book questions"
