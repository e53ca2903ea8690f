"""The comparisons of the READMEs, measured again: trains what is missing, prints tables, draws the picture.

    python bench/reproduce.py --list               the parts: what they ask, and how long the rest takes
    python bench/reproduce.py --only=headline      one part
    python bench/reproduce.py                      headline, systems, slots, text: 3 hours on 2 CPU cores
    python bench/reproduce.py --tier=more          the others: a night
    python bench/reproduce.py --tier=gpu           a larger one on one GPU

A finished run is a line of assets/results.jsonl: its command, what came out, versions and machine. A run that
has a line with the same options, data, machine and PyTorch (--any: whatever machine and PyTorch) is not
repeated, so that the same command goes on after an interruption. Ctrl-C waits for the runs at work, and keeps
them. On a CPU a run takes one thread, and two are trained at a time.
"""

import concurrent.futures
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
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.checkpoint import read_checkpoint
from data.dataset import find_folder
from data.facts.prepare import BITS, make_people
from data.files import blame, lock, one_line, write_file
from data.presets import PRESETS
from model import GPT
from train import make_configs

ROOT = Path(__file__).resolve().parents[1]
OUT, RESULTS = ROOT / "out" / "reproduce", ROOT / "assets" / "results.jsonl"


def facts(system, **options):
    return f"facts-{system}", options


