"""Teach a model new facts by changing rows of its memory. The network stays as it is.

    python edit/update.py --init_from=out/facts-memory --dataset=facts-new --slots=4096
    python sample.py --delta=out/facts-new/delta.pt --dataset=facts-new --recall

choose_slots picks the slots that the new data need more than the old data do (Lin et al. 2025,
arXiv:2510.15103). The changed rows are written to delta.pt. The model's own checkpoint stays as it
is. --delta continues from an earlier update; the new delta.pt then contains both.
"""

import math
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import train
from data.dataset import check_suits, find_folder, open_dataset
from edit.delta import apply_deltas, save_delta, weights_hash
from kernels import RowAdam
from model import GPT
from runtime.bars import Bar
from runtime.checkpoint import check_unoccupied, clear_run, read_checkpoint
from runtime.device import check_memory, choose_device, precision
from runtime.distributed import Ranks
from runtime.files import explain_out_of_memory, fail, ignore_stream_errors, lock_folder
from runtime.options import check_options, make_configs, option, parse_command_line
from runtime.progress import Clock, Progress, print_results

BACKGROUND_WINDOWS = 1000  # windows of the old data, to choose slots


@dataclass(frozen=True)
class UpdateConfig:
    """How to update. Raises ValueError, naming the option, for an invalid value."""

    init_from: str = option("", "folder of the run to update")
    dataset: str = option("", "new data to learn: a folder in data/, or a path")
    background: str = option("", "data not to forget; default: the run's dataset; empty: none")
    delta: str = option("", "earlier update to start from: a delta.pt, or its folder")
    out_dir: str = option("", "folder for delta.pt and the log; default: out/DATASET")
    overwrite: bool = option(False, "replace the update in out_dir")
    slots: int = option(0, "number of slots to change; 0: all")
    choose_by: str = option("gradient", "how slots are scored", choices=("gradient", "reads"))
    optimizer: str = option(
        "auto", "auto: sgd; in bfloat16: rowadam", choices=("auto", "sgd", "rowadam")
    )
    learning_rate: float = option(0.0, "0: 1 for sgd, the run's rate for rowadam", below=1e31)
    batch_size: int = option(8, "sequences of new data per step", 1)
    rehearse: int = option(0, "sequences of --background per step, beside the new ones")
    max_iters: int = option(200, "number of steps", 1)
    eval_interval: int = option(50, "steps between evaluations", 1)
    eval_iters: int = option(20, "batches per estimate of the loss", 1)
    log_interval: int = option(10, "steps between log lines", 1)
    seed: int = option(1, "seed of the data order", below=2**63)
    device: str = option("auto", "cpu, cuda, mps; auto: the fastest available")
    dtype: str = option("auto", "auto: bfloat16 on a GPU", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self):
        check_options(self)
        for name in ("init_from", "dataset", "out_dir"):
            if not getattr(self, name).strip():
                raise ValueError(f"--{name}=: must name a folder; is it an unset variable?")
        if self.slots == 0 and self.choose_by != UpdateConfig.choose_by:
            raise ValueError(f"--choose_by={self.choose_by}: without --slots, all slots can change")
        if self.slots > 0 and not self.background:
            raise ValueError(f"--slots={self.slots}: --background must name the data not to forget")
        if self.rehearse > 0 and not self.background:
            raise ValueError(f"--rehearse={self.rehearse}: --background must name the old data")
        if Path(self.init_from).resolve() == Path(self.out_dir).resolve():
            way_out = "--init_from names the same folder; give another one"
            raise ValueError(f"--out_dir={self.out_dir}: {way_out}")
        out_dir = Path(self.out_dir).resolve()
        if self.delta and Path(self.delta).resolve() in (out_dir, out_dir / "delta.pt"):
            raise ValueError(f"--out_dir={self.out_dir}: --delta is in it; give another folder")

    @property
    def sequences(self):
        """Sequences per step, new and old ones."""
        return self.batch_size + self.rehearse


# --- which slots ----------------------------------------------------------------------


