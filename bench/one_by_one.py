"""Teach a model new people one after another, with an update for each, and measure what it keeps.

    python bench/one_by_one.py --init_from=out/large --slots=1024 --max_iters=20

Each update continues the one before it (edit/update.py --delta). A line of log.jsonl has the
people taught so far (iter), the recall of all their facts, and the recall of old facts.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import open_dataset, people_of
from data.facts import prepare
from edit.delta import apply_deltas
from model import GPT
from runtime.arguments import Parser, folder_argument, path_argument
from runtime.bars import Bar
from runtime.checkpoint import check_unoccupied, clear_run, read_checkpoint
from runtime.device import choose_device
from runtime.files import append_to_file, fail, lock_folder
from train import recall

ROOT = Path(__file__).resolve().parents[1]


def make_datasets(args, folder):
    """A dataset for each new person. Returns their folders."""
    known = people_of(read_checkpoint(args.init_from / "ckpt.pt")["meta"])
    if known is None:
        raise ValueError(f"--init_from={args.init_from}: this model has not learned data/facts")
    folders = []
    for number in range(args.people):
        out = folder / f"person-{number + 1}"
        options = prepare.parse([*known.split(), f"--new={args.people}", f"--out={out}"])
        generator = np.random.default_rng(options.seed)
        people = prepare.choose_people(options, generator)
        prepare.write(options, [people[number]], generator)
        folders.append(out)
    return folders


def update(args, dataset, out, earlier, seed):
    """Run edit/update.py. earlier: folder of the update to continue, or None. Returns the first
    and the last line of its log."""
    command = [sys.executable, ROOT / "edit" / "update.py", f"--init_from={args.init_from}"]
    command += [f"--dataset={dataset}", f"--out_dir={out}", f"--device={args.device}"]
    for name in ("slots", "max_iters", "rehearse"):
        command.append(f"--{name}={getattr(args, name)}")
    command += [f"--eval_interval={args.max_iters}", f"--seed={seed}"]
    if earlier is not None:
        command.append(f"--delta={earlier}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reasons = done.stderr.strip().splitlines() or ["without a message"]
        raise ValueError(f"{dataset} could not be taught: {reasons[-1]}")
    lines = (out / "log.jsonl").read_text().splitlines()
    return json.loads(lines[0]), json.loads(lines[-1])


def ask(args, datasets, deltas):
    """Recall of the facts of some people, with deltas applied."""
    path = args.init_from / "ckpt.pt"
    model = GPT.from_checkpoint(path, choose_device(args.device))
    apply_deltas(model, path, deltas)
    questions = []
    for dataset in datasets:
        data = open_dataset(dataset, model.config.block_size, seed=1)
        questions += data["questions"]
    return recall(model, questions, data["separator"])


def teach_all(args, folder):
    """Write the log, and datasets and updates to a folder. Returns the last update's folder and
    the seconds of all."""
    datasets = make_datasets(args, folder)
    seconds = 0
    earlier = None
    for number in Bar(range(1, args.people + 1), "one by one", unit="person"):
        dataset = datasets[number - 1]
        out = folder / f"update-{number}"
        seed = args.seed * args.people + number  # each rehearses other old sequences
        before, after = update(args, dataset, out, earlier, seed)
        if number == 1:
            write_line(args, 0, ask(args, datasets, []), before)
        write_line(args, number, ask(args, datasets[:number], [out]), after)
        seconds += after["seconds"]
        earlier = out
    return out, seconds


def write_line(args, number, known, evaluation):
    """evaluation: line of the log of an update, whose losses and old recall are kept."""
    line = {"iter": number, "recall": known}
    for name in ("val_loss", "old_recall", "old_val_loss", "tokens_per_s"):
        if name in evaluation:
            line[name] = evaluation[name]
    append_to_file(args.out_dir / "log.jsonl", json.dumps(line) + "\n")


def summarize(args, seconds):
    lines = (args.out_dir / "log.jsonl").read_text().splitlines()
    first, *_, last = [json.loads(line) for line in lines]
    print(f"\n{args.people} people, one after another, in {seconds:.0f} s of updating")
    print(f"  recall       {last['recall']:.1%} of the facts of all of them")
    print(f"  old recall   {last['old_recall']:.1%}, {first['old_recall']:.1%} before")
    print(f"  old loss     {last['old_val_loss']:.3f}, {first['old_val_loss']:.3f} before")
    print(f"  written to   {args.out_dir}/delta.pt, log.jsonl")


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--init_from", type=path_argument, required=True, help="folder of the run to update")
    add("--people", type=int, default=10, help="people to teach (default: %(default)s)")
    add("--slots", type=int, default=1024, help="slots per person (default: %(default)s)")
    add("--max_iters", type=int, default=20, help="steps per person (default: %(default)s)")
    rehearse = "old sequences in each step, beside 8 new ones (default: %(default)s)"
    add("--rehearse", type=int, default=0, help=rehearse)
    add("--seed", type=int, default=1, help="seed of the data order (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, mps (default: the fastest available)")
    out = "folder to write to (default: %(default)s)"
    add("--out_dir", type=folder_argument, default=Path("out/one-by-one"), help=out)
    add("--overwrite", action="store_true", help="replace the run in that folder")
    args = parser.parse_args(argv)
    if args.people < 1:
        parser.error(f"--people={args.people}: must be at least 1")
    return args


def main(argv):
    args = parse(argv)
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        lock_folder(args.out_dir)
        check_unoccupied(args.out_dir, "delta.pt", args.overwrite)
        clear_run(args.out_dir)
        with tempfile.TemporaryDirectory(dir=args.out_dir) as folder:
            last, seconds = teach_all(args, Path(folder))
            os.replace(last / "delta.pt", args.out_dir / "delta.pt")
        summarize(args, seconds)
    except (Exception, KeyboardInterrupt) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