def people(system, count, **options):
    """Steps in which each fact is seen 98 times: three times those of the demo."""
    data = {} if count == 2000 else dict(dataset=f"out/facts{count}")
    return facts(system, **data, max_iters=21 * count // 4, eval_interval=3 * count // 4, **options)


BASE = facts("memory", mem_keys=512)  # what is updated; in the demo's table every slot is in use


def update(kind, **options):
    """Teach it 100 new people, or where 100 that it knows have moved to, in 200 steps."""
    length = dict(max_iters=200, eval_interval=50, warmup_iters=10)
    return BASE[0], BASE[1] | length | dict(
        init_from="out/base", dataset=f"out/facts-{kind}"
    ) | options


def sparse(slots, **options):
    return dict(update="memory", update_slots=slots, **options)


def large(system, **options):
    """The same on a GPU: 25 times the facts, 17 times the FLOPs."""
    data = dict(dataset="out/facts50000", batch_size=80, max_iters=10000, eval_interval=2500)
    model = dict(n_layer=4, n_head=8, n_embd=256, learning_rate=1.5e-3)
    model |= {"memory": dict(mem_keys=512), "dense": {}, "dense2x": dict(n_ffn=1912)}[system]
    return facts(system, **(data | model | options))


HEADLINE = {
    "Memory+": ("memory", {}),
    "dense": ("dense", {}),
    "dense, twice the FLOPs a token": ("dense2x", {}),
    "dense, as many seconds (6,000 steps)": ("dense", dict(max_iters=6000)),
}
# part: (tier, question, seeds, {row: (preset, options)}). The first row is what the others are compared with.
PARTS = {
    "headline": ("cpu", "Memory+ against dense, at equal FLOPs, at twice, in equal seconds", range(1, 9), {
        name: facts(system, **options) for name, (system, options) in HEADLINE.items()
    }),
    "systems": ("cpu", "all kinds of layers at equal FLOPs and parameters", range(1, 6), {
        "Memory+": facts("memory"),
        "product-key memory": facts("pkm"),
        "PEER": facts("peer"),
        "UltraMem": facts("ultramem"),
        "mixture of experts": facts("moe"),
        "dense": facts("dense"),
    }),
    "text": ("cpu", "tinyshakespeare", range(1, 6), {
        "Memory+": ("shakespeare-memory", {}),
        "dense": ("shakespeare-dense", {}),
        "mixture of experts": ("shakespeare-moe", {}),
    }),
    "rates": ("more", "the headline's models at a higher rate", range(1, 9), {
        f"{name}, {rate:g}": facts(system, learning_rate=rate, **options)
        for name, (system, options) in HEADLINE.items() for rate in (2.5e-3, 4e-3)
    }),
    "lower rates": ("more", "and at a lower one", range(1, 3), {
        f"{name}, {rate:g}": facts(system, learning_rate=rate, **options)
        for name, (system, options) in HEADLINE.items() for rate in (2.5e-3, 1.5e-3)
    }),
    "more rates": ("more", "the other systems at other learning rates", range(1, 3), {
        f"{system}, {rate:g}": facts(system, learning_rate=rate)
        for system in ("pkm", "peer", "ultramem", "moe") for rate in (4e-3, 2.5e-3, 1.5e-3)
    }),
    "slots": ("cpu", "more slots", range(1, 6), {
        "16,384 slots": facts("memory"),
        "256 slots": facts("memory", mem_keys=16, n_ffn=248),  # the SwiGLU has what the scores leave
        "1,024 slots": facts("memory", mem_keys=32, n_ffn=240),
        "4,096 slots": facts("memory", mem_keys=64, n_ffn=216),
        "65,536 slots": facts("memory", mem_keys=256, n_ffn=88),
    }),
    "seconds": ("more", "a mixture of experts, which is faster, for as many seconds", range(1, 9), {
        "Memory+": facts("memory"),
        "mixture of experts, as many seconds (5,000 steps)": facts("moe", max_iters=5000),
    }),
    "capacity": ("more", "more people, each fact 98 times", range(1, 4), {
        f"{system}, {count:,} people": people(system, count)
        for count in (1000, 2000, 4000, 8000) for system in ("memory", "moe", "dense")
    }),
    "capacity rates": ("more", "4,000 people, the dense model at other learning rates", range(1, 2), {
        f"dense, {rate:g}": people("dense", 4000, learning_rate=rate) for rate in (2.5e-3, 1.5e-3, 4e-3)
    }),
    "ablations": ("more", "what each part of Memory+ does; n_ffn keeps the FLOPs equal", range(1, 6), {
        "Memory+": facts("memory"),
        "no gate, no output matrix": facts("memory", mem_gate=False, n_ffn=216),
        "no qk-norm": facts("memory", mem_qk_norm=False),
        "in block 0 instead of 1": facts("memory", mem_layers=(0,)),
        "in both blocks": facts("memory", mem_layers=(0, 1)),
        "in both blocks, a pool for each": facts(
            "memory", mem_layers=(0, 1), mem_keys=90, mem_key_dim=40, variant="separate-pools"),
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
        "Adam on the whole table": facts("memory", variant="dense"),
    }),
    "constant rates": ("more", "a constant learning rate for the network, too", range(1, 3), {
        f"{system}, {name}": facts(system, **options)
        for system in ("memory", "moe", "dense", "dense2x")
        for name, options in (("cosine", {}), ("constant", dict(min_lr=2.5e-3)))
    }),
    "layers": ("more", "a network of four blocks", range(1, 6), {
        f"{count} layers" if count else "dense": facts("memory", n_layer=4, mem_count=count)
        for count in (1, 2, 3, 0)
    }),
    "new people": ("more", "learning 100 people, and forgetting 2,000", range(1, 6), {
        "all weights, AdamW 2.5e-3, RowAdam 2e-2 (as in training)": update("new"),
        "all weights, AdamW 3e-4, RowAdam 2e-2": update("new", learning_rate=3e-4),
        "all weights, AdamW 1e-4, RowAdam 5e-3": update("new", learning_rate=1e-4, mem_learning_rate=5e-3),
        "all weights, AdamW 1e-4, SGD for the values": update("new", learning_rate=1e-4, mem_sgd=1.0),
        "all rows, RowAdam 1e-2": update("new", **sparse(0, mem_sgd=0.0, mem_learning_rate=1e-2)),
        "all rows, SGD": update("new", **sparse(0)),
        **{f"{T:,} slots": update("new", **sparse(T)) for T in (64, 256, 1024, 4096, 16384, 32768, 65536)},
        "16,384 slots, chosen by reads": update("new", **sparse(16384, update_by="reads")),
    }),
    "moved people": ("more", "unlearning 200 facts, and forgetting 11,800", range(1, 6), {
        "all weights, AdamW 3e-4, RowAdam 2e-2": update("moved", learning_rate=3e-4),
        "all rows, SGD": update("moved", **sparse(0)),
        **{f"{T:,} slots": update("moved", **sparse(T)) for T in (256, 1024, 4096, 16384)},
    }),
    "large": ("gpu", "Memory+ against dense, with 25 times the facts", range(1, 2), {
        "Memory+": large("memory"),
        "dense": large("dense"),
        "dense, twice the FLOPs a token": large("dense2x"),
    }),
    "large slots": ("gpu", "and with more slots", range(1, 2), {
        "262,144 slots": large("memory"),
        "16,384 slots": large("memory", mem_keys=128, n_ffn=776),
        "65,536 slots": large("memory", mem_keys=256, n_ffn=744),
        "1,048,576 slots": large("memory", mem_keys=1024, n_ffn=576),
    }),
}  # fmt: skip


# --- runs -----------------------------------------------------------------------------------------------


def command_of(preset, options, seed):
    """What identifies a run. An option that the preset has anyway is left out."""
    if "init_from" in options:
        given = [f"--{k}={v}" for k, v in options.items() if k not in BASE[1] and k != "init_from"]
        return " ".join(
            ["python train.py", f"--init_from={base_of(seed)}", *given, f"--seed={seed}"]
        )
    text = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in options.items()}
    given = [f"--{k}={v}" for k, v in text.items() if PRESETS[preset].get(k) != v]
    script = "bench/variants.py" if "variant" in options else "train.py"
    return " ".join([f"python {script} --preset={preset}", *given, f"--seed={seed}"])