def choose_slots(run):
    """Return the slots with the best scores, int64 (config.slots). Reads the new data once, and
    a thousand windows of the old data."""
    new = run.data["train"]
    old = run.data["old"]["train"]
    steps = max(1, len(new) // run.config.batch_size)
    if run.config.choose_by == "reads":
        counts = sum(read_counts(run, new, steps, run.config.batch_size))
    else:
        counts = gradient_norms(run, new, steps)
    background = read_counts(run, old, BACKGROUND_WINDOWS, batch_size=1)
    scores = score_slots(counts, background)
    return scores.topk(run.config.slots).indices


def score_slots(counts, background):
    """TF-IDF of slots, (S): high if new data need a slot more than other data do (Lin et al. 2025):

        c(i) / sum of c * log((|B| + 1) / (1 + number of background batches that read slot i))

    counts (S): c, how often the new data read each slot, or how much they would change it.
    background: B, for each batch how often it reads each slot, (S)"""
    batches = 0
    containing = torch.zeros_like(counts)
    for reads in background:
        batches += 1
        containing += reads > 0
    return counts / counts.sum() * torch.log((batches + 1) / (1 + containing))


@torch.no_grad()
def read_counts(run, windows, steps, batch_size):
    """Yield how often each batch reads each slot, (S)."""
    bar = Bar(range(steps), "which slots are read", unit="batch", leave=False)
    context = precision(run.config.dtype, run.device)
    for idx, _ in train.batches(windows, bar, batch_size, run.device):
        with run.model.pool.record_usage() as usage, context:
            run.model(idx)
        yield usage.reads


def gradient_norms(run, windows, steps):
    """(S): the norm of each slot's total gradient over all batches. A slot can have several rows
    (UltraMem)."""
    pool = run.model.pool
    pool.collect_gradients()
    bar = Bar(range(steps), "which slots would change", unit="batch", leave=False)
    context = precision(run.config.dtype, run.device)
    for idx, targets in train.batches(windows, bar, run.config.batch_size, run.device):
        with context:
            _, loss = run.model(idx, targets)
        loss.backward()
    gradient = pool.take_gradient()
    slots = gradient.indices()[0] % pool.slots
    norms = gradient.values().float().norm(dim=1)
    return torch.zeros(pool.slots, device=norms.device).index_add(0, slots, norms)


def rows_of_slots(pool, slots):
    """The rows of a pool's tables that hold the values of slots, sorted, int64."""
    first = torch.arange(0, len(pool.values), pool.slots, device=slots.device)  # of each table
    return (slots + first.unsqueeze(1)).flatten().sort().values


# --- the update -----------------------------------------------------------------------


class RowSGD:
    """values[row] -= lr * gradient[row], for the rows that were read. The gradient is a sum over
    tokens, not a mean, so lr does not depend on the batch size."""

    def __init__(self, pool, lr, tokens):
        pool.collect_gradients()
        self.pool = pool
        self.param_groups = [{"lr": lr}]  # as in PyTorch's optimisers
        self.tokens = tokens

    @torch.no_grad()
    def step(self):
        gradient = self.pool.take_gradient()
        rows = gradient.indices()[0]
        rate = self.param_groups[0]["lr"] * self.tokens
        self.pool.values.index_add_(0, rows, gradient.values(), alpha=-rate)


def make_optimizer(run, train_config):
    """train_config: of the run to update"""
    config = run.config
    pool = run.model.pool
    name = config.optimizer
    if name == "auto":
        name = "sgd"
        if pool.values.dtype == torch.bfloat16:
            name = "rowadam"  # its stochastic rounding keeps small updates
    if name == "sgd":
        tokens = config.sequences * run.model.config.block_size
        return RowSGD(pool, config.learning_rate or 1.0, tokens)
    betas = (train_config["beta1"], train_config["beta2"])
    rate = config.learning_rate or train_config["mem_learning_rate"]
    return RowAdam(pool, rate, betas, seed=config.seed)


def batches_to_learn(run):
    """Yield the inputs and targets of each step: new sequences and, with --rehearse, old ones."""
    config = run.config
    numbers = range(config.max_iters)
    new = train.batches(run.data["train"], numbers, config.batch_size, run.device)
    if config.rehearse == 0:
        yield from new
        return
    old = train.batches(run.data["old"]["train"], numbers, config.rehearse, run.device)
    for (inputs, targets), (old_inputs, old_targets) in zip(new, old, strict=True):
        yield torch.cat((inputs, old_inputs)), torch.cat((targets, old_targets))


def update(run, rows, optimizer):
    """Train the rows for max_iters steps. Returns the last line of the log."""
    config = run.config
    pool = run.model.pool
    may_change = torch.zeros_like(pool.touched)
    may_change[rows] = 1
    context = precision(config.dtype, run.device)
    bar = Progress(run)
    clock = Clock(run, config.sequences * run.model.config.block_size)
    for inputs, targets in batches_to_learn(run):
        # forward, backward, step
        with context:
            _, loss = run.model(inputs, targets)
        loss.backward()
        pool.touched &= may_change  # the optimiser takes the gradient of touched rows only
        optimizer.step()
        run.step += 1
        bar.update()

        # log, evaluate
        evaluating = run.step % config.eval_interval == 0 or run.step == config.max_iters
        if run.step % config.log_interval == 0 or evaluating:
            lr = optimizer.param_groups[0]["lr"]
            line = {"iter": run.step, "loss": loss.item(), "lr": lr}
            clock.stop(line)
            train.report(run, line, evaluating)
            bar.show(line)
            clock.start()
    bar.close()
    return line


# --- start and end --------------------------------------------------------------------


def prepare(config, checkpoint):
    """Check the options, and return a train.Run."""
    path = Path(config.init_from, "ckpt.pt")
    if "RANK" in os.environ:
        raise ValueError("an update takes one process: start it with python, not with torchrun")
    device = choose_device(config.device)
    model_config = make_configs(checkpoint["model_config"], train.GPTConfig)[0]
    with torch.device("meta"):  # takes no memory
        check_memory(GPT(model_config, initialize=False), device)
    data = open_dataset(find_folder(config.dataset), model_config.block_size, config.seed)
    check_suits(checkpoint, data, "dataset", config)
    model = GPT.from_checkpoint(path, device)
    if model.pool is None:
        way_out = "python train.py --init_from=RUN --dataset=NEW changes all weights of a model"
        what = f"--init_from={config.init_from}: the model has no memory layers"
        raise ValueError(f"{what}; {way_out}")
    if config.slots > model.pool.slots:
        most = f"{config.init_from} has only {model.pool.slots:,} slots"
        raise ValueError(f"--slots={config.slots}: {most}")
    model.requires_grad_(False)
    model.pool.values.requires_grad_(True)
    run = train.Run(config, model, [], data, device, Ranks(timeout=600, parent=os.getppid()))
    train.add_background(run)
    return run


def occupy_folder(config):
    """Make and lock out_dir. Raises ValueError for an earlier update there; --overwrite removes
    it."""
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    lock_folder(out_dir)
    check_unoccupied(out_dir, "delta.pt", config.overwrite)
    clear_run(out_dir)


def complete_options(given):
    """Add the options that depend on the run to the given ones. Returns them and the run's
    checkpoint."""
    options = dict(given)
    checkpoint = read_checkpoint(Path(given.get("init_from", ""), "ckpt.pt"))
    options.setdefault("background", checkpoint["train_config"]["dataset"])
    options.setdefault("out_dir", f"out/{Path(given.get('dataset', '')).name}")
    return options, checkpoint


def run_update(given):
    if "init_from" not in given or "dataset" not in given:
        raise ValueError("--init_from and --dataset must be given; see --help")
    options, checkpoint = complete_options(given)
    config = make_configs(options, UpdateConfig)[0]
    run = prepare(config, checkpoint)
    base = weights_hash(run.model.state_dict())
    changed = torch.empty(0, dtype=torch.int64)
    if config.delta:
        changed = apply_deltas(run.model, f"{config.init_from}/ckpt.pt", [config.delta])
    occupy_folder(config)
    optimizer = make_optimizer(run, checkpoint["train_config"])
    train.report(run, {"iter": 0, "tokens": 0, "seconds": 0.0}, evaluating=True)
    began = time.perf_counter()
    if config.slots > 0:
        rows = rows_of_slots(run.model.pool, choose_slots(run))
    else:
        rows = torch.arange(len(run.model.pool.values), device=run.device)
    run.seconds = time.perf_counter() - began
    result = update(run, rows, optimizer)
    largest = run.model.pool.values.detach().norm(math.inf).item()
    train.check_finite(largest, "largest value", run)
    path = Path(config.out_dir, "delta.pt")
    changed = torch.cat((changed, rows.cpu())).unique()
    save_delta(path, run.model.pool.values, changed, base, f"{config.init_from}/ckpt.pt")
    summarize(run, result, len(rows))


def summarize(run, result, rows):
    c = run.config
    tokens = run.step * c.sequences * run.model.config.block_size
    print(f"\n{run.step:,} steps, {tokens:,} tokens in {run.seconds:.0f} s of updating")
    print(f"  {rows:,} of {len(run.model.pool.values):,} rows of the memory could change")
    print_results(run, result)
    print(f"  written to   {c.out_dir}/delta.pt, log.jsonl")
    command = ["sample.py", f"--out_dir={c.init_from}", f"--delta={c.out_dir}/delta.pt"]
    if "recall" in result:
        command += [f"--dataset={c.dataset}", "--recall"]
    print(f"\nNext: python {shlex.join(command)}")
    if result.get("recall", 1) < 0.9:
        command = ["train.py", f"--init_from={c.init_from}", f"--dataset={c.dataset}"]
        print("Many answers are still wrong. Try more --max_iters or --slots, with --overwrite,")
        print(f"or change all weights: python {shlex.join(command)}")


def main(argv):
    given = parse_command_line(argv, __doc__, (UpdateConfig,))
    try:
        with explain_out_of_memory("lower --batch_size"):
            run_update(given)
    except (Exception, KeyboardInterrupt) as error:
        fail(error)


if __name__ == "__main__":
    ignore_stream_errors()
    main(sys.argv[1:])
