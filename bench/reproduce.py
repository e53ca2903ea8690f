"""Train the experiments of the READMEs that are missing, print tables, and draw the pictures.

    python bench/reproduce.py --list               the parts, their questions and times
    python bench/reproduce.py --only=headline      one part
    python bench/reproduce.py                      the parts of the tier cpu: 10 hours
    python bench/reproduce.py --tier=more          the others: a day
    python bench/reproduce.py --tier=gpu           a larger one on one GPU

bench/experiments.py defines the parts. Each finished run adds a line to bench/results.jsonl. A run
is not repeated if a line has the same options, data, machine and PyTorch (--any: any machine and
PyTorch), so the same command continues after an interruption. Ctrl-C waits for the current runs
and keeps them. On a CPU, two runs train at a time, with one thread each.
"""

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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.experiments import BASE, PARTS, base_folder
from data.dataset import find_folder
from data.facts.prepare import BITS, make_people
from runtime.arguments import Parser
from runtime.bars import Bar
from runtime.checkpoint import read_checkpoint
from runtime.files import append_to_file, explain_errors, fail, lock_folder

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "reproduce"
RESULTS = ROOT / "bench" / "results.jsonl"
MADE = {"out/docs": "bench/docs.py", "out/facts-apart": "bench/apart.py"}  # datasets and programs


# --- runs -----------------------------------------------------------------------------


def make_dataset(count):
    """Make the facts of `count` people, again if prepare.py has changed since. data/facts belongs
    to the user and is not replaced."""
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


def make_text(name):
    """Make a dataset of MADE if it is missing."""
    if name in MADE and not (ROOT / name / "meta.json").exists():
        start(MADE[name])


def make_updates():
    """Make the facts that updates teach."""
    for kind in ("new", "moved"):
        folder = OUT.parent / f"facts-{kind}"
        if not (folder / "meta.json").exists():
            start("data/facts/prepare.py", f"--{kind}=100", f"--out={folder}")


def make_base(seed, gpu):
    """Train the model that the updates of this seed change."""
    folder = ROOT / base_folder(seed)
    path = folder / "ckpt.pt"
    if not path.exists() or read_checkpoint(path)["iter"] < BASE.options["max_iters"]:
        train(BASE.command.format(seed=seed), folder, gpu)


def start(*command):
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def train(command, folder, gpu):
    """Run a command in a process that Ctrl-C does not reach. Returns what it has printed."""
    arguments = [sys.executable, *command.split()[1:], f"--out_dir={folder}", "--overwrite"]
    options = dict(cwd=ROOT, capture_output=True, text=True, start_new_session=True)
    if gpu:
        arguments.append("--device=cuda")
    else:
        arguments.append("--device=cpu")
        options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, **options)
    if done.returncode != 0:
        reasons = done.stderr.strip().splitlines() or ["without a message"]
        raise ValueError(f"{command} ended with {done.returncode}: {reasons[-1]}")
    return done.stdout


def run(experiment, seed, identity, gpu=False):
    """Train, and add a line to the results."""
    command = experiment.command.format(seed=seed)
    folder = OUT / f"{experiment.settings()}-{seed}"
    began = time.monotonic()
    printed = train(command, folder, gpu)
    result = {"command": command, **read_log(folder / "log.jsonl")}
    result["seconds"] = round(time.monotonic() - began)  # of the whole process
    if experiment.is_update():
        seconds = re.search(r"in ([\d,]+) s of", printed)[1]
        result["update_seconds"] = float(seconds.replace(",", ""))
        result["bytes"] = bytes_to_keep(folder)
    else:
        result.update(rows_never_read(folder))
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
    """Bytes of an update's delta, or of all weights."""
    delta = folder / "delta.pt"
    if delta.exists():
        return delta.stat().st_size
    return sum(x.nbytes for x in read_checkpoint(folder, tensors=True)["model"].values())