def base_of(seed):
    return f"out/base-{settings_of(*BASE)}-{seed}"


def this_machine(gpu):
    name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    if not gpu and (info := Path("/proc/cpuinfo")).exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(": ")[2] if names else name
    return {"machine": name, "torch": torch.__version__}


def count_people(options, preset):
    """2,000 in data/facts, 4,000 in out/facts4000; None: other data."""
    name, number = re.fullmatch(
        r"(.*?)(\d*)", options.get("dataset", PRESETS[preset]["dataset"])
    ).groups()
    return int(number or 2000) if name in ("facts", "out/facts") else None


def settings_of(preset, options):
    """A hash of all options and of some of the people: a line with another one is of another experiment."""
    known = count_people(options, preset) or "init_from" in options
    people = make_people(99, np.random.default_rng(0)) if known else []
    what = [PRESETS[preset] | options, people]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def all_settings():
    """{command: settings} of every run there is."""
    return {command_of(*row, seed): settings_of(*row)
            for part in PARTS.values() for seed in part[2] for row in part[3].values()}  # fmt: skip


def make_dataset(count):
    """The facts of that many people, as prepare.py now makes them. data/facts is the user's: not replaced."""
    folder = OUT.parent / f"facts{count}" if count != 2000 else find_folder("facts")
    people = make_people(count, np.random.default_rng(0))
    wanted = [
        f"{name} {held_out[a]} {values[a]}" for name, values, held_out in people for a in values
    ]
    if (folder / "meta.json").exists():
        questions = map(json.loads, (folder / "recall.jsonl").read_text().splitlines())
        if [f"{question['prompt']} {question['answer']}" for question in questions] == wanted:
            return
        if count == 2000:
            again = "python data/facts/prepare.py --overwrite"
            raise ValueError(
                f"data/facts has other people than prepare.py makes: make it anew with {again}"
            )
    prepare = ["data/facts/prepare.py", f"--people={count}", f"--out={folder}", "--overwrite"]
    subprocess.run([sys.executable, *prepare], cwd=ROOT, check=True)


