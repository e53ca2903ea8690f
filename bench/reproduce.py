"""The experiments of the READMEs: trains what is missing, prints tables, draws the pictures.

    python bench/reproduce.py --list               the parts: what they ask, how long they take
    python bench/reproduce.py --only=headline      one part
    python bench/reproduce.py                      headline, systems, text, slots: 3 hours on 2 cores
    python bench/reproduce.py --tier=more          the others: a night
    python bench/reproduce.py --tier=gpu           a larger one on one GPU

A finished run is a line of bench/results.jsonl. A run is not repeated if a line has the same
options, data, machine and PyTorch (--any: any machine and PyTorch), so the same command continues
after an interruption. Ctrl-C waits for the runs at work and keeps them. On a CPU a run takes one
thread, and two are trained at a time.
"""

import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import find_folder
from data.facts.prepare import BITS, make_people
from model import GPT, GPTConfig
from presets import PRESETS
from runtime.checkpoint import read_checkpoint
from runtime.files import append_to_file, explain_errors, fail, lock_folder
from runtime.options import make_configs
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "reproduce"
RESULTS = ROOT / "bench" / "results.jsonl"


# --- experiments ----------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """train.py with a preset, and options over it."""

    preset: str
    given: dict

    def options(self):
        return {**PRESETS[self.preset], **self.given}

    def command(self, seed):
        """An option that the preset has anyway is left out, so that parts share runs."""
        preset = PRESETS[self.preset]
        given = {name: value for name, value in self.given.items() if preset.get(name) != value}
        return command_line("train.py", {"preset": self.preset, **given, "seed": seed})

    def settings(self):
        return settings_hash(self.options(), self.people() > 0)

    def people(self):
        """How many its data have: 2,000 in data/facts, 4,000 in out/facts4000. 0: other data."""
        name = self.options()["dataset"]
        if name == "facts":
            return 2000
        if name.startswith("out/facts"):
            return int(name.removeprefix("out/facts"))
        return 0

    def size(self):
        """Parameters, and FLOPs of a token forward, both in millions."""
        vocabulary = {"facts": 1712, "shakespeare": 256}[self.preset.partition("-")[0]]
        options = {**self.options(), "vocab_size": vocabulary}
        _, config = make_configs(options, TrainConfig, GPTConfig)
        with torch.device("meta"):
            model = GPT(config, initialize=False)
        parameters = sum(model.parameter_counts().values())
        flops = sum(model.flops_per_token(config.block_size).values())
        return parameters / 1e6, flops / 1e6


@dataclass(frozen=True)
class Update:
    """The model of BASE learns other facts: train.py finetunes all weights, edit/update.py changes
    rows of the table."""

    program: str
    given: dict

    def options(self):
        return self.given

    def command(self, seed):
        options = {"init_from": base_folder(seed), **self.given, "seed": seed}
        return command_line(self.program, options)

    def settings(self):
        return settings_hash({"program": self.program, **self.given}, True)


def command_line(program, options):
    words = ["python", program]
    for name, value in options.items():
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        words.append(f"--{name}={value}")
    return " ".join(words)