def rows_never_read(folder):
    """{"never_read": the share of the rows of all tables that have never had a gradient}"""
    checkpoint = read_checkpoint(folder, tensors=True)
    never = 0
    rows = 0
    for state in checkpoint["optimizers"][1:]:
        squares = state["state"][0]["squares"]
        never += (squares == 0).all(1).sum().item()
        rows += len(squares)
    if rows == 0:
        return {}
    return {"never_read": round(never / rows, 4)}


def this_machine(gpu):
    """Machine and PyTorch: speeds and last digits depend on them."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if gpu:
        name = torch.cuda.get_device_name()
    elif info.exists():
        found = re.search("^model name.*?: (.*)", info.read_text(), re.MULTILINE)
        if found is not None:
            name = found[1]
    return {"machine": name, "torch": torch.__version__}


def commit():
    """Commit of this repository; "-changed" if a file differs that this script does not write."""
    if shutil.which("git") is None:
        return ""
    name = git("rev-parse", "--short", "HEAD")
    if git("status", "--porcelain", "-uno", ".", ":!assets", ":!bench/results.jsonl"):
        name += "-changed"
    return name


def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def run_all(function, jobs, gpu, unit):
    """Call the function with each tuple of arguments, several at a time."""
    pool = ThreadPoolExecutor(runs_at_a_time(gpu))
    futures = [pool.submit(function, *arguments) for arguments in jobs]
    try:
        for future in Bar(as_completed(futures), total=len(jobs), unit=unit, disable=not jobs):
            future.result()
    except KeyboardInterrupt:
        print("stopping: the runs at work end first, which takes minutes", file=sys.stderr)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def runs_at_a_time(gpu):
    if gpu:
        return 1
    return 2


# --- tables ---------------------------------------------------------------------------


def table(name, results):
    """Format a part in Markdown, with means and standard errors over seeds. results: {command:
    line}"""
    part = PARTS[name]
    lines = {}  # {label: {seed: line}}
    for label, experiment in part.rows.items():
        commands = {seed: experiment.command.format(seed=seed) for seed in part.seeds}
        lines[label] = {seed: results[c] for seed, c in commands.items() if c in results}
    if part.by_rate:
        rows = rows_by_rate(lines)
    else:
        rows = rows_by_label(part, lines)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, ["---"] * len(columns)]
    for row in rows:
        cells.append([row.get(column, "") for column in columns])
    return "\n".join([f"{name}: {part.question}", "", *(f"| {' | '.join(c)} |" for c in cells)])


def rows_by_label(part, lines):
    first = next(iter(lines.values()))
    rows = []
    for label, experiment in part.rows.items():
        if experiment.is_one_by_one():
            row = one_by_one_row(lines[label])
        elif experiment.is_update():
            row = update_row(lines[label])
        elif rows:
            row = training_row(part, experiment, lines[label], first)
        else:
            row = training_row(part, experiment, lines[label], {})
        rows.append({"": label, **row})
    return rows


def rows_by_rate(lines):
    """A row for each system and a column for each rate, from labels "SYSTEM, RATE". A cell is the
    recall in percent, the validation loss of a text, or empty: not measured."""
    rows = {}
    for label, of_seeds in lines.items():
        system, number = label.rsplit(", ", 1)
        rate = f"rate {number}"
        row = rows.setdefault(system, {"": system})
        row[rate] = ""
        recalls = [100 * line["recall"] for line in of_seeds.values() if "recall" in line]
        losses = [line["val_loss"] for line in of_seeds.values()]
        if recalls:
            row[rate] = with_seeds(recalls)
        elif losses:
            row[rate] = with_error(losses, ".3f")
    return list(rows.values())


def training_row(part, training, lines, first):
    """lines: {seed: line} of this row. first: of the first row, empty for that row itself"""
    if not lines and not training.people():
        return {"validation loss, nats": "not measured"}
    if not lines:
        return {"recall, % (each seed)": "not measured"}
    row = {}
    first_label = next(iter(part.rows))
    pairs = [(first[seed], line) for seed, line in lines.items() if seed in first]
    recalls = [100 * line["recall"] for line in lines.values() if "recall" in line]
    if recalls:
        row["recall, % (each seed)"] = with_seeds(recalls)
    if recalls and part.compared:
        below = [100 * best["recall"] - 100 * line["recall"] for best, line in pairs]
        row[f"points below {first_label}"] = with_error(below, ".1f")
    elif not recalls:
        above = [line["val_loss"] - best["val_loss"] for best, line in pairs]
        row[f"nats above {first_label}"] = with_error(above, ".3f")
    losses = [line["val_loss"] for line in lines.values()]
    row["validation loss, nats"] = with_error(losses, ".3f")
    parameters, flops = training.size()
    if part.bits:
        bits = training.people() * BITS * statistics.mean(recalls) / 100
        row["bits known (a parameter)"] = f"{bits:,.0f} ({bits / parameters / 1e6:.2f})"
    speed = max(line["tokens_per_s"] for line in lines.values())  # other programs only slow a run
    row["MFLOPs a token"] = f"{flops:.3f}"
    row["parameters"] = f"{parameters:.2f}M"
    row["tokens a second"] = f"{speed:,.0f}"
    if part.reads:
        row["bytes of values a token reads"] = f"{training.bytes_read():,}"
        never = [line["never_read"] for line in lines.values() if "never_read" in line]
        if never:
            row["rows never read, %"] = f"{100 * statistics.mean(never):.1f}"
    return row


def update_row(lines):
    """lines: {seed: line}. A point of a curve: step, new recall, ..., old recall, old loss."""
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


def one_by_one_row(lines):
    """lines: {seed: line}. A point of a curve: people taught so far, recall of their facts, ...,
    old recall, old loss."""
    if not lines:
        return {"new facts known after one person, %": "not measured"}
    curves = [line["curve"] for line in lines.values()]
    count = curves[0][-1][0]
    row = {}
    for number, people in ((1, "one person"), (count, f"{count} people")):
        known = [100 * curve[number][1] for curve in curves]
        lost = [100 * (curve[0][-2] - curve[number][-2]) for curve in curves]
        row[f"new facts known after {people}, %"] = with_seeds(known)
        row[f"old ones lost after {people}, points"] = with_error(lost, ".1f")
    worse = [curve[-1][-1] - curve[0][-1] for curve in curves]
    row["old text, nats worse"] = with_error(worse, ".3f")
    row["MB"] = f"{next(iter(lines.values()))['bytes'] / 1e6:.2f}"
    return row


def lost_at(curve, share):
    """Recall of old facts lost when a share of the new ones is known, interpolated between
    evaluations; None if this share is not reached."""
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
    """{command: line} of lines that agree with `same` and have today's options of the command."""
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
        guess = experiment.options.get("max_iters", 1000) / 14
        seconds += took.get(command.rpartition(" ")[0], guess)
    minutes = seconds / runs_at_a_time(gpu) / 60
    to_do = f"{len(missing):3} of {len(part.runs()):3} runs to do, {minutes:3.0f} min"
    print(f"{name:14} {to_do}: {part.question}")


def parse_arguments(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--list", action="store_true", help="only list the runs to do, and their time")
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
    for count in sorted({experiment.people() for experiment, _ in jobs.values()} - {0}):
        make_dataset(count)
    for name in sorted({experiment.options["dataset"] for experiment, _ in jobs.values()}):
        make_text(name)
    seeds = {seed for experiment, seed in jobs.values() if experiment.is_update()}
    if seeds:
        make_updates()
    run_all(make_base, [(seed, args.gpu) for seed in sorted(seeds)], args.gpu, "base model")
    cpu = torch.backends.cpu.get_cpu_capability()  # CPUs of one name can round differently
    identity = {**machine, "cpu": cpu, "nanomem": commit()}
    run_all(run, [(*job, identity, args.gpu) for job in jobs.values()], args.gpu, "run")
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