def make_update(seed):
    """What updates of that seed need: a trained model, and the facts to learn."""
    folder, (preset, options) = ROOT / base_of(seed), BASE
    if not (folder / "ckpt.pt").exists() or read_checkpoint(folder / "ckpt.pt")["iter"] < 3500:
        command = command_of(preset, options, seed).split()[1:]
        subprocess.run(
            [sys.executable, *command, f"--out_dir={folder}", "--overwrite"], cwd=ROOT, check=True
        )
    for kind in ("new", "moved"):
        if not (OUT.parent / f"facts-{kind}" / "meta.json").exists():
            arguments = [f"--{kind}=100", f"--out={OUT.parent / f'facts-{kind}'}"]
            subprocess.run(
                [sys.executable, "data/facts/prepare.py", *arguments], cwd=ROOT, check=True
            )


def run(command, gpu, identity):
    """Train one model in a process that Ctrl-C does not reach. Returns its line of the results."""
    preset, *_, seed = command.split()[2:]  # --preset=facts-memory ... --seed=1
    name = "update" if "--init_from" in command else preset.removeprefix("--preset=")
    folder = OUT / f"{name}-{identity['settings']}-{seed[2:]}"  # not too long
    where = ["--device=cuda" if gpu else "--device=cpu", f"--out_dir={folder}", "--overwrite"]
    began, threads = time.monotonic(), {} if gpu else {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *command.split()[1:], *where]
    done = subprocess.run(arguments, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True,
        start_new_session=True)  # fmt: skip
    if done.returncode:
        reason = [*done.stderr.strip().splitlines(), "without a message"][-2:][0]
        raise ValueError(f"{command} ended with {done.returncode}: {reason}")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    points = [line for line in log if "val_loss" in line]
    names = "recall", "val_loss", "mem_used", "old_recall", "old_val_loss"
    result = {"command": command} | {name: points[-1][name] for name in names if name in points[-1]}
    result["tokens_per_s"] = round(
        statistics.median(x["tokens_per_s"] for x in log if "tokens_per_s" in x)
    )
    if name == "update":
        weights = read_checkpoint(folder / "ckpt.pt")["model"].values()
        delta = folder / "delta.pt"
        result["bytes"] = delta.stat().st_size if delta.exists() else sum(x.nbytes for x in weights)
        result["update_seconds"] = float(
            re.search(r"in ([\d,]+) s of", done.stdout)[1].replace(",", "")
        )
    result["seconds"] = round(time.monotonic() - began)  # of the whole process
    result["curve"] = [
        [p["iter"], *(round(p[name], 4) for name in names if name in p)] for p in points
    ]
    shutil.rmtree(folder)
    return result | identity


def commit():
    """Of this repository, if there is one; "-changed" if a file is, but for those that this script writes."""
    git = [
        ["git", "rev-parse", "--short", "HEAD"],
        ["git", "status", "--porcelain", "-uno", ".", ":!assets"],
    ]
    if shutil.which("git") is None:
        return ""
    name, changes = (
        subprocess.run(x, cwd=ROOT, capture_output=True, text=True).stdout.strip() for x in git
    )
    return name + "-changed" * bool(changes)


# --- tables ---------------------------------------------------------------------------------------------


def with_error(numbers, form):
    """Mean and its standard error."""
    numbers = [*numbers]
    if len(numbers) < 2:
        return "".join(format(x, form) for x in numbers)
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return f"{statistics.mean(numbers):{form}} ± {error:{form}}"


def size(preset, options):
    """Parameters and FLOPs a token, forward, both in millions."""
    pools = len(options["mem_layers"]) if options.get("variant") == "separate-pools" else 1
    options = BASE[1] if "init_from" in options else options
    options = PRESETS[preset] | {k: v for k, v in options.items() if k != "variant"}
    config = make_configs(options | {"vocab_size": 1712 if "facts" in preset else 256})[1]
    with torch.device("meta"):
        model = GPT(config, initialize=False)
    flops, counts = sum(model.flops_per_token(config.block_size).values()), model.parameter_counts()
    return (counts["dense"] + pools * counts["pool"]) / 1e6, flops / 1e6


