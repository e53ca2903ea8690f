"""Train several systems on your own text at equal FLOPs, and print a table.

    python bench/compare.py --dataset=data/mine --systems=dense,memory,moe --seeds=3
    python bench/compare.py --dataset=data/mine --base=gpt2-small --device=cuda
    ... --max_iters=300 --eval_interval=100     any option of train.py, for all systems

A system is a preset of the family --base (presets.py). Runs, table.md and curves.svg go into
--out_dir. Ctrl-C saves the runs; the same command continues. More --seeds or --systems add runs;
all other options must stay. On a CPU, two runs train at a time, a thread each.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.curves import draw_curves, read_log
from bench.reproduce import with_error
from data.dataset import Dataset, find_folder, open_dataset
from model import GPT, GPTConfig
from presets import PRESETS
from runtime.arguments import Parser, dataset_argument, path_argument
from runtime.bars import Bar
from runtime.checkpoint import read_checkpoint
from runtime.distributed import handle_stop
from runtime.files import explain_errors, fail, ignore_stream_errors, lock_folder, write_file
from runtime.options import make_configs, parse_command_line
from runtime.progress import note_on_warmup
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
OWN = ("preset", "out_dir", "seed", "resume", "overwrite", "dataset", "init_from", "background")
COLUMNS = ("system", "validation loss, nats", "parameters", "MFLOPs a token")
COLUMNS += ("tokens a second", "seconds")
FREE = ("out_dir", "dataset", "resume", "overwrite", "device", "timeout")
FREE += ("vocab_size", "separator")
FAMILIES = tuple(dict.fromkeys(name.rpartition("-")[0] for name in PRESETS))
SYSTEMS = tuple(dict.fromkeys(name.rpartition("-")[2] for name in PRESETS))
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 2 to 10 seeds


class Run:
    """A run to train. folder: where; words: of the command line"""

    def __init__(self, args, system, seed):
        self.system = system
        self.folder = Path(args.out_dir, f"{system}-{seed}")
        preset = f"{args.base}-{system}"
        options = {**PRESETS[preset], "dataset": args.dataset, "seed": seed, **args.given}
        self.words = [f"--preset={preset}", f"--dataset={args.dataset}", f"--seed={seed}"]
        self.words += [f"--{name}={option_text(value)}" for name, value in args.given.items()]
        self.config, self.model_config = make_configs(options, TrainConfig, GPTConfig)
        self.note = note_on_warmup(self.config)
        self.process = None

    def steps(self):
        """Steps done, as the log says."""
        log = self.folder / "log.jsonl"
        if not log.exists():
            return 0
        lines = log.read_text(encoding="utf-8").splitlines()
        for line in reversed(lines):
            if line.endswith("}"):
                return json.loads(line)["iter"]
        return 0

    def is_complete(self):
        path = self.folder / "ckpt.pt"
        return path.exists() and read_checkpoint(path)["iter"] >= self.config.max_iters

    def check(self, fingerprint):
        """Raises ValueError if the folder has a run with other options or data."""
        if not (self.folder / "ckpt.pt").exists():
            return
        way_out = f"remove {self.folder.parent}, or give another --out_dir"
        checkpoint = read_checkpoint(self.folder)
        if checkpoint["fingerprint"] != fingerprint:
            was = f"{self.folder} was trained on other data"
            raise ValueError(f"--dataset={self.config.dataset}: {was}; {way_out}")
        saved = {**checkpoint["model_config"], **checkpoint["train_config"]}
        with explain_errors(f"{self.folder} has no options that fit", way_out):
            train_config, model_config = make_configs(saved, TrainConfig, GPTConfig)
        saved = {**asdict(model_config), **asdict(train_config)}
        wanted = {**asdict(self.model_config), **asdict(self.config)}
        changed = [n for n, x in wanted.items() if n not in FREE and saved[n] != x]
        if changed:
            asked = ", ".join(f"--{name}={option_text(wanted[name])}" for name in changed)
            has = ", ".join(f"--{name}={option_text(saved[name])}" for name in changed)
            raise ValueError(f"{asked}: the run in {self.folder} has {has}; {way_out}")

    def start(self, environment):
        words = [*self.words, "--overwrite"]
        if (self.folder / "ckpt.pt").exists():
            words = ["--resume"]
        command = [sys.executable, ROOT / "train.py", *words, f"--out_dir={self.folder}"]
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(f"{self.folder}.txt", "ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environment
            )


def option_text(value):
    """As on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


