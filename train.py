"""Train a GPT, with memory layers or without.

    python train.py                                 a small Memory+ model on facts it has to remember; minutes on a laptop
    python train.py --preset=facts-dense            the same compute without a memory, to compare
    python train.py --preset=facts-memory --mem_keys=64 --out_dir=out/small     any option over any preset
    python train.py --resume --out_dir=out/small    go on where that run stopped, on a CPU to the same bits
    torchrun --standalone --nproc_per_node=8 train.py ...       the same run on eight GPUs

Options are the fields of TrainConfig below and of GPTConfig in model.py. Read from the bottom: main, train, evaluate.
"""

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out
os.environ["NANOMEM_PARENT"] = str(os.getppid())  # before seconds of imports
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # Apple GPUs lack a few sparse operators: those run on the CPU
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.dataset import Dataset, find_folder, open_dataset
from data.files import Refused, atomic_write, blame, enough_memory, explain, lock, one_line, steady_streams, sweep, write_file
from kernels import RowAdam
from memory import ring_bytes
from model import GPT, GPTConfig, check_options, option


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ValueError, naming the option, for a value that makes no sense."""

    out_dir: str = option("out", "folder for checkpoints and log; a preset has its own, out/PRESET")
    resume: bool = option(False, "go on with the run in out_dir, with its options")
    overwrite: bool = option(False, "replace the run in out_dir")
    dataset: str = option("facts", "a folder in data/, or the path of one with train.bin and val.bin")
    batch_size: int = option(8, "sequences in a micro-step", 1)
    gradient_accumulation_steps: int = option(1, "micro-steps in a step, of all processes together", 1)
    max_iters: int = option(1000, "steps to train for; the learning rate falls over all of them", 1)
    learning_rate: float = option(6e-4, "largest learning rate of the network (AdamW)", below=1e31)
    min_lr: float = option(0.0, "learning rate of the network that the cosine ends at", below=1e31)
    warmup_iters: int = option(50, "steps over which the learning rate rises to its largest")
    mem_learning_rate: float = option(3e-3, "rate of the memory's values (RowAdam), constant: a cosine recalls less", 1e-30, 1e31)
    weight_decay: float = option(0.1, "AdamW's decay of matrices; gains and memory values are not decayed", below=1e31)
    beta1: float = option(0.9, "decay of the mean of the gradient, AdamW and RowAdam", below=1)
    beta2: float = option(0.98, "decay of the mean of its square, AdamW and RowAdam", below=1)
    grad_clip: float = option(1.0, "largest norm of the network's gradient; 0: any", below=1e31)
    eval_interval: int = option(250, "steps between evaluations, each followed by a checkpoint", 1)
    eval_iters: int = option(20, "batches in an estimate of the loss", 1)
    log_interval: int = option(10, "steps between lines of the log", 1)
    seed: int = option(1, "of first values, order of the data, and dropout", below=2**63)
    device: str = option("auto", "cpu, cuda, mps; auto: the fastest there is")
    dtype: str = option("auto", "auto: bfloat16 on a GPU that has it", choices=("auto", "float32", "bfloat16"))
    compile: str = option("auto", "torch.compile; auto: on a GPU", choices=("auto", "true", "false"))
    memory_parallel: int = option(1, "processes that share one table, each with a part of its columns; the others have copies", 1)
    backend: str = option("auto", "how processes talk; auto: nccl on GPUs", choices=("auto", "nccl", "gloo"))
    timeout: int = option(600, "seconds that a process waits for another one before it gives up", 1)

    def __post_init__(self):
        check_options(self)
        if not self.out_dir.strip():
            raise ValueError("out_dir=: must name a folder; is it a variable that is not set?")


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
    "gpt2-small": SMALL,
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
        for f in dataclasses.fields(cls):
            if f.name == "vocab_size":  # the dataset says
                continue
            known.append(f.name)
            choices = f.metadata["choices"]
            kind = {bool: to_bool, tuple: to_numbers}.get(type(f.default), str.lower if choices else type(f.default))
            optional_value = {"nargs": "?", "const": True} if kind is to_bool else {}  # --resume alone means true
            help = f"{f.metadata['help']} ({', '.join(choices)}{'; ' * bool(choices)}default: {f.default!r})".replace("%", "%%")
            group.add_argument(f"--{f.name}", type=kind, metavar="", default=argparse.SUPPRESS, help=help, **optional_value)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], known, n=1)
        parser.error(f"unknown option {unknown[0]}" + (f"; did you mean --{close[0]}?" if close else "; see --help"))
    return vars(options)


def make_configs(options):
    """{option: value} -> TrainConfig, GPTConfig. Raises ValueError for values that do not fit."""
    names = {f.name for f in dataclasses.fields(GPTConfig)}
    training, model = ({name: value for name, value in options.items() if (name in names) == which} for which in (False, True))
    return TrainConfig(**training), GPTConfig(**model)


# --- checkpoints ------------------------------------------------------------------------------------------------------


FORMAT = "nanomem-1"
PART = r"-\d+-[0-9a-f]{8}-\d+of\d+"  # of a table: step, checkpoint, rank and how many
RUN_FILES = rf"(ckpt|best)({PART})?\.pt|log\.jsonl"  # all that a run writes


def save_checkpoint(path, checkpoint, ranks):
    """Tensors and plain values only. Whole or not at all: a full disk or a kill leaves the checkpoint that was there.

    The table of memory_parallel=M goes into M files beside `path`, which names them and is written last: then they count."""
    def write(path, contents):
        with room_for(path), atomic_write(path) as f:
            torch.save(contents, f)

    path, names = Path(path), []
    if ranks.M > 1:
        save = ranks.gather(os.urandom(4).hex())[0]  # each part says which it is, and of what; and none takes the place of another
        names = [f"{path.stem}-{checkpoint['iter']}-{save}-{i}of{ranks.M}.pt" for i in range(ranks.M)]
        part = {"format": FORMAT, "part": [ranks.rank, save], "values": checkpoint["model"].pop("pool.values")}
        if "optimizers" in checkpoint:
            network, table = checkpoint["optimizers"]
            part |= {name: table["state"][0][name] for name in ("means", "squares")}
            table = {**table, "state": {0: {"step": table["state"][0]["step"]}}}
            checkpoint = {**checkpoint, "optimizers": [network, table]}
        checkpoint = {**checkpoint, "pool_parts": names, "save": save}
        ranks.together(ranks.rank < ranks.M, lambda: write(path.with_name(names[ranks.rank]), part))
    ranks.together(ranks.rank == 0, lambda: write(path, checkpoint))
    if ranks.rank == 0:
        for old in path.parent.iterdir():
            if re.fullmatch(rf"{path.stem}{PART}\.pt", old.name) and old.name not in names:
                old.unlink()


@contextlib.contextmanager
def room_for(path):
    """If the disk has none for that file, say what is left."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        kept = "There is no checkpoint yet: start again with --overwrite"
        if path.with_name("ckpt.pt").exists():
            kept = "The last checkpoint is untouched: go on with --resume"
        raise OSError(f"could not write {path} ({explain(error)}). {kept} when there is room on the disk") from None