def settings_hash(options, with_people):
    """A line of results with another hash is of another experiment."""
    people = []
    if with_people:
        people = make_people(99, np.random.default_rng(0))
    text = json.dumps([options, people], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def base_folder(seed):
    return f"out/base-{BASE.settings()}-{seed}"


def facts(system, **given):
    return Training(f"facts-{system}", given)


def more_people(system, count, **given):
    """Each fact is seen 98 times, three times as often as in the demo."""
    options = {"max_iters": 21 * count // 4, "eval_interval": 3 * count // 4, **given}
    if count != 2000:
        options = {"dataset": f"out/facts{count}", **options}
    return facts(system, **options)


def large(system, **given):
    """For a GPU: 25 times the facts, 17 times the FLOPs."""
    options = dict(dataset="out/facts50000", batch_size=80, max_iters=10000, eval_interval=2500)
    return facts(system, **options, n_layer=4, n_head=8, n_embd=256, learning_rate=1.5e-3, **given)


def finetune(kind, **given):
    """Teach it 100 new people, or where 100 that it knows have moved to, in 200 steps."""
    options = dict(max_iters=200, eval_interval=50, warmup_iters=10, dataset=f"out/facts-{kind}")
    return Update("train.py", {**options, **given})


def update(kind, slots, **given):
    """The same by changing rows of the table. slots=0: all of them."""
    options = dict(max_iters=200, eval_interval=50, dataset=f"out/facts-{kind}", slots=slots)
    return Update("edit/update.py", {**options, **given})


BASE = facts("memory", mem_keys=512)  # in the demo's table every slot is in use


@dataclass(frozen=True)
class Part:
    tier: str  # cpu, more or gpu
    question: str
    seeds: range
    rows: dict  # {label: Training or Update}
    compared: bool = True  # with the first row, in a column of differences
    bits: bool = False  # a column of what the people's facts amount to

    def runs(self):
        """{command: (experiment, seed)}, all rows of a seed together."""
        pairs = itertools.product(self.seeds, self.rows.values())
        return {experiment.command(seed): (experiment, seed) for seed, experiment in pairs}


HEADLINE = {
    "Memory+": ("memory", {}),
    "dense": ("dense", {}),
    "dense, twice the FLOPs a token": ("dense2x", {}),
    "dense, as many seconds (6,000 steps)": ("dense", dict(max_iters=6000)),
}
PARTS = {
    "headline": Part("cpu", "Memory+ against dense: equal FLOPs, twice, equal seconds", range(1, 9), {
        name: facts(system, **given) for name, (system, given) in HEADLINE.items()
    }),
    "systems": Part("cpu", "all kinds of layers at equal FLOPs and parameters", range(1, 6), {
        "Memory+": facts("memory"),
        "product-key memory": facts("pkm"),
        "PEER": facts("peer"),
        "UltraMem": facts("ultramem"),
        "mixture of experts": facts("moe"),
        "dense": facts("dense"),
    }),
    "text": Part("cpu", "tinyshakespeare", range(1, 6), {
        "Memory+": Training("shakespeare-memory", {}),
        "dense": Training("shakespeare-dense", {}),
        "mixture of experts": Training("shakespeare-moe", {}),
    }),
    "rates": Part("more", "the headline's models at a higher rate", range(1, 9), {
        f"{name}, {rate:g}": facts(system, learning_rate=rate, **given)
        for name, (system, given) in HEADLINE.items() for rate in (2.5e-3, 4e-3)
    }, compared=False),
    "lower rates": Part("more", "and at a lower one", range(1, 3), {
        f"{name}, {rate:g}": facts(system, learning_rate=rate, **given)
        for name, (system, given) in HEADLINE.items() for rate in (2.5e-3, 1.5e-3)
    }, compared=False),
    "more rates": Part("more", "the other systems at other learning rates", range(1, 3), {
        f"{system}, {rate:g}": facts(system, learning_rate=rate)
        for system in ("pkm", "peer", "ultramem", "moe") for rate in (4e-3, 2.5e-3, 1.5e-3)
    }, compared=False),
    "slots": Part("cpu", "more slots", range(1, 6), {
        "16,384 slots": facts("memory"),
        "256 slots": facts("memory", mem_keys=16, n_ffn=248),  # n_ffn keeps the FLOPs equal
        "1,024 slots": facts("memory", mem_keys=32, n_ffn=240),
        "4,096 slots": facts("memory", mem_keys=64, n_ffn=216),
        "65,536 slots": facts("memory", mem_keys=256, n_ffn=88),
    }),
    "seconds": Part("more", "a mixture of experts, which is faster, in equal seconds", range(1, 9), {
        "Memory+": facts("memory"),
        "mixture of experts, as many seconds (5,000 steps)": facts("moe", max_iters=5000),
    }),
    "capacity": Part("more", "more people, each fact 98 times", range(1, 4), {
        f"{system}, {count:,} people": more_people(system, count)
        for count in (1000, 2000, 4000, 8000) for system in ("memory", "moe", "dense")
    }, compared=False, bits=True),
    "capacity rates": Part("more", "4,000 people, dense, other learning rates", range(1, 2), {
        f"dense, {rate:g}": more_people("dense", 4000, learning_rate=rate)
        for rate in (2.5e-3, 1.5e-3, 4e-3)
    }, compared=False),
    "ablations": Part("more", "the parts of Memory+; n_ffn keeps the FLOPs equal", range(1, 6), {
        "Memory+": facts("memory"),
        "no gate, no output matrix": facts("memory", mem_gate=False, n_ffn=216),
        "no qk-norm": facts("memory", mem_qk_norm=False),
        "in block 0 instead of 1": facts("memory", mem_layers=(0,)),
        "in both blocks": facts("memory", mem_layers=(0, 1)),
        "1 head of 64 slots": facts("memory", mem_heads=1, mem_topk=64, mem_key_dim=128),
        "2 heads of 32 slots": facts("memory", mem_heads=2, mem_topk=32, mem_key_dim=64),
        "8 heads of 8 slots": facts("memory", mem_heads=8, mem_topk=8, mem_key_dim=16),
        "keys of width 16": facts("memory", mem_key_dim=16, n_ffn=240),
        "keys of width 64": facts("memory", mem_key_dim=64, n_ffn=48),
        "values' rate 5e-3": facts("memory", mem_learning_rate=5e-3),
        "values' rate 1e-2": facts("memory", mem_learning_rate=1e-2),
        "values' rate 4e-2": facts("memory", mem_learning_rate=4e-2),
        "values' rate on a cosine": facts("memory", mem_decay=1.0),
        "the same, falling from four times": facts("memory", mem_learning_rate=5e-3, mem_decay=4.0),
    }),
    "constant rates": Part("more", "a constant rate for the network, too", range(1, 3), {
        f"{system}, {name}": facts(system, **given)
        for system in ("memory", "moe", "dense", "dense2x")
        for name, given in (("cosine", {}), ("constant", dict(min_lr=2.5e-3)))
    }, compared=False),
    "layers": Part("more", "a network of four blocks", range(1, 6), {
        **{f"{n} layers": facts("memory", n_layer=4, mem_count=n) for n in (1, 2, 3)},
        "dense": facts("memory", n_layer=4, mem_count=0),
    }),
    "new people": Part("more", "learning 100 people, and forgetting 2,000", range(1, 6), {
        "all weights, AdamW 2.5e-3, RowAdam 2e-2 (as in training)": finetune("new"),
        "all weights, AdamW 3e-4, RowAdam 2e-2": finetune("new", learning_rate=3e-4),
        "all weights, AdamW 1e-4, RowAdam 5e-3": finetune(
            "new", learning_rate=1e-4, mem_learning_rate=5e-3),
        "all rows, RowAdam 1e-2": update("new", slots=0, optimizer="rowadam", learning_rate=1e-2),
        "all rows, SGD": update("new", slots=0),
        **{f"{slots:,} slots": update("new", slots=slots)
           for slots in (64, 256, 1024, 4096, 16384, 32768, 65536)},
        "16,384 slots, chosen by reads": update("new", slots=16384, choose_by="reads"),
    }),
    "moved people": Part("more", "unlearning 200 facts, and forgetting 11,800", range(1, 6), {
        "all weights, AdamW 3e-4, RowAdam 2e-2": finetune("moved", learning_rate=3e-4),
        "all rows, SGD": update("moved", slots=0),
        **{f"{slots:,} slots": update("moved", slots=slots) for slots in (256, 1024, 4096, 16384)},
    }),
    "large": Part("gpu", "Memory+ against dense, with 25 times the facts", range(1, 2), {
        "Memory+": large("memory", mem_keys=512),
        "dense": large("dense"),
        "dense, twice the FLOPs a token": large("dense2x", n_ffn=1912),
    }),
    "large slots": Part("gpu", "and with more slots", range(1, 2), {
        "262,144 slots": large("memory", mem_keys=512),
        "16,384 slots": large("memory", mem_keys=128, n_ffn=776),
        "65,536 slots": large("memory", mem_keys=256, n_ffn=744),
        "1,048,576 slots": large("memory", mem_keys=1024, n_ffn=576),
    }),
}  # fmt: skip


# --- runs -----------------------------------------------------------------------------


def make_dataset(count):
    """The facts of so many people, made anew if prepare.py has changed since. data/facts is the
    user's, and is not replaced."""
    folder = OUT.parent / f"facts{count}"
    if count == 2000:
        folder = find_folder("facts")
    wanted = []
    for name, values, held_out in make_people(count, np.random.default_rng(0)):
        wanted += [f"{name} {held_out[a]} {value}" for a, value in values.items()]
    if (folder / "meta.json").exists():
        lines = (folder / "recall.jsonl").read_text().splitlines()
        questions = [json.loads(line) for line in lines]
        if wanted == [f"{question['prompt']} {question['answer']}" for question in questions]:
            return
        if count == 2000:
            way_out = "make it anew with python data/facts/prepare.py --overwrite"
            raise ValueError(f"{folder} has other people than prepare.py makes: {way_out}")
    start("data/facts/prepare.py", f"--people={count}", f"--out={folder}", "--overwrite")


def make_base(seed):
    """The trained model that updates of this seed change, and the facts that they teach it."""
    folder = ROOT / base_folder(seed)
    path = folder / "ckpt.pt"
    if not path.exists() or read_checkpoint(path)["iter"] < BASE.options()["max_iters"]:
        start(*BASE.command(seed).split()[1:], f"--out_dir={folder}", "--overwrite")
    for kind in ("new", "moved"):
        folder = OUT.parent / f"facts-{kind}"
        if not (folder / "meta.json").exists():
            start("data/facts/prepare.py", f"--{kind}=100", f"--out={folder}")


def start(*command):
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def run(experiment, seed, identity, gpu=False):
    """Train in a process that Ctrl-C does not reach, and add a line to the results."""
    command = experiment.command(seed)
    folder = OUT / f"{experiment.settings()}-{seed}"
    arguments = [sys.executable, *command.split()[1:], f"--out_dir={folder}", "--overwrite"]
    options = dict(cwd=ROOT, capture_output=True, text=True, start_new_session=True)
    if gpu:
        arguments.append("--device=cuda")
    else:
        arguments.append("--device=cpu")
        options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(arguments, **options)
    if done.returncode != 0:
        reasons = done.stderr.strip().splitlines() or ["without a message"]
        raise ValueError(f"{command} ended with {done.returncode}: {reasons[-1]}")
    result = {"command": command, **read_log(folder / "log.jsonl")}
    result["seconds"] = round(time.monotonic() - began)  # of the whole process
    if isinstance(experiment, Update):
        seconds = re.search(r"in ([\d,]+) s of", done.stdout)[1]
        result["update_seconds"] = float(seconds.replace(",", ""))
        result["bytes"] = bytes_to_keep(folder)
    result.update(identity, settings=experiment.settings())
    append_to_file(RESULTS, json.dumps(result) + "\n")
    shutil.rmtree(folder)


def read_log(path):
    log = [json.loads(line) for line in path.read_text().splitlines()]
    evaluations = [line for line in log if "val_loss" in line]
    result = {}
    curve = [[line["iter"]] for line in evaluations]
    for name in ("recall", "val_loss", "mem_used", "old_recall", "old_val_loss"):
        if name in evaluations[-1]:
            result[name] = evaluations[-1][name]
            for point, line in zip(curve, evaluations, strict=True):
                point.append(round(line[name], 4))
    speeds = [line["tokens_per_s"] for line in log if "tokens_per_s" in line]
    return {**result, "tokens_per_s": round(statistics.median(speeds)), "curve": curve}


def bytes_to_keep(folder):
    """Of an update's delta, or of all weights."""
    delta = folder / "delta.pt"
    if delta.exists():
        return delta.stat().st_size
    return sum(x.nbytes for x in read_checkpoint(folder / "ckpt.pt")["model"].values())


def this_machine(gpu):
    """What speeds and last digits depend on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if gpu:
        name = torch.cuda.get_device_name()
    elif info.exists():
        names = re.findall("^model name.*?: (.*)", info.read_text(), re.MULTILINE)
        name = [*names, name][0]
    return {"machine": name, "torch": torch.__version__}


def commit():
    """Of this repository, if there is one. "-changed": so is a file that this script does not
    write."""
    if shutil.which("git") is None:
        return ""
    name = git("rev-parse", "--short", "HEAD")
    if git("status", "--porcelain", "-uno", ".", ":!assets", ":!bench/results.jsonl"):
        name += "-changed"
    return name


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def run_all(jobs, identity, gpu):
    """jobs: {command: (experiment, seed)}"""
    pool = ThreadPoolExecutor(at_a_time(gpu))
    futures = [pool.submit(run, *job, identity, gpu) for job in jobs.values()]
    try:
        for future in tqdm(as_completed(futures), total=len(jobs), unit="run", disable=not jobs):
            future.result()
    except KeyboardInterrupt:
        print("stopping: the runs at work end first, which takes minutes", file=sys.stderr)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def at_a_time(gpu):
    if gpu:
        return 1
    return 2


# --- tables ---------------------------------------------------------------------------


def table(name, results):
    """A part in Markdown: means and standard errors over seeds. results: {command: line}"""
    part = PARTS[name]
    rows = []
    first = {}  # lines of the first row
    for label, experiment in part.rows.items():
        lines = {seed: results.get(experiment.command(seed)) for seed in part.seeds}
        lines = {seed: line for seed, line in lines.items() if line is not None}
        row = {"": label}
        if isinstance(experiment, Update):
            row.update(update_row(lines))
        else:
            row.update(training_row(part, experiment, lines, first))
        if not rows:
            first = lines
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, ["---"] * len(columns)]
    for row in rows:
        cells.append([row.get(column, "") for column in columns])
    return "\n".join([f"{name}: {part.question}", "", *(f"| {' | '.join(c)} |" for c in cells)])


def training_row(part, training, lines, first):
    """lines, first: {seed: line}, of this row and of the first one, unless this is that."""
    if not lines:
        return {"recall, % (each seed)": "not measured"}
    row = {}
    name = next(iter(part.rows))
    pairs = [(first[seed], line) for seed, line in lines.items() if seed in first]
    recalls = [100 * line["recall"] for line in lines.values() if "recall" in line]
    if recalls:
        row["recall, % (each seed)"] = with_seeds(recalls)
    if recalls and part.compared:
        below = [100 * best["recall"] - 100 * line["recall"] for best, line in pairs]
        row[f"points below {name}"] = with_error(below, ".1f")
    elif not recalls:
        above = [line["val_loss"] - best["val_loss"] for best, line in pairs]
        row[f"nats above {name}"] = with_error(above, ".3f")
    losses = [line["val_loss"] for line in lines.values()]
    row["validation loss, nats"] = with_error(losses, ".3f")
    parameters, flops = training.size()
    if part.bits:
        bits = training.people() * BITS * statistics.mean(recalls) / 100
        row["bits known (a parameter)"] = f"{bits:,.0f} ({bits / parameters / 1e6:.2f})"
    speed = statistics.median(line["tokens_per_s"] for line in lines.values())
    row["MFLOPs a token"] = f"{flops:.3f}"
    row["parameters"] = f"{parameters:.2f}M"
    row["tokens a second"] = f"{speed:,.0f}"
    return row


def update_row(lines):
    """A point of a curve: step, recall and loss of the new, share of slots read, recall and loss of
    the old."""
    if not lines:
        return {"new facts known, %": "not measured"}
    curves = [line["curve"] for line in lines.values()]
    lost_at_90 = [lost_at(curve, 0.9) for curve in curves]
    lost = [100 * (curve[0][-2] - curve[-1][-2]) for curve in curves]
    worse = [curve[-1][-1] - curve[0][-1] for curve in curves]
    seconds = statistics.median(line["update_seconds"] for line in lines.values())
    row = {
        "new facts known, %": with_seeds([100 * curve[-1][1] for curve in curves]),
        "old ones lost, points": with_error(lost, ".1f"),
        "lost at 90% of the new": "",
        "old text, nats worse": with_error(worse, ".3f"),
        "seconds": f"{seconds:.0f}",
        "MB": f"{next(iter(lines.values()))['bytes'] / 1e6:.2f}",
    }
    if None not in lost_at_90:
        row["lost at 90% of the new"] = with_error([100 * x for x in lost_at_90], ".1f")
    return row


def lost_at(curve, share):
    """Recall of old facts lost when that share of the new ones is known, between two evaluations.
    None: they are never known."""
    for before, after in itertools.pairwise(curve):
        if after[1] >= share:
            progress = (share - before[1]) / (after[1] - before[1])
            return curve[0][-2] - before[-2] + (before[-2] - after[-2]) * progress
    return None


def with_seeds(numbers):
    return f"{with_error(numbers, '.1f')} ({', '.join(f'{x:.0f}' for x in numbers)})"


def with_error(numbers, form):
    """Mean and its standard error."""
    if len(numbers) < 2:
        return "".join(format(x, form) for x in numbers)
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return f"{statistics.mean(numbers):{form}} ± {error:{form}}"


# --- command line ---------------------------------------------------------------------


def read_lines():
    if not RESULTS.exists():
        return []
    with explain_errors(f"{RESULTS} has a damaged line", "remove it"):
        return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def select_results(lines, same):
    """{command: line} of lines that are like same, with the options that their commands have now."""
    runs = {}
    for part in PARTS.values():
        runs.update(part.runs())
    results = {}
    for line in lines:
        command = line["command"]
        alike = all(line[key] == value for key, value in same.items())
        if alike and command in runs and line["settings"] == runs[command][0].settings():
            results[command] = line
    return results


def print_plan(name, missing, lines, gpu):
    """missing: runs of a part, {command: (experiment, seed)}"""
    part = PARTS[name]
    took = {line["command"].rpartition(" ")[0]: line["seconds"] for line in lines}
    seconds = 0
    for command, (experiment, _) in missing.items():
        guess = experiment.options().get("max_iters", TrainConfig.max_iters) / 14
        seconds += took.get(command.rpartition(" ")[0], guess)
    minutes = seconds / at_a_time(gpu) / 60
    to_do = f"{len(missing):3} of {len(part.runs()):3} runs to do, {minutes:3.0f} min"
    print(f"{name:9} {to_do}: {part.question}")


def parse_arguments(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="only say what would be trained, and how long it takes")
    add("--only", choices=PARTS, action="append", metavar="PART", help="can be given again")
    add("--tier", choices=("cpu", "more", "gpu"), default="cpu", help="parts to train")
    add("--any", action="store_true", help="runs of other machines and versions count as done")
    args = parser.parse_args(argv)
    args.parts = args.only or [name for name, part in PARTS.items() if part.tier == args.tier]
    tiers = {PARTS[name].tier for name in args.parts}
    args.gpu = tiers == {"gpu"}
    if "gpu" in tiers and not args.gpu:
        parser.error("--only: parts for a GPU and parts for a CPU are two calls")
    if args.gpu and not args.list and not torch.cuda.is_available():
        parser.error("this is for a GPU, and PyTorch finds none")
    return args


def main(argv):
    args = parse_arguments(argv)
    machine = this_machine(args.gpu and torch.cuda.is_available())
    same = machine
    if args.any:
        same = {}
    lines = read_lines()
    done = select_results(lines, same)
    jobs = {}
    for name in args.parts:
        runs = PARTS[name].runs()
        missing = {c: job for c, job in runs.items() if c not in done and c not in jobs}
        jobs.update(missing)  # parts share runs
        if args.list:
            print_plan(name, missing, lines, args.gpu)
    if args.list:
        return

    OUT.mkdir(parents=True, exist_ok=True)
    lock_folder(OUT)
    trainings = [x for x, _ in jobs.values() if isinstance(x, Training)]
    for count in sorted({training.people() for training in trainings} - {0}):
        make_dataset(count)
    for seed in sorted({seed for x, seed in jobs.values() if isinstance(x, Update)}):
        make_base(seed)
    run_all(jobs, {**machine, "nanomem": commit()}, args.gpu)
    results = select_results(read_lines(), same)
    print(f"{', '.join(same.values()) or 'any machine'}; mean ± standard error over seeds")
    for name in args.parts:
        print(f"\n{table(name, results)}")
    subprocess.run([sys.executable, ROOT / "bench" / "draw.py"], check=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError, KeyboardInterrupt) as error:
        fail(error)
