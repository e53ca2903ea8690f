"""Train a GPT, with memory layers or without. Options are the fields of TrainConfig and GPTConfig (model.py).

    python train.py                          a small Memory+ model on facts to remember; minutes on a laptop
    python train.py --preset=facts-dense     the same compute without a memory, to compare
    python train.py --preset=facts-memory --mem_keys=64 --out_dir=out/small     any option over any preset
    python train.py --resume --out_dir=out/small    go on where that run stopped, on a CPU to the same bits
    torchrun --standalone --nproc_per_node=2 train.py --gradient_accumulation_steps=2       in two processes
    python train.py --init_from=out/facts-memory --dataset=facts-new --update=memory --update_slots=4096 \
        --max_iters=200         teach that model other facts, by changing 4,096 rows of its table
"""

import contextlib
import datetime
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

os.environ["NANOMEM_PARENT"] = str(os.getppid())  # before the imports, which take seconds
os.environ.setdefault(
    "PYTORCH_ENABLE_MPS_FALLBACK", "1"
)  # a few sparse operators run on the CPU then
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from data.checkpoint import FORMAT, hold, identity, prepare_out_dir, read_checkpoint
from data.checkpoint import restore, save_checkpoint, save_delta
from data.dataset import Dataset, find_folder, open_dataset
from data.files import Refused, blame, enough_memory, explain, steady_streams, writing
from data.presets import PRESETS
from kernels import RowAdam
from model import GPT, GPTConfig
from runtime.device import check_memory, choose_device, precision
from runtime.options import check_options, option
from runtime.sharded_pool import whole_table


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError, naming the option, for a value that makes no sense."""

    out_dir: str = option("out", "folder for checkpoints and log; a preset has its own, out/PRESET")
    resume: bool = option(False, "go on with the run in out_dir, with its options")
    overwrite: bool = option(False, "replace the run in out_dir")
    dataset: str = option(
        "facts", "a folder in data/, or the path of one with train.bin and val.bin"
    )
    init_from: str = option(
        "", "folder of a run: begin with its weights and options, without its optimisers"
    )
    background: str = option(
        "", "with that, a dataset not to forget, by default that run's; empty: none"
    )
    update: str = option(
        "all", "weights that change: all, or the memory's values", choices=("all", "memory")
    )
    update_slots: int = option(0, "update=memory: only of so many slots; 0: of all")
    update_by: str = option(
        "gradient", "choose them by gradient, or reads", choices=("gradient", "reads")
    )
    batch_size: int = option(8, "sequences in a micro-step", 1)
    gradient_accumulation_steps: int = option(
        1, "micro-steps in a step, of all processes together", 1
    )
    max_iters: int = option(1000, "steps to train for; the learning rate falls over all of them", 1)
    learning_rate: float = option(6e-4, "largest learning rate of the network (AdamW)", below=1e31)
    min_lr: float = option(0.0, "learning rate of the network that the cosine ends at", below=1e31)
    warmup_iters: int = option(50, "steps over which the learning rate rises to its largest")
    mem_learning_rate: float = option(3e-3, "rate of the memory's values (RowAdam)", 1e-30, 1e31)
    mem_sgd: float = option(0.0, "rate of SGD for the values (update=memory: 1), 0: RowAdam")
    mem_decay: float = option(0.0, "0: that rate is constant; else it falls, from so many times it")
    weight_decay: float = option(
        0.1, "AdamW's decay of matrices, not of norm weights and values", below=1e31
    )
    beta1: float = option(0.9, "decay of the mean of the gradient, AdamW and RowAdam", below=1)
    beta2: float = option(0.98, "decay of the mean of its square, AdamW and RowAdam", below=1)
    grad_clip: float = option(
        1.0, "clip the norm of the network's gradient; 0 disables", below=1e31
    )
    eval_interval: int = option(250, "steps between evaluations, each followed by a checkpoint", 1)
    eval_iters: int = option(20, "batches in an estimate of the loss", 1)
    log_interval: int = option(10, "steps between lines of the log", 1)
    seed: int = option(1, "of initialisation, and order of the data", below=2**63)
    device: str = option("auto", "cpu, cuda, mps; auto: the fastest there is")
    dtype: str = option("auto", "auto: bfloat16 on a GPU", choices=("auto", "float32", "bfloat16"))
    compile: str = option(
        "auto", "torch.compile; auto: on a GPU", choices=("auto", "true", "false")
    )
    memory_parallel: int = option(
        1, "processes that share one table, each with a part of its columns", 1
    )
    timeout: int = option(
        600, "seconds that a process waits for another one; give it again with --resume", 1
    )

    def __post_init__(self):
        check_options(self)
        if not self.out_dir.strip():
            raise ValueError("out_dir=: must name a folder; is it a variable that is not set?")
        if (self.update == "memory" or self.background) and not self.init_from:
            raise ValueError("update=memory and background= go with a run: init_from= must name it")
        if self.update_slots and not (self.update == "memory" and self.background):
            raise ValueError(
                f"update_slots={self.update_slots}: goes with update=memory and background="
            )
        if self.init_from and Path(self.init_from).resolve() == Path(self.out_dir).resolve():
            raise ValueError(
                f"out_dir={self.out_dir}: init_from= names the same folder; give another one"
            )


# --- command line ---------------------------------------------------------------------------------------


def parse_options(argv):
    """argv -> {option: value} of what was given. Exits with 2, naming it, on what cannot be read."""
    raw = RawDescriptionHelpFormatter
    parser = ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.register("type", bool, lambda text: ("false", "0", "true", "1").index(text.lower()) > 1)
    parser.register(
        "type", tuple, lambda text: tuple(int(part) for part in text.split(",") if part)
    )
    parser.add_argument("--preset", choices=PRESETS, help="(default: facts-memory)")
    for f in (*fields(TrainConfig), *fields(GPTConfig)):
        if f.name == "vocab_size":  # is that of the dataset
            continue
        kind = str.lower if (choices := f.metadata["choices"]) else type(f.default)
        flag = {"nargs": "?", "const": True} if kind is bool else {}  # --resume means --resume=true
        help = f"{f.metadata['help']} ({', '.join((*choices, f'default: {f.default!r}'))})".replace(
            "%", "%%"
        )
        parser.add_argument(
            f"--{f.name}", type=kind, default=SUPPRESS, help=help, metavar="", **flag
        )
    return vars(parser.parse_args(argv))


def make_configs(options):
    """{option: value} -> TrainConfig, GPTConfig. Raises ValueError for values that do not fit."""
    names = {f.name for f in fields(GPTConfig)}
    training = TrainConfig(**{name: value for name, value in options.items() if name not in names})
    return training, GPTConfig(**{name: value for name, value in options.items() if name in names})


def complete_options(given):
    """Options of the command line -> all of them: over a preset, or over those of the run that goes on."""
    base, resume, preset = given.get("init_from"), given.get("resume"), given["preset"]
    name = Path(given.get("dataset", "update")).name if base else preset or "facts-memory"
    options = {"out_dir": f"out/{name}"} | {k: v for k, v in given.items() if k != "preset"}
    if not resume and base is None:
        return PRESETS[preset or "facts-memory"] | options
    if preset:
        raise ValueError(
            "preset: a run that goes on keeps its options; leave it out, give what is to change"
        )
    path = Path(options["out_dir"] if resume else base, "ckpt.pt")
    checkpoint = read_checkpoint(path)
    with blame(
        f"{path} has no options that fit", "it was edited, damaged, or is of another version"
    ):
        configs = make_configs(checkpoint["train_config"] | checkpoint["model_config"])
        saved = asdict(configs[0]) | asdict(configs[1])
    kept = ["seed", "batch_size", "gradient_accumulation_steps", "init_from", "mem_sgd"]
    kept += ["update", "update_slots", "update_by"]
    if not resume:
        kept, sgd = (), options.get("update") == "memory" and saved["mem_dtype"] == "float32"
        saved |= dict(
            resume=False, overwrite=False, update="all", update_slots=0, update_by="gradient"
        )
        saved |= dict(background=saved["dataset"], memory_parallel=1, mem_sgd=float(sgd))
    layers = {"mem_layers": ()} if "mem_count" in options else {}  # which would override it
    training, model = map(asdict, make_configs(saved | layers | options))
    for name in (*model, *kept):
        if name in options and (training | model)[name] != saved[name]:
            raise ValueError(
                f"{name}={options[name]}: the run in {path.parent} keeps {name}={saved[name]}"
            )
    return saved | options


# --- checkpoint, optimisers, learning rate, evaluation ----------------------------------------------------


def load_checkpoint(path, device="cpu", group=None, replicas=None):
    """The checkpoint as a dictionary, its "model" a GPT with its weights. Nothing in the file is executed.
    With a group each of its processes gets its columns of the table, however many have written the file.
    Raises FileNotFoundError or ValueError, naming the file, if it is missing, damaged, or something else."""
    checkpoint = read_checkpoint(path)
    with blame(
        f"{path}: its parts do not fit together", "it was edited, damaged, or is of another version"
    ):
        TrainConfig(**checkpoint["train_config"])
        with torch.device(device):
            config = GPTConfig(**checkpoint["model_config"])
            model = GPT(config, initialize=False, group=group, replicas=replicas)
        if group is not None:
            states = checkpoint["optimizers"][1]["state"].values()
            parts = [(state, name) for state in states for name in ("means", "squares")]
            for part, name in [(checkpoint["model"], "pool.values"), *parts]:
                part[name] = part[name][:, model.pool.columns]
        model.load_state_dict(checkpoint["model"])
        kinds = {"iter": int, "seconds": float, "separator": int, "fingerprint": str}
        wrong = [name for name, kind in kinds.items() if type(checkpoint.get(name)) is not kind]
        if wrong or not (
            checkpoint["iter"] > 0 and 0 <= checkpoint["separator"] < model.config.vocab_size
        ):
            raise ValueError(f"{', '.join(wrong) or 'iter or separator'} cannot be right")
    return {**checkpoint, "model": model}


def make_optimizers(model, config):
    """AdamW for the network; RowAdam for the pool, which moves only the rows that a step has read. eps only
    guards against 0 / 0: with half a million tokens in a step a row's gradient is 1e-9, eps often 1e-8."""
    groups, betas = model.parameter_groups(), (config.beta1, config.beta2)
    network = [{"params": groups["matrices"], "weight_decay": config.weight_decay}]
    network += [{"params": groups["norm_weights"], "weight_decay": 0.0}]
    optimizers = [
        torch.optim.AdamW(network, lr=config.learning_rate, betas=betas, eps=1e-15, fused=True)
    ]
    if model.pool is not None and config.mem_sgd:  # of a loss that is a mean over tokens
        model.pool.collect_gradients()
        tokens = config.batch_size * config.gradient_accumulation_steps * model.config.block_size
        optimizers.append(torch.optim.SGD([{"params": groups["pool"], "tokens": tokens}]))
    elif model.pool is not None:
        optimizers.append(RowAdam(model.pool, config.mem_learning_rate, betas, seed=config.seed))
    return optimizers