def update_row(lines):
    """What updates taught, and what is forgotten. Curves: step, new recall, ..., old recall, old loss."""
    curves, row = [line["curve"] for line in lines.values()], {}
    new, last = (
        [100 * curve[-1][1] for curve in curves],
        [(curve[0], curve[-1]) for curve in curves],
    )
    row["new facts known, %"] = f"{with_error(new, '.1f')} ({', '.join(f'{x:.0f}' for x in new)})"
    row["old ones lost, points"] = with_error((100 * (a[-2] - b[-2]) for a, b in last), ".1f")
    at_90 = [lost_at(curve, 0.9) for curve in curves]
    row["lost at 90% of the new"] = (
        "" if None in at_90 else with_error((100 * x for x in at_90), ".1f")
    )
    row["old text, nats worse"] = with_error((b[-1] - a[-1] for a, b in last), ".3f")
    row["seconds"] = f"{statistics.median(line['update_seconds'] for line in lines.values()):.0f}"
    return row | {"MB": f"{next(iter(lines.values()))['bytes'] / 1e6:.2f}"}


def lost_at(curve, share):
    """Recall of old facts lost when that share of the new is known, between two evaluations; None: never."""
    for (_, new, *_, old, _), (_, next_new, *_, next_old, _) in itertools.pairwise(curve):
        if next_new >= share:
            return curve[0][-2] - old + (old - next_old) * (share - new) / (next_new - new)