def read_checkpoint(path):
    try:
        mmap = zipfile.is_zipfile(path)  # as torch.save writes: read what is used, so that sampling leaves out the moments
        with blame(f"{path} is damaged or not a checkpoint", "give another one"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise FileNotFoundError(f"no checkpoint {path}; out_dir= must name the folder of a run that has saved one") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of nanomem")
    return checkpoint


def load_checkpoint(path, device="cpu", group=None):
    """The checkpoint as a dictionary, its "model" a GPT with its weights. Nothing in the file is executed.

    However many processes have written it, with a group each of its processes gets the columns of the table that are its own.
    Raises FileNotFoundError or ValueError, naming the file, for one that is missing, damaged, or something else."""
    path = Path(path)
    checkpoint = read_checkpoint(path)

    def my_columns(tensors):
        """Of a table that lies before us in pieces of equal width."""
        width, mine = tensors[0].size(1), model.pool.columns
        pieces = [t[:, max(0, mine.start - i * width) : max(0, mine.stop - i * width)] for i, t in enumerate(tensors)]
        return torch.cat(pieces, dim=1)

    with blame(f"{path}: its parts do not fit together", "it was edited, damaged, or is of another version"):
        while True:
            try:
                parts = [read_checkpoint(path.with_name(name)) for name in checkpoint.get("pool_parts", [])]
                break
            except (OSError, ValueError):  # a run may have put another checkpoint in its place
                before, checkpoint = checkpoint, read_checkpoint(path)
                if checkpoint.get("save") == before.get("save"):
                    raise
        if any(part["part"] != [i, checkpoint["save"]] for i, part in enumerate(parts)):
            raise ValueError(f"of {', '.join(checkpoint['pool_parts'])} one is another part, or of another checkpoint")
        TrainConfig(**checkpoint["train_config"])
        with torch.device(device):
            model = GPT(GPTConfig(**checkpoint["model_config"]), group, initialize=False)
        weights = checkpoint["model"]
        if model.pool is not None:
            weights["pool.values"] = my_columns([part["values"] for part in parts] or [weights["pool.values"]])
            if "optimizers" in checkpoint:
                for state in checkpoint["optimizers"][1]["state"].values():
                    for name in {"means", "squares"} & (set(state) | set(*parts[:1])):
                        state[name] = my_columns([part[name] for part in parts] or [state[name]])
        model.load_state_dict(weights)
        if not math.isfinite(largest_weight(model)):
            raise ValueError("there are weights that are no numbers")
        kinds = {"iter": int, "seconds": float, "best_val_loss": float, "separator": int, "fingerprint": str, "random": list}
        wrong = [name for name, kind in kinds.items() if type(checkpoint.get(name)) is not kind]
        if wrong or not (checkpoint["iter"] > 0 and 0 <= checkpoint["separator"] < model.config.vocab_size):
            raise ValueError(f"{', '.join(wrong) or 'iter or separator'} cannot be right")
    return {**checkpoint, "model": model}


# --- the parts of a run -----------------------------------------------------------------------------------------------


def choose_device(name, number=None):
    """A torch.device; number: which of several GPUs. Raises ValueError for one that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":  # PyTorch wants the index in some places
        name = f"cuda:{number or 0}"
    with blame(f"device={name} cannot be used here", "try device=cpu"):
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # what is left in float32 may use TF32
        elif platform.libc_ver()[0] == "glibc":  # it gives large blocks back to the system as soon as they are free, and a step
            libc = ctypes.CDLL(None)  # has to take them again, page by page: 7% of its time
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
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
    """AdamW for the network; RowAdam for the pool, which moves only the rows that a step has read.

    eps is there against 0 / 0 and no more. The loss is a mean over all tokens of a step: with half a million of them a row of the
    table has gradients of 1e-9, and a sub-key little more. The usual eps of 1e-8 would hold still what is read least."""
    groups = model.parameter_groups()
    network = [
        {"params": groups["matrices"], "weight_decay": config.weight_decay},
        {"params": groups["gains"], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    optimizers = [torch.optim.AdamW(network, lr=config.learning_rate, betas=betas, eps=1e-15, fused=True)]
    if groups["pool"]:
        optimizers.append(RowAdam(groups["pool"], lr=config.mem_learning_rate, betas=betas, eps=1e-15, seed=config.seed))
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


class Ranks:
    """This process among those that torchrun has started: rank, of `world`. Alone it has nobody to wait for.

    With memory_parallel=M, ranks 0 to M-1 share one table, M to 2M-1 a copy of it, and so on: `group` is that of this rank.
    `replicas` are the ranks that hold the same columns as this one."""

    def __init__(self):
        """Reads what torchrun says. Raises ValueError if that is not enough to find the others."""
        self.rank, self.local, self.world, self.on = 0, 0, 1, "RANK" in os.environ
        self.M, self.group, self.replicas, self.control, self.store = 1, None, None, None, None
        self.sent = collections.Counter()  # bytes
        numbers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
        with blame(f"{', '.join(numbers)} must be whole numbers, and MASTER_ADDR be set, too", "start processes with torchrun"):
            if self.on:
                self.rank, self.local, self.world, port = (int(os.environ[name]) for name in numbers)
                if not 0 <= self.rank < self.world or "MASTER_ADDR" not in os.environ:
                    raise ValueError(f"rank {self.rank} of {self.world} at {os.environ.get('MASTER_ADDR')}")
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own store, which outlives its processes
                if sys.platform == "linux":
                    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: should torchrun die, stop as if it had said so
                if str(os.getppid()) != os.environ["NANOMEM_PARENT"]:
                    raise ValueError("torchrun has died meanwhile")
                self.store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False)

    def began(self, out_dir):
        """Whether this very job has begun the run in out_dir, and was restarted by torchrun since."""
        return self.store is not None and self.store.check([f"nanomem {Path(out_dir).resolve()}"])

    def meet(self, device, backend, timeout):
        if not self.on:
            return
        backend = {"auto": "nccl" if device.type == "cuda" else "gloo"}.get(backend, backend)
        with blame(f"backend={backend}: the {self.world} processes do not find each other", "start them with torchrun"):
            timeout = datetime.timedelta(seconds=timeout)
            store, *_ = next(dist.rendezvous("env://", timeout=timeout))
            # After a restart torchrun's store still has the addresses of the processes before: keep them apart.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=timeout)
            self.control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")  # for small things on the CPU

    def share(self, M):
        """Form groups of M ranks that share a table. M divides world."""
        if not self.on:
            return
        self.M = M
        for first in range(0, self.world, M):  # every rank has to make every group, in the same order
            members = range(first, first + M)
            group = dist.new_group(list(members))
            self.group = group if M > 1 and self.rank in members else self.group
        for i in range(M):
            members = range(i, self.world, M)
            group = dist.new_group(list(members))
            self.replicas = group if self.rank in members else self.replicas

    def gather(self, value):
        """The value of every rank, a list. value: plain values"""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def any(self, number):
        """The largest of the numbers that ranks have, or None."""
        if self.world == 1:
            return number
        largest = torch.tensor(number or 0)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return largest.item() or None

    def refuse(self, message):
        """For what all ranks find at the same time: one of them says it."""
        raise Refused(message) if self.rank == 0 else SystemExit(1)

    def together(self, takes_part, do):
        """do() in the ranks that take part. If it fails in one of them, none of them goes on, and nobody is left waiting."""
        result = error = None
        try:
            result = do() if takes_part else None
        except Exception as caught:
            if self.world == 1:
                raise
            error = explain(caught)
        errors = self.gather(error)
        failed = [str(rank) for rank, error in enumerate(errors) if error is not None]
        if failed:
            where = f"rank {', '.join(failed)}: " if len(failed) < self.world else ""
            self.refuse(where + errors[int(failed[0])])
        return result

    def total(self, numbers):
        """The sum over all ranks of each of some numbers (float64)."""
        if self.world == 1:
            return numbers
        numbers = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(numbers, group=self.control)
        return numbers.tolist()

    def same(self, what, value):
        """Raises ValueError if the ranks do not agree on value. what: its name"""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                self.refuse(f"{what} is {values[0]} on rank 0 and {other} on rank {rank}: all must have the same")

    def check_in_step(self, model):
        """Every rank takes the same updates, so all have the same weights, bit for bit, and replicas the same columns."""
        if self.world == 1:
            return
        sums = [p.detach().double().abs().sum().item() for name, p in model.named_parameters() if name != "pool.values"]
        table = 0.0 if model.pool is None else model.pool.values.detach().sum(dtype=torch.float64).item()
        everyone = self.gather((sum(sums), table))
        for rank, (network, table) in enumerate(everyone):
            if network != everyone[0][0] or table != everyone[rank % self.M][1]:
                self.refuse(f"rank {rank} is out of step: its weights are not those of rank {rank % self.M}. Is a GPU faulty?")


def data_parallel(model, run_model, ranks):
    """DistributedDataParallel for the network; the table has its own way (ValuePool.combine_gradient)."""
    if model.pool is not None:
        model.pool.values.requires_grad_(False)  # DDP takes the parameters that have a gradient
        # torch.compile would cut the graph at DDP's buckets, and PyTorch 2.9 then objects that two parts add to one gradient.
        torch._dynamo.config.optimize_ddp = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.13 has another name for the last option, 2.9 has not
        # All begin with the same weights, and buffers are constants: there is nothing to send around.
        parallel = DistributedDataParallel(run_model, init_sync=False, broadcast_buffers=False)
    if model.pool is not None:
        model.pool.values.requires_grad_(True)

    def reduce(_, bucket):
        ranks.sent["network"] += ring_bytes(bucket.buffer(), ranks.world)
        return allreduce_hook(None, bucket)

    parallel.register_comm_hook(None, reduce)
    return parallel


class Stop:
    """Turns SIGINT or SIGTERM into a request to stop after the step. What is sent to a whole job comes twice, as torchrun passes it
    on: only a second Ctrl-C, more than a second later, ends the process at once."""

    def __init__(self):
        self.signal = self.time = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request)

    def request(self, number, frame):
        if self.signal is None:
            self.signal, self.time = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.time > 1:
            os._exit(130)


def largest_weight(model):
    """Not the largest, but infinite or no number if one of them is."""
    return sum(p.detach().norm(math.inf).item() for p in model.parameters())


def refuse_nan(number, it, config, ranks, what="loss"):
    if not math.isfinite(number):
        ranks.refuse(
            f"the {what} is {number} at step {it}: training has diverged. {config.out_dir} keeps what was saved before. "
            f"Try a smaller learning_rate (now {config.learning_rate:g}) or mem_learning_rate "
            f"(now {config.mem_learning_rate:g}), or a longer warmup_iters"
        )


def train(model, optimizers, data, config, device, state, ranks):
    """The loop. state: {"iter", "best_val_loss", "seconds"}, updated in place. Returns the last evaluation. Exits with 128 and
    the number of the signal if one stops the run, after saving."""
    out_dir, stop, first_rank = Path(config.out_dir), Stop(), ranks.rank == 0
    context = precision(config.dtype, device)
    compiled = config.compile == "true" or (config.compile == "auto" and device.type == "cuda" and os.name == "posix")
    run_model = torch.compile(model) if compiled else model
    if ranks.on:
        run_model = data_parallel(model, run_model, ranks)
    network = [p for group in optimizers[0].param_groups for p in group["params"]]
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * model.config.block_size
    flops_per_step = 3 * sum(model.flops_per_token(model.config.block_size).values()) * tokens_per_step
    peak, result, pool = peak_flops(device), None, model.pool
    if pool is not None:
        pool.collect_gradients()
    micro_steps = config.gradient_accumulation_steps // ranks.world  # of this rank

    def save(name, with_optimizers=True):
        if first_rank and not (out_dir.exists() and os.path.samestat(os.stat(out_dir), lock(out_dir))):
            raise Refused(f"{out_dir} is not the folder that this run has begun in: it was moved, removed or replaced")
        # The loss of this step was that before its update.
        refuse_nan(ranks.total([largest_weight(model)])[0], state["iter"], config, ranks, "largest weight")
        checkpoint = {
            "format": FORMAT,
            "model_config": dataclasses.asdict(model.config),
            "train_config": dataclasses.asdict(config),
            "model": model.state_dict(),
            **{name: data[name] for name in ("vocabulary", "separator", "fingerprint")},
            "random": ranks.gather((torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None)),
            **state,
        }
        if with_optimizers:
            checkpoint["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(out_dir / name, checkpoint, ranks)

    # Micro-step n of the run is taken by rank n modulo world: what a step learns from does not depend on how many ranks there are.
    first, end = (n * config.gradient_accumulation_steps for n in (state["iter"], config.max_iters))
    numbers = (range(n * config.batch_size, (n + 1) * config.batch_size) for n in range(first + ranks.rank, end, ranks.world))
    loader = prefetch(data["train"], numbers, device)
    bar = tqdm(None, out_dir.name, config.max_iters, initial=state["iter"], unit="step", dynamic_ncols=True, disable=not first_rank)
    shown, clock, since, waited = {}, time.perf_counter(), state["iter"], 0.0
    while state["iter"] < config.max_iters:
        it = state["iter"]
        lr = learning_rate(config, it)
        for group in optimizers[0].param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=device)
        for micro in range(micro_steps):
            last = micro + 1 == micro_steps
            asked = time.perf_counter()
            windows = next(loader)
            waited += time.perf_counter() - asked
            with run_model.no_sync() if ranks.on and not last else contextlib.nullcontext():  # DDP combines in the last one
                with context:
                    micro_loss = run_model(*inputs_and_targets(windows, device))[1] / micro_steps
                micro_loss.backward()
            loss += micro_loss.detach()
        if pool is not None:
            pool.combine_gradient(ranks.replicas, ranks.world)
        if config.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(network, config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state["iter"] = it = it + 1
        bar.update()

        evaluating = it % config.eval_interval == 0 or it == config.max_iters
        stopped_by = ranks.any(stop.signal)
        if it % config.log_interval == 0 or evaluating or stopped_by:
            loss = ranks.total([loss.item()])[0] / ranks.world  # waits for the GPU
            refuse_nan(loss, it, config, ranks)
            now = time.perf_counter()
            state["seconds"] += now - clock
            line = {"iter": it, "loss": loss, "lr": lr, "tokens_per_s": (it - since) * tokens_per_step / (now - clock)}
            line["data_wait"] = waited / (now - clock)  # share of the time
            shown |= {"loss": f"{loss:.3f}", "tok/s": f"{line['tokens_per_s']:,.0f}"}
            if device.type == "cuda":
                line["gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
                line["gpu_gib_reserved"] = torch.cuda.max_memory_reserved(device) / 2**30
                shown["GPU"] = f"{line['gpu_gib']:.1f} GiB"
            if ranks.on:
                sent = ranks.sent + (pool.sent if pool is not None else collections.Counter())
                line |= {f"sent_{name}": count / (it - since) for name, count in sent.items()}  # bytes a step, by this rank
            if peak:
                line["mfu"] = line["tokens_per_s"] / tokens_per_step * flops_per_step / peak / ranks.world
                shown["mfu"] = f"{line['mfu']:.1%}"
            if evaluating:
                ranks.check_in_step(model)
                with context:
                    result = evaluate(model, data, config, device)
                refuse_nan(result["val_loss"], it, config, ranks)
                result |= {name: count for name, count in line.items() if name.startswith("sent_")}
                line |= result
                shown["val"] = f"{result['val_loss']:.3f}"
                shown |= {"recall": f"{result['recall']:.1%}"} if "recall" in result else {}
                shown |= {"mem": f"{result['mem_used']:.0%} used"} if "mem_used" in result else {}
            if first_rank:
                with room_for(out_dir / "log.jsonl"), open(out_dir / "log.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
            bar.set_postfix(shown)
            if evaluating and result["val_loss"] < state["best_val_loss"]:
                state["best_val_loss"] = result["val_loss"]
                save("best.pt", with_optimizers=False)
            if evaluating or stopped_by:
                save("ckpt.pt")
            clock, since, waited = time.perf_counter(), it, 0.0  # evaluation and saving are not training time
            for counter in (ranks.sent, *((pool.sent,) if pool is not None else ())):
                counter.clear()
        if stopped_by and it < config.max_iters:  # at the last step the run is complete anyway
            bar.close()
            if first_rank:
                again = f"{'torchrun ...' if ranks.on else 'python'} train.py --resume --out_dir={shlex.quote(str(out_dir))}"
                print(f"Stopped by {signal.Signals(stopped_by).name} after step {it}; {out_dir / 'ckpt.pt'} is saved.")
                print(f"Go on with: {again}")
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
    sent = [f"{name.removeprefix('sent_')} {count / 1e6:,.2f} MB" for name, count in result.items() if name.startswith("sent_")]
    if sent:
        print(f"  sent         {', '.join(sent)} a step, by each process")
    print(f"  written to   {config.out_dir}/ckpt.pt (last), best.pt (lowest validation loss), log.jsonl")
    print("\nNext:")
    print(f"  python sample.py --out_dir={shlex.quote(config.out_dir)}" + (" --recall" if "recall" in result else ""))
    if model.pool is not None and config.dataset == "facts":
        print("  python train.py --preset=facts-dense      # the same compute without a memory")


def build_model(config, group, device):
    """A GPT. Raises ValueError if this machine cannot hold it: the system would end the process without a word."""
    with torch.device("meta"):  # a model that takes no room
        needs = {name: 2 * p.nbytes + 8 * p.numel() for name, p in GPT(config, group, initialize=False).named_parameters()}
    need, table, have = sum(needs.values()) / 2**30, needs.get("pool.values", 0) / 2**30, math.inf
    if device.type == "cuda":
        have = torch.cuda.mem_get_info(device)[1] / 2**30
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if need > have:
        raise ValueError(
            f"the model does not fit: with gradients and moments it takes {need:,.1f} GiB, {table:,.1f} of them for the table of "
            f"mem_keys={config.mem_keys}, and {device} has {have:,.1f}. Lower mem_keys, n_embd, or n_layer"
        )
    with device:  # there its first numbers are drawn, which takes a CPU seconds
        return GPT(config, group)


def complete_options(options, ranks):
    """Options of the command line -> all options: over a preset, or over those of the run that is resumed."""
    folder = options.get("out_dir", f"out/{options.get('preset', next(iter(PRESETS)))}")
    if ranks.began(folder) and not options.get("resume"):  # torchrun --max-restarts
        options = {**options, "out_dir": folder, "overwrite": True}
        if (Path(folder) / "ckpt.pt").exists():  # else it ended before its first checkpoint
            options |= {"overwrite": False, "resume": True}
            options.pop("preset", None)
    if not options.get("resume"):
        name = options.get("preset", next(iter(PRESETS)))
        if name not in PRESETS:
            raise ValueError(f"preset={name}: there is {', '.join(PRESETS)}")
        return {key: value for key, value in ({"out_dir": f"out/{name}"} | PRESETS[name] | options).items() if key != "preset"}
    if "preset" in options:
        raise ValueError("preset: a resumed run keeps its options; give --resume and --out_dir, and what you want to change")
    options = {"out_dir": "out/facts-memory"} | options
    path = Path(options["out_dir"]) / "ckpt.pt"
    checkpoint = read_checkpoint(path)
    if "optimizers" not in checkpoint:
        raise ValueError(f"{path} has weights only, like a best.pt: it can be sampled from, but training cannot go on from it")
    with blame(f"{path} has no options that fit", "it was edited, damaged, or is of another version"):
        saved = checkpoint["train_config"] | checkpoint["model_config"]
        make_configs(saved)
    asked = {name: value for config in make_configs(saved | options) for name, value in dataclasses.asdict(config).items()}
    fixed = {f.name for f in dataclasses.fields(GPTConfig)} | {"seed", "batch_size", "gradient_accumulation_steps"}
    for name in fixed & set(options):
        if asked[name] != saved[name]:
            raise ValueError(f"{name}={options[name]}: the run in {path.parent} has {name}={saved[name]} and must keep it")
    return saved | options


def prepare(config, options, device, ranks):
    """All that train() needs but the state of a run before. Raises ValueError or OSError for what is wrong with it."""
    folder, out_dir = find_folder(config.dataset), Path(config.out_dir)
    if ranks.rank == 0 and out_dir.is_dir():
        hold(config)
    torch.manual_seed(config.seed)
    model_config = make_configs(options | {"vocab_size": Dataset(folder).vocab_size})[1]
    data, checkpoint = open_dataset(folder, model_config.block_size, config.seed), None
    if config.resume:
        checkpoint = load_checkpoint(out_dir / "ckpt.pt", device, ranks.group)
        model = checkpoint["model"]
        if checkpoint["fingerprint"] != data["fingerprint"]:
            raise ValueError(f"dataset={config.dataset}: {folder} does not hold the data that the run in {out_dir} was trained on")
        if checkpoint["iter"] >= config.max_iters:
            raise ValueError(f"the run in {out_dir} is complete at step {checkpoint['iter']}; to go on, give a larger max_iters")
    else:
        model = build_model(model_config, ranks.group, device)
    return model, make_optimizers(model, config), data, checkpoint


def hold(config):
    """Keep out_dir for this process, and see that no other run is lost. Returns the files of the run that is in it."""
    out_dir = Path(config.out_dir)
    lock(out_dir)
    old = sorted(path for path in out_dir.iterdir() if re.fullmatch(RUN_FILES, path.name))
    if old and not (config.resume or config.overwrite):
        go_on = "go on (--resume), " * (out_dir / "ckpt.pt").exists()
        raise ValueError(f"{out_dir} holds a run already: {go_on}replace it (--overwrite), or give another --out_dir")
    return old


def claim(config, resumed_at, ranks):
    """Make out_dir ready for this run. resumed_at: the step that it goes on from, or None."""

    def is_later(line):
        with contextlib.suppress(Exception):  # what cannot be read stays as it is
            return json.loads(line)["iter"] > resumed_at

    log = Path(config.out_dir) / "log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    old = hold(config)
    sweep(log.parent, RUN_FILES)
    if resumed_at is None:
        for path in reversed(old):  # a checkpoint before the parts of its table
            path.unlink()
    elif log.exists():
        lines = log.read_bytes().splitlines(keepends=True)  # of which a kill can cut the last short
        write_file(log, b"".join(line for line in lines if line.endswith(b"\n") and not is_later(line)))
    if ranks.store:
        ranks.store.set(f"nanomem {log.parent.resolve()}", "")  # see Ranks.began


def start(options, ranks):
    """Everything that can be wrong is found here, before training. Returns the arguments of train()."""
    options = complete_options(options, ranks)
    config, model_config = make_configs(options)
    with one_line(f"train.py: rank {ranks.rank}") if ranks.rank > 0 else contextlib.nullcontext():  # it may be the only one without
        device = choose_device(config.device, ranks.local if ranks.on else None)
    ranks.meet(device, config.backend, config.timeout)
    for name, value in sorted(options.items()):
        ranks.same(f"{name}=", value)
    if config.gradient_accumulation_steps % ranks.world:
        raise ValueError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}, the micro-steps of all processes together, must be "
            f"divisible by the {ranks.world} that torchrun has started"
        )
    M = config.memory_parallel if model_config.mem_layers else 1
    if ranks.world % M:
        raise ValueError(f"memory_parallel={M} does not divide the {ranks.world} processes; it need not be that of the run before")
    if model_config.mem_value_dim % M:
        raise ValueError(f"memory_parallel={M} does not divide the width of a value, {model_config.mem_value_dim}")
    ranks.share(M)

    # First one process on each machine: it may have to make the data.
    first = ranks.together(ranks.local == 0, lambda: prepare(config, options, device, ranks))
    others = ranks.together(ranks.local > 0, lambda: prepare(config, options, device, ranks))
    model, optimizers, data, checkpoint = first or others
    ranks.together(ranks.rank == 0, lambda: claim(config, checkpoint and checkpoint["iter"], ranks))
    state = {"iter": 0, "best_val_loss": math.inf, "seconds": 0.0}
    if ranks.rank > 0:
        torch.manual_seed(config.seed + ranks.rank * 0x9E3779B9)  # dropout of its own
    if checkpoint:
        state = {name: checkpoint[name] for name in state}
        with blame(f"{config.out_dir}/ckpt.pt: the state of its optimisers or random numbers is wrong", "go on from another one"):
            for optimizer, saved_state in zip(optimizers, checkpoint["optimizers"], strict=True):
                groups = optimizer.state_dict()["param_groups"]  # with the rates and decays of this command line
                optimizer.load_state_dict(saved_state | {"param_groups": groups})
                for p in (p for group in optimizer.param_groups for p in group["params"]):
                    moments = {**optimizer.state[p]}
                    step, wrong = moments.pop("step"), {"exp_avg", "exp_avg_sq"} != {*moments} != {"means", "squares"}
                    kinds = {(m.shape, m.dtype, m.layout) for m in moments.values()}
                    if wrong or step != state["iter"] or kinds != {(p.shape, torch.float32, torch.strided)}:
                        raise ValueError("not two moments for each parameter, after as many steps as the run")
            if len(checkpoint["random"]) == ranks.world:  # another number of ranks goes on with other noise
                cpu, cuda = checkpoint["random"][ranks.rank]
                torch.set_rng_state(cpu)
                if device.type == "cuda" and cuda is not None:
                    torch.cuda.set_rng_state(cuda)
    return model, optimizers, data, config, device, state, ranks


def main(argv):
    speaks = not re.fullmatch("0*[1-9][0-9]*", os.environ.get("RANK", "0"))  # for all
    with contextlib.nullcontext() if speaks else contextlib.redirect_stderr(io.StringIO()):
        options = parse_options(argv)
    with one_line("train.py", speaks=speaks), enough_memory():
        ranks = Ranks()
        model, optimizers, data, config, device, state, ranks = start(options, ranks)
    if speaks:
        together = f", {ranks.world} processes" * ranks.on + f" in groups of {ranks.M} that share the table" * (ranks.M > 1)
        print(f"{describe(model)}; on {device}{together}", flush=True)
    with one_line("\ntrain.py", (Refused, OSError)):  # below the bar; other errors are our own, and keep their traceback
        try:
            with enough_memory():
                result = train(model, optimizers, data, config, device, state, ranks)
        except RuntimeError as error:  # of a process that is gone, or does not answer
            if ranks.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            way_out = "start again with " + ("--resume" if (Path(config.out_dir) / "ckpt.pt").exists() else "--overwrite")
            lost = f"rank {ranks.rank} has lost another process ({explain(error)}). What {config.out_dir} holds is whole: {way_out}"
            print(f"\ntrain.py: {lost}", file=sys.stderr, flush=True)
            os._exit(1)  # a tidy end would wait for the other
    if speaks:
        summarize(model, result, config, state, data["questions"])
    if ranks.on:
        dist.destroy_process_group()
        os._exit(0)  # DDP keeps gloo's threads alive, and one that lets go of a tensor while Python ends would abort a finished run


if __name__ == "__main__":
    steady_streams()
    main(sys.argv[1:])