# --- training -------------------------------------------------------------------------


def train_all(runs, on_gpu):
    """Train the runs that are not complete, and show the steps of all."""
    at_a_time = 1
    environment = dict(os.environ)
    if not on_gpu:
        at_a_time = 2
        environment["OMP_NUM_THREADS"] = "1"
    waiting = [run for run in runs if not run.is_complete()]
    working = []
    if not waiting:
        return
    total = sum(run.config.max_iters for run in runs)
    steps = f"{len(waiting)} of {len(runs)} runs to train, {total:,} steps in all"
    print(f"{steps}, {at_a_time} at a time, in {runs[0].folder.parent}", file=sys.stderr)
    for note in {run.note for run in runs} - {""}:
        print(note, file=sys.stderr)
    done = sum(run.steps() for run in runs)
    bar = Bar(initial=done, total=total, unit="step")
    try:
        while waiting or working:
            while waiting and len(working) < at_a_time:
                run = waiting.pop(0)
                run.start(environment)
                working.append(run)
            time.sleep(1)
            for run in list(working):
                if run.process.poll() is not None:
                    working.remove(run)
                    check_end(run)
            bar.set_postfix_str(", ".join(run.folder.name for run in working), refresh=False)
            bar.update(sum(run.steps() for run in runs) - bar.n)
    finally:
        for run in working:
            run.process.send_signal(signal.SIGTERM)  # it saves
        for run in working:
            run.process.wait()
        bar.close()


def check_end(run):
    if run.process.returncode != 0:
        lines = Path(f"{run.folder}.txt").read_text(errors="replace").strip().splitlines()
        reason = "".join(lines[-1:])
        raise ValueError(f"{run.folder} ended with {run.process.returncode}. {reason}")


# --- the table ------------------------------------------------------------------------


def table(runs, logs, vocab_size):
    """Markdown, with means and standard errors over seeds. logs: {system: [log of each seed]}"""
    columns = list(COLUMNS)
    has_recall = "recall" in next(iter(logs.values()))[0][-1]
    if has_recall:
        columns.insert(2, "recall, %")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for system, several in logs.items():
        model_config = next(run.model_config for run in runs if run.system == system)
        parameters, flops = size(model_config, vocab_size)
        ends = [log[-1] for log in several]
        speed = statistics.median(end["tokens_per_s"] for end in ends)
        cells = [
            system,
            with_error([end["val_loss"] for end in ends], ".3f"),
            f"{parameters / 1e6:.2f}M",
            f"{flops / 1e6:.3f}",
            f"{speed:,.0f}",
            f"{statistics.median(end['seconds'] for end in ends):,.0f}",
        ]
        if has_recall:
            cells.insert(2, with_error([100 * end["recall"] for end in ends], ".1f"))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def size(model_config, vocab_size):
    """Parameters, and forward FLOPs per token."""
    options = {**vars(model_config), "vocab_size": vocab_size}
    with torch.device("meta"):
        model = GPT(GPTConfig(**options), initialize=False)
    flops = model.flops_per_token(model_config.block_size)
    return sum(model.parameter_counts().values()), sum(flops.values())


def verdicts(logs):
    """Sentences: how far each system's loss is above the lowest one, paired by seed."""
    means = {system: mean_loss(several) for system, several in logs.items()}
    best = min(means, key=means.get)
    seeds = len(logs[best])
    intervals = f"(95% intervals from {seeds} seeds)"
    sentences = [f"{best} has the lowest loss. Above it, in nats {intervals}:"]
    for system in sorted(means, key=means.get)[1:]:
        pairs = zip(logs[system], logs[best], strict=True)
        differences = [a[-1]["val_loss"] - b[-1]["val_loss"] for a, b in pairs]
        sentences.append(f"  {system:10} {difference(differences)}")
    sentences.append("More seeds narrow the intervals: a larger --seeds adds to these runs.")
    return "\n".join(sentences)