def learning_rate(config, it, largest):
    """Linear warmup to the largest rate, then a cosine to min_lr at max_iters. it counts from 0."""
    if it < config.warmup_iters:
        return largest * (it + 1) / (config.warmup_iters + 1)
    progress = (it - config.warmup_iters) / max(1, config.max_iters - config.warmup_iters)
    return config.min_lr + (largest - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def memory_rate(config, it):
    """Of the values: constant; or with mem_decay (UltraMem) such a cosine, times what falls from it to 1."""
    if config.mem_sgd or config.mem_decay == 0:
        return config.mem_sgd or config.mem_learning_rate
    factor = config.mem_decay + (1 - config.mem_decay) * it / config.max_iters
    return learning_rate(config, it, config.mem_learning_rate) * factor


def batches(windows, numbers, size, device):
    """For each number of a micro-step its inputs and targets, two tensors (B, T). windows: dataset.Batches"""
    for i in numbers:
        batch = torch.from_numpy(windows(range(i * size, (i + 1) * size)))  # (B, T + 1)
        batch = batch.pin_memory() if device.type == "cuda" else batch  # for an asynchronous copy
        batch = batch.to(device, non_blocking=True)
        yield batch[:, :-1], batch[:, 1:]


@torch.no_grad()
def mean_loss(model, windows, config, device):
    """Mean loss over eval_iters batches, the same ones every time."""
    pairs = batches(windows, range(config.eval_iters), config.batch_size, device)
    return sum(model(idx, targets)[1].item() for idx, targets in pairs) / config.eval_iters


def answer(model, questions, separator):
    """What the model says to closed-book questions (Dataset.questions): lists of tokens."""
    prompts = [[separator, *question["prompt_ids"]] for question in questions]
    return model.complete(prompts, [len(question["answer_ids"]) for question in questions])


def evaluate(model, data, config, device):
    """Losses, recall if the dataset asks questions, and how evenly a memory is used."""
    result = {"train_loss": mean_loss(model, data["train_eval"], config, device)}
    with contextlib.nullcontext() if model.pool is None else model.pool.record_usage() as counts:
        result["val_loss"] = mean_loss(model, data["val_eval"], config, device)
    if "old" in data:
        result["old_val_loss"] = mean_loss(model, data["old"]["val_eval"], config, device)
    for name, part in (("recall", data), ("old_recall", data.get("old", {}))):
        if asked := part.get("questions"):
            got = answer(model, asked, data["separator"])
            right = [
                ids == question["answer_ids"] for ids, question in zip(got, asked, strict=True)
            ]
            result[name] = sum(right) / len(right)
    if counts is not None:
        result |= {f"mem_{name}": value for name, value in counts.summary().items()}
    return result


def choose_slots(model, new, old, config, device):
    """The update_slots slots with the best scores (score_slots), int64. new, old: dataset.Batches, of
    which one pass and 1,000 windows are read. c: norms of the rows' gradients, summed over new, or reads."""
    pool, learns, context = (
        model.pool,
        config.update_by == "gradient",
        precision(config.dtype, device),
    )
    pool.collect_gradients()

    def reads(what, windows, count, size):
        bar = tqdm(range(count), f"slots that {what} data read", unit="batch", leave=False)
        for idx, targets in batches(windows, bar, size, device):
            with (
                torch.set_grad_enabled(learns and what == "new"),
                pool.record_usage() as usage,
                context,
            ):
                loss = model(idx, targets)[1]
            if loss.requires_grad:
                loss.backward()
            yield usage.reads

    c = sum(reads("new", new, max(1, len(new) // config.batch_size), config.batch_size))
    if learns:
        gradient = pool.take_gradient()
        slots = gradient.indices()[0] % pool.slots
        c = torch.zeros_like(c).index_add(0, slots, gradient.values().float().norm(dim=1))
    return score_slots(c, reads("old", old, 1000, 1)).topk(config.update_slots).indices


def score_slots(c, background):
    """TF-IDF of slots, (S): what new data need more than others do (Lin et al. 2025, arXiv:2510.15103):

        c(i) / sum of c * log((|B| + 1) / (1 + number of background batches that read slot i))

    c (S): how often the new data read a slot, or how much they would change it. background: for each batch
    of B how often it reads each slot, (S)"""
    batches = 0
    containing = torch.zeros_like(c)
    for reads in background:
        batches += 1
        containing += reads > 0
    return c / c.sum() * torch.log((batches + 1) / (1 + containing))


def updated_rows(pool, slots):
    """The rows of a pool's tables that hold the values of slots (None: of all), sorted, int64."""
    if slots is None:
        return torch.arange(len(pool.values), device=pool.values.device)
    first = torch.arange(0, len(pool.values), pool.slots, device=slots.device)  # of each table
    return (slots + first.unsqueeze(1)).flatten().sort().values


# --- several processes ----------------------------------------------------------------------------------


class Ranks:
    """This process among those that torchrun has started: `rank` of `world`, `local` on its machine.
    With memory_parallel=M, ranks 0 to M-1 share one table, M to 2M-1 a copy of it, and so on: `group` is that
    of this rank, or None. `replicas` are the ranks that hold the same columns as this one."""

    def __init__(self, timeout=600):
        """Finds the others. Raises ValueError if what torchrun says is not enough for that."""
        self.rank, self.local, self.world, self.on = 0, 0, 1, "RANK" in os.environ
        self.M, self.group, self.replicas, self.timeout = (
            1,
            None,
            None,
            datetime.timedelta(seconds=timeout),
        )
        names = "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        with blame(f"processes do not find each other by {names}", "start them with torchrun"):
            if orphaned():
                raise ValueError("torchrun has died meanwhile")
            if self.on:
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                self.local = int(os.environ["LOCAL_RANK"])
                dist.init_process_group(backend, timeout=self.timeout)
                self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def make_groups(self, M):
        """M ranks share a table; world / M hold the same columns. M divides world."""
        self.M, groups = M, dist.new_subgroups_by_enumeration
        if M > 1:
            self.group, _ = groups(
                [[*range(i, i + M)] for i in range(0, self.world, M)], self.timeout
            )
        if self.world > M:
            self.replicas, _ = groups([[*range(i, self.world, M)] for i in range(M)], self.timeout)

    def gather(self, value):
        """The value of every rank, a list. value: plain values and tensors"""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def average(self, gradients):
        """Of the network, in place: the mean over all ranks, the same bits on each."""
        if self.world > 1:
            vector = parameters_to_vector(gradients)
            dist.all_reduce(vector)
            vector_to_parameters(vector.div_(self.world), gradients)

    def check_in_step(self, model):
        """All ranks must have the same weights, and replicas the same columns. Compares sums in float64."""
        if self.world == 1:
            return
        parts = {
            name: p.detach().split(2**16) for name, p in model.named_parameters()
        }  # copies are small
        sums = {
            name: sum(part.double().sum().item() for part in tensors)
            for name, tensors in parts.items()
        }
        everyone = self.gather((str(sums.pop("pool.values", 0)), str(sums)))
        for rank, theirs in enumerate(everyone):
            if theirs != (everyone[rank % self.M][0], everyone[0][1]):
                raise Refused(
                    f"rank {rank} is out of step: its weights are not those of the others"
                )


def orphaned():
    """Whether torchrun, the parent, was killed: its processes then stop as on SIGTERM."""
    return "RANK" in os.environ and str(os.getppid()) != os.environ["NANOMEM_PARENT"]


class Stop:
    """Turns SIGINT or SIGTERM into a request to stop after the step. What is sent to a whole job comes twice,
    as torchrun passes it on: only a second Ctrl-C, more than a second later, ends the process at once."""

    def __init__(self):
        self.number = self.time = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number, frame):
        if self.number is None:
            self.number, self.time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.time > 1:
            os._exit(130)


# --- training, from start to end ------------------------------------------------------------------------


def train(run):
    """The loop. run: what start() has prepared; run.state is updated in place. Returns the log's last line.
    Exits with 128 and the number of the signal if one stops the run, after saving."""
    model, config, device, state, ranks = run.model, run.config, run.device, run.state, run.ranks
    stop, context, shown = Stop(), precision(config.dtype, device), {}
    auto = config.compile == "auto" and device.type == "cuda" and os.name == "posix"
    run_model = torch.compile(model) if auto or config.compile == "true" else model
    network = [
        p for group in run.optimizers[0].param_groups for p in group["params"] if p.requires_grad
    ]
    chosen = None
    if config.update_slots:  # the rows of these slots alone change
        chosen = torch.zeros_like(model.pool.touched)
        chosen[updated_rows(model.pool, state["slots"])] = 1
    total = config.gradient_accumulation_steps  # of all ranks
    numbers = range(state["iter"] * total + ranks.rank, (config.max_iters + 1) * total, ranks.world)
    pairs = batches(run.data["train"], numbers, config.batch_size, device)  # one is fetched ahead
    in_bar = (
        "loss",
        "tokens_per_s",
        "gpu_gib",
        "val_loss",
        "recall",
        "old_recall",
    )  # of a line of the log
    if config.init_from and state["iter"] == 0:
        report(run, run.before, evaluating=True)
    options = {
        "initial": state["iter"],
        "unit": "step",
        "dynamic_ncols": True,
        "disable": ranks.rank > 0,
    }
    bar = tqdm(desc=Path(config.out_dir).name, total=config.max_iters, **options)
    clock, since, (inputs, targets) = time.perf_counter(), state["iter"], next(pairs)
    while state["iter"] < config.max_iters:
        # forward and backward; then the next batch, while a GPU is still at work with this one
        loss = torch.zeros((), device=device)
        for _ in range(total // ranks.world):
            with context:
                micro_loss = (
                    run_model(inputs, targets)[1] * ranks.world / total
                )  # mean of this rank
            micro_loss.backward()
            loss += micro_loss.detach()
            inputs, targets = next(pairs)

        # average over ranks; take_gradient() does it for the pool
        ranks.average([p.grad for p in network])
        if chosen is not None:
            model.pool.touched &= chosen
        if model.pool is not None and config.mem_sgd:
            model.pool.values.grad = model.pool.take_gradient()

        # step
        if config.grad_clip > 0:
            clip_grad_norm_(network, config.grad_clip)
        lr = learning_rate(config, state["iter"], config.learning_rate)
        for optimizer, rate in zip(
            run.optimizers, (lr, memory_rate(config, state["iter"])), strict=False
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("tokens", 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state["iter"] = it = state["iter"] + 1
        bar.update()

        # log, evaluate, save
        evaluating = it % config.eval_interval == 0 or it == config.max_iters
        stopped_by = max(ranks.gather(signal.SIGTERM if orphaned() else stop.number or 0))
        if it % config.log_interval == 0 or evaluating or stopped_by:
            loss, now = (
                sum(ranks.gather(loss.item())) / ranks.world,
                time.perf_counter(),
            )  # after the GPU
            tokens = (it - since) * total * config.batch_size * model.config.block_size
            line = {"iter": it, "loss": loss, "lr": lr, "tokens_per_s": tokens / (now - clock)}
            state["seconds"] += now - clock
            report(run, line, evaluating)
            shown |= {k: f"{x:,.{0 if x > 999 else 3}f}" for k, x in line.items() if k in in_bar}
            bar.set_postfix(shown)
            if evaluating or stopped_by:
                save(run)
            clock, since = time.perf_counter(), it  # evaluation and saving are not training time
        if stopped_by and it < config.max_iters:  # at the last step the run is complete anyway
            bar.close()
            if ranks.rank == 0:
                again = f"train.py --resume --out_dir={shlex.quote(config.out_dir)}"
                print(
                    f"Stopped by {signal.Signals(stopped_by).name} after step {it}; ckpt.pt is saved."
                )
                print(f"Go on with: {'torchrun ...' if ranks.on else 'python'} {again}")
            (os._exit if ranks.on else sys.exit)(128 + stopped_by)  # see main()
    bar.close()
    return line


def report(run, line, evaluating):
    """Complete a line of the log, with an evaluation if it is time for one, and write it."""
    refuse_nan(line.get("loss", 0), run)
    if run.device.type == "cuda":
        line["gpu_gib"] = torch.cuda.max_memory_allocated(run.device) / 2**30
        line["gpu_gib_reserved"] = torch.cuda.max_memory_reserved(run.device) / 2**30
    if evaluating:
        run.ranks.check_in_step(run.model)
        with precision(run.config.dtype, run.device):
            line |= evaluate(run.model, run.data, run.config, run.device)
        refuse_nan(line["val_loss"], run)
    if run.ranks.rank == 0:
        with writing(log := Path(run.config.out_dir, "log.jsonl")), open(log, "a") as file:
            file.write(json.dumps(line) + "\n")


def refuse_nan(number, run, what="loss"):
    if not math.isfinite(number):
        names = "learning_rate", "mem_sgd" if run.config.mem_sgd else "mem_learning_rate"
        now = [f"{k} (now {getattr(run.config, k):g})" for k in names]
        what = f"the {what} is {number} at step {run.state['iter']}: training has diverged"
        raise Refused(f"{what}. Try a smaller {' or '.join(now)}, or a longer warmup_iters")


def save(run):
    """Write ckpt.pt. Rank 0 does, but all take part: each may have a part of the table."""
    largest = sum(p.detach().norm(math.inf).item() for p in run.model.parameters())  # NaN if one is
    refuse_nan(
        sum(run.ranks.gather(largest)), run, "largest weight"
    )  # the loss was that before the update
    weights, pool = run.model.state_dict(), run.model.pool
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    if pool is not None:
        weights["pool.values"] = whole_table(pool, weights["pool.values"])
        for i, state in optimizers[1]["state"].items():  # which is the optimiser's own
            tables = {k: whole_table(pool, x) for k, x in state.items() if torch.is_tensor(x)}
            optimizers[1]["state"][i] = state | tables
    checkpoint = {"format": FORMAT, "model": weights, "optimizers": optimizers, **run.state}
    checkpoint |= {name: run.data[name] for name in ("vocabulary", "separator", "fingerprint")}
    checkpoint |= {"model_config": asdict(run.model.config), "train_config": asdict(run.config)}
    if run.ranks.rank == 0:
        if run.config.update == "memory":
            rows = updated_rows(pool, run.state["slots"])
            save_delta(Path(run.config.out_dir, "delta.pt"), pool.values, rows, *run.state["base"])
        save_checkpoint(Path(run.config.out_dir, "ckpt.pt"), checkpoint)


def start(given, ranks):
    """Everything that can be wrong is found here, before training. Returns what train() needs."""
    config, model_config = make_configs(complete_options(given))
    M, steps, world = config.memory_parallel, config.gradient_accumulation_steps, ranks.world
    if M > 1 and model_config.mem_layers and model_config.system != "memory":
        raise ValueError(f"memory_parallel={M}: is for system=memory, not {model_config.system}")
    M = M if model_config.mem_layers else 1
    width = model_config.mem_value_dim
    if steps % world:
        raise ValueError(
            f"gradient_accumulation_steps={steps} must be divisible by the {world} processes"
        )
    if world % M or width % M:
        raise ValueError(
            f"memory_parallel={M} must divide {world} processes and the width {width} of values"
        )
    if config.update == "memory" and world > 1:
        raise ValueError(f"update=memory: is for one process, not {world}")
    device = choose_device(config.device, ranks.local)
    ranks.make_groups(M)
    torch.manual_seed(config.seed)
    if ranks.rank == 0 and Path(config.out_dir).is_dir():
        hold(config)  # before its checkpoint is read: nobody may write another one meanwhile
    if ranks.local == 0:
        find_folder(config.dataset)  # which makes the facts, if they are not there
    ranks.gather(None)  # a barrier
    folder, name = find_folder(config.dataset), f"the run in {config.out_dir}"
    model_config = replace(model_config, vocab_size=Dataset(folder).vocab_size)
    data = open_dataset(folder, model_config.block_size, config.seed)
    state = {"iter": 0, "seconds": 0.0, "base": None, "slots": None}
    with torch.device("meta"):  # which takes no room
        check_memory(GPT(model_config, initialize=False, group=ranks.group), device)
    if config.resume or config.init_from:
        path = Path(config.out_dir if config.resume else config.init_from, "ckpt.pt")
        checkpoint = load_checkpoint(path, device, ranks.group, ranks.replicas)
        model = checkpoint["model"]
    else:
        with device:  # there its numbers are drawn, which takes a CPU seconds
            model = GPT(model_config, group=ranks.group, replicas=ranks.replicas)
    if config.resume:
        state = {key: checkpoint.get(key) for key in state}
        if checkpoint["fingerprint"] != data["fingerprint"]:
            raise ValueError(
                f"dataset={config.dataset}: {folder} is not what {name} was trained on"
            )
        if state["iter"] >= config.max_iters:
            raise ValueError(
                f"{name} is complete at step {state['iter']}; to go on, give a larger max_iters"
            )
    if config.init_from:
        prepare_update(model, data, config, state, device, checkpoint)
    optimizers = make_optimizers(model, config)
    if config.resume:
        with blame(
            f"{config.out_dir}/ckpt.pt: its optimisers have a wrong state", "go on from another one"
        ):
            restore(optimizers, checkpoint)
    ranks.gather(None)  # nobody has found anything wrong
    if ranks.rank == 0:
        prepare_out_dir(config, state["iter"])
    parts = {
        "model": model,
        "optimizers": optimizers,
        "data": data,
        "state": state,
        "before": {"iter": 0},
    }
    return SimpleNamespace(**parts, config=config, device=device, ranks=ranks)


def prepare_update(model, data, config, state, device, checkpoint):
    """Open what is not to be forgotten; with update=memory freeze the network, and choose slots."""
    if config.background:
        old = data["old"] = open_dataset(
            find_folder(config.background), model.config.block_size, config.seed
        )
        asked = {
            question["prompt"] for question in data["questions"] or ()
        }  # and answered otherwise now
        old["questions"] = [q for q in old["questions"] or () if q["prompt"] not in asked]
        own = config.background == checkpoint["train_config"]["dataset"]
        if own and old["fingerprint"] != checkpoint["fingerprint"]:
            raise ValueError(
                f"background={config.background}: not what {config.init_from} was trained on"
            )
    if not data["vocabulary"] == data.get("old", data)["vocabulary"] == checkpoint["vocabulary"]:
        what = f"dataset={config.dataset}, background={config.background}"
        raise ValueError(f"{what}: one has another vocabulary than {config.init_from}")
    if config.update == "memory":
        check_slots(state["slots"], config, model)
        S = 0 if model.pool is None else model.pool.slots
        if config.update_slots > S or S == 0:
            raise ValueError(
                f"update_slots={config.update_slots}: {config.init_from} has {S:,} slots"
            )
        model.requires_grad_(False).pool.values.requires_grad_(True)
        state["base"] = state["base"] or [
            identity(model.state_dict()),
            f"{config.init_from}/ckpt.pt",
        ]
        if config.update_slots and state["slots"] is None:
            began = time.perf_counter()
            state["slots"] = choose_slots(model, data["train"], old["train"], config, device)
            state["seconds"] += time.perf_counter() - began


def check_slots(slots, config, model):
    """Of an update that goes on: raises ValueError if a checkpoint has no such slots."""
    if slots is None:
        return
    path = Path(config.out_dir, "ckpt.pt")
    if (
        not torch.is_tensor(slots)
        or slots.dtype != torch.int64
        or slots.shape != (config.update_slots,)
    ):
        raise ValueError(
            f"{path} has no list of update_slots={config.update_slots} slots; it is damaged"
        )
    if slots.min() < 0 or slots.max() >= model.pool.slots:
        raise ValueError(f"{path} has slots that the table does not have; it is damaged")


def summarize(run, result):
    model, c, data, steps = run.model, run.config, run.data, run.state["iter"]
    tokens = steps * c.batch_size * c.gradient_accumulation_steps * model.config.block_size
    print(f"\n{steps:,} steps, {tokens:,} tokens in {run.state['seconds']:.0f} s of training")
    print(f"  {model.describe()}")
    print(
        "  loss         {train_loss:.3f} train, {val_loss:.3f} validation (nats a token)".format(
            **result
        )
    )
    for name, part in (("recall", data), ("old_recall", data.get("old"))):
        if name in result:
            asked = f"{len(part['questions']):,} {'old ' * (part is not data)}closed-book questions"
            before = f" ({run.before[name]:.1%} before)" if name in run.before else ""
            print(f"  recall       {result[name]:.1%} of {asked}{before}")
    if model.pool is not None:
        even = "KL from even use {mem_kl:.2f} nats; the busiest 1% get {mem_top1:.1%} of reads"
        print(f"  memory       {{mem_used:.1%}} of slots read; {even}".format(**result))
    print(f"  written to   {c.out_dir}/ckpt.pt, log.jsonl{', delta.pt' * (c.update == 'memory')}")
    words = ["sample.py", f"--out_dir={c.out_dir}", *["--recall"] * ("recall" in result)]
    if c.update == "memory":
        words[1:2] = (
            f"--out_dir={c.init_from}",
            f"--delta={c.out_dir}/delta.pt",
            f"--dataset={c.dataset}",
        )
    print(f"\nNext: python {shlex.join(words)}")


def main(argv):
    rank, run = os.environ.get("RANK", "0"), None  # rank 0 speaks for all
    with contextlib.nullcontext() if rank == "0" else contextlib.redirect_stderr(io.StringIO()):
        options = parse_options(argv)
    try:
        with enough_memory():
            ranks = Ranks(TrainConfig(timeout=options.get("timeout", TrainConfig.timeout)).timeout)
            run = start(options, ranks)
            if rank == "0":
                groups = f", {ranks.world} processes, {ranks.M} to a table" if ranks.on else ""
                print(f"{run.model.describe()}; on {run.device}{groups}", flush=True)
            result = train(run)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        lost = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and "gloo" in str(error)
        )
        if run and not lost and not isinstance(error, (Refused, OSError)):
            raise  # an error of our own keeps its traceback
        if (
            rank != "0"
        ):  # all may have found it: the others wait while rank 0 speaks, and torchrun ends them
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        message = (
            f"rank {rank}: " * (rank != "0") + "another process is lost: " * lost + explain(error)
        )
        kept = run and Path(run.config.out_dir, "ckpt.pt").exists()
        hint = (
            "The last checkpoint is whole: go on with --resume"
            if kept
            else "Start again with --overwrite"
        )
        message += f". {hint}" if run else ""
        print(
            f"{chr(10) * bool(run)}train.py: {message}", file=sys.stderr, flush=True
        )  # below the bar
        (os._exit if dist.is_initialized() else sys.exit)(
            1
        )  # a tidy end would wait for the other processes
    if rank == "0":
        summarize(run, result)
    if ranks.on:
        dist.destroy_process_group()
        os._exit(
            0
        )  # one of gloo's threads that frees a tensor while Python ends would abort a finished run


if __name__ == "__main__":
    steady_streams()
    main(sys.argv[1:])