def table(name, results):
    """A part in Markdown: means and their standard errors over seeds. results: {command: line}"""
    _, question, seeds, parts = PARTS[name]
    rows, first = {}, {}
    for label, (preset, options) in parts.items():
        lines = {seed: results.get(command_of(preset, options, seed)) for seed in seeds}
        lines = {seed: line for seed, line in lines.items() if line}
        first = first if rows else lines
        paired = {seed: first[seed] for seed in lines if seed in first and lines is not first}
        row = rows[label] = {"": label}
        if not lines:
            row["new facts known, %" if "init_from" in options else "recall, % (each seed)"] = (
                "not measured"
            )
            continue
        if "init_from" in options:
            row |= update_row(lines)
            continue
        if "recall" in next(iter(lines.values())):
            each = {seed: 100 * line["recall"] for seed, line in lines.items()}
            row["recall, % (each seed)"] = (
                f"{with_error(each.values(), '.1f')} ({', '.join(f'{x:.0f}' for x in each.values())})"
            )
            if not name.endswith(("rates", "capacity")):  # whose rows go in pairs
                below = (100 * line["recall"] - each[seed] for seed, line in paired.items())
                row[f"points below {next(iter(parts))}"] = with_error(below, ".1f")
        else:
            above = (lines[seed]["val_loss"] - line["val_loss"] for seed, line in paired.items())
            row[f"nats above {next(iter(parts))}"] = with_error(above, ".3f")
        row["validation loss, nats"] = with_error(
            (line["val_loss"] for line in lines.values()), ".3f"
        )
        parameters, flops = size(preset, options)
        if name == "capacity":
            bits = count_people(options, preset) * BITS * statistics.mean(each.values()) / 100
            row["bits known (a parameter)"] = f"{bits:,.0f} ({bits / parameters / 1e6:.2f})"
        speed = statistics.median(line["tokens_per_s"] for line in lines.values())
        row |= {"MFLOPs a token": f"{flops:.3f}", "parameters": f"{parameters:.2f}M"}
        row["tokens a second"] = f"{speed:,.0f}"
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [
        columns,
        ["---"] * len(columns),
        *([row.get(c, "") for c in columns] for row in rows.values()),
    ]
    return "\n".join([f"{name}: {question}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def results_of(lines, settings, same):
    """{command: line}, of lines with the options and data that their commands now have, and like same."""
    return {x["command"]: x for x in lines if x.get("settings") == settings.get(x["command"], "")
            and all(x[k] == same[k] for k in same)}  # fmt: skip


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--list",
        action="store_true",
        help="only say what would be trained, and how long that takes",
    )
    add(
        "--only",
        choices=list(PARTS),
        action="append",
        help="this part; can be given again",
        metavar="PART",
    )
    add(
        "--tier",
        choices=("cpu", "more", "gpu"),
        default="cpu",
        help="for two CPU cores; more of it; one GPU",
    )
    add("--any", action="store_true", help="runs of other machines and versions count as done")
    args = parser.parse_args()
    parts = args.only or [name for name in PARTS if PARTS[name][0] == args.tier]
    gpu = {PARTS[name][0] == "gpu" for name in parts}
    if len(gpu) > 1:
        parser.error("--only: parts for a GPU and parts for a CPU are two calls")
    gpu, found = gpu.pop(), torch.cuda.is_available()
    if gpu and not found and not args.list:
        parser.error("this is for a GPU, and PyTorch finds none")
    machine, version = this_machine(gpu and found), {"nanomem": commit()}
    with blame(
        f"{RESULTS} cannot be read", "a line for each run was expected: restore it from git"
    ):
        lines = (
            [json.loads(line) for line in RESULTS.read_text().splitlines()]
            if RESULTS.exists()
            else []
        )
    settings = all_settings()
    results = results_of(lines, settings, {} if args.any else machine)
    took = {x["command"].rpartition(" ")[0]: x["seconds"] for x in lines}

    jobs, at_a_time = [], 1 if gpu else 2
    for name in parts:
        _, question, seeds, rows = PARTS[name]
        commands = [command_of(*row, seed) for seed in seeds for row in rows.values()]
        missing = [c for c in commands if c not in results and c not in jobs]  # parts share runs
        steps = {c: int((re.findall(r"--max_iters=(\d+)", c) or [3500])[0]) for c in missing}
        seconds = sum(took.get(c.rpartition(" ")[0], steps[c] / 14) for c in missing) / at_a_time
        jobs += missing
        if args.list:
            to_do = f"{len(missing):3} of {len(commands):3} runs to do, {seconds / 60:3.0f} min"
            print(f"{name:9} {to_do}: {question}")
    if args.list:
        return

    OUT.mkdir(parents=True, exist_ok=True)
    lock(OUT)
    counts = {
        count_people(options, preset)
        for name in parts
        for preset, options in PARTS[name][3].values()
    }
    for count in sorted(counts - {None}):
        make_dataset(count)
    for seed in sorted(
        {command.rpartition("=")[2] for command in jobs if "--init_from" in command}
    ):
        make_update(seed)
    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        futures = [
            pool.submit(run, c, gpu, machine | version | {"settings": settings[c]}) for c in jobs
        ]

        def save():  # the file is written whole, whatever happens
            new = [
                f.result() for f in futures if f.done() and not f.cancelled() and not f.exception()
            ]
            write_file(RESULTS, "".join(json.dumps(x) + "\n" for x in lines + new))
            return results | {x["command"]: x for x in new}

        try:
            done = concurrent.futures.as_completed(futures)
            for future in tqdm(done, total=len(jobs), unit="run", disable=not jobs):
                future.result()
                save()
        except KeyboardInterrupt:
            print("stopping: the runs at work end first, which takes minutes", file=sys.stderr)
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            results = save()
    print(
        f"{'any machine' if args.any else ', '.join(machine.values())}; mean ± standard error over seeds"
    )
    for name in parts:
        print(f"\n{table(name, results)}")
    subprocess.run([sys.executable, ROOT / "assets" / "draw.py"], check=True)


if __name__ == "__main__":
    with one_line("reproduce.py", (OSError, ValueError)):
        main()