def mean_loss(logs):
    return statistics.mean(log[-1]["val_loss"] for log in logs)


def difference(numbers):
    """One number for each seed -> "+0.019 (-0.011 to +0.049): within the error" """
    middle = statistics.mean(numbers)
    if len(numbers) < 2:
        return f"{middle:+.3f} (one seed: its error is unknown)"
    error = statistics.stdev(numbers) / len(numbers) ** 0.5
    error *= T95[min(len(numbers), 10) - 2]
    text = f"{middle:+.3f} ({middle - error:+.3f} to {middle + error:+.3f})"
    if abs(middle) <= error:
        text += ": within the error, so they cannot be told apart"
    return text


# --- command line ---------------------------------------------------------------------


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    dataset = "a folder in data/, or a path to one"
    add("--dataset", type=dataset_argument, required=True, help=dataset)
    systems = f"of {', '.join(SYSTEMS)} (default: %(default)s)"
    add("--systems", default="dense,memory,moe", help=systems)
    add("--base", default="shakespeare", choices=FAMILIES, help="default: %(default)s")
    add("--seeds", type=int, default=3, help="runs of each system (default: %(default)s)")
    add("--out_dir", type=path_argument, help="folder to write to (default: out/compare-DATASET)")
    args, rest = parser.parse_known_args(argv)
    args.given = parse_command_line(rest, __doc__, (TrainConfig, GPTConfig))
    args.systems = list(dict.fromkeys(args.systems.split(",")))
    for system in args.systems:
        if f"{args.base}-{system}" not in PRESETS:
            parser.error(f"--systems: {system} is none of {', '.join(SYSTEMS)}")
    for name in OWN:
        if name in args.given:
            parser.error(f"--{name}: compare.py sets it; to start anew, remove --out_dir")
    if args.seeds < 1:
        parser.error(f"--seeds={args.seeds}: must be at least 1")
    if args.out_dir is None:
        args.out_dir = Path("out", f"compare-{Path(args.dataset).name}")
    if "max_iters" in args.given and "eval_interval" not in args.given:
        args.given["eval_interval"] = max(1, args.given["max_iters"] // 5)  # points of a curve
    return args


def compare(args):
    systems = args.systems
    runs = [Run(args, system, seed) for seed in range(1, args.seeds + 1) for system in systems]
    folder = find_folder(args.dataset)
    data = open_dataset(folder, runs[0].model_config.block_size, seed=1)  # checks it
    for run in runs:
        run.check(data["fingerprint"])
    vocab_size = Dataset(folder).vocab_size
    args.out_dir.mkdir(parents=True, exist_ok=True)
    lock_folder(args.out_dir)
    on_gpu = args.given.get("device", "auto") != "cpu" and torch.cuda.is_available()
    train_all(runs, on_gpu)
    logs = {name: [read_log(r.folder) for r in runs if r.system == name] for name in systems}
    text = f"{table(runs, logs, vocab_size)}\n\n"
    text += f"Mean ± standard error of {args.seeds} seeds. "
    text += f"Each run read {logs[systems[0]][0][-1]['tokens']:,} tokens.\n"
    if len(systems) > 1:
        text += verdicts(logs) + "\n"
    write_file(args.out_dir / "table.md", text)
    draw_curves(logs, args.out_dir / "curves.svg")
    print(f"{text}\nwritten to {args.out_dir}: table.md, curves.svg, and the runs")


def main(argv):
    args = parse(argv)
    handle_stop(signal.default_int_handler)
    try:
        compare(args)
    except KeyboardInterrupt:
        print("\nstopped: the same command continues", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        fail(error)


if __name__ == "__main__":
    ignore_stream_errors()
    main(sys.argv[1:])
