"""The README's comparison on two CPU cores: both models at several learning rates and seeds, and ablations.

    python bench/compare.py                 train what out/compare lacks, and write assets/results.json
    python bench/compare.py --only=main     the main table alone

Two runs at a time, each `python train.py --preset=... --out_dir=out/compare/...` on one thread.
"""

import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.optimizers import VARIANTS
from data.dataset import find_folder

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "compare"
RESULTS = ROOT / "assets" / "results.json"
SEEDS = (1, 2, 3)
RATES = (4e-3, 6e-3, 8e-3, 1.2e-2)

# group -> {name: (preset, options)}; every name is trained with each seed of the group
GROUPS = {
    "main": {
        f"{preset} {rate:g}": (preset, {"learning_rate": rate})
        for rate in RATES for preset in ("facts-memory", "facts-dense")
    },
    # a dense model takes 1.5 times as many steps in the seconds of a memory model: see speed()
    "same seconds": {"facts-dense, 2,700 steps": ("facts-dense", {"max_iters": 2700})},
    "slots": {f"N={N}": ("facts-memory", {"mem_keys": N}) for N in (16, 32, 64, 256)},
    "variants": {
        "three layers, one pool": ("facts-memory", {"mem_count": 3}),
        "without qk-norm": ("facts-memory", {"mem_qk_norm": False}),
        "without gate and output matrix": ("facts-memory", {"mem_gate": False}),
        "plain PKM: without any of these": ("facts-pkm", {}),
    },
    "pool optimisers": {name: ("facts-memory", {"variant": name}) for name in VARIANTS},
}
MORE_SEEDS = {"dense": (4, 5, 6), "lazy": (4, 5, 6), "row-wise": (4, 5)}  # of the pool optimisers


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def train(script, *arguments):
    command = [sys.executable, ROOT / script, *arguments, "--overwrite", "--device=cpu"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: {done.stderr[-2000:]}")


def run(job):
    """Train one model unless that was done before. Returns its results."""
    group, name, preset, options, seed = job
    folder = OUT / f"{name} seed {seed}".replace(" ", "_").replace(",", "").replace(":", "")
    arguments = [f"--{key}={value}" for key, value in {"preset": preset, "seed": seed, **options}.items()]
    script = "bench/optimizers.py" if "variant" in options else "train.py"
    if not (folder / "done").exists():
        train(script, *arguments, f"--out_dir={folder}")
        (folder / "done").touch()
    evaluations = [line for line in read_log(folder) if "recall" in line]
    last = evaluations[-1]
    return {
        "group": group, "name": name, "seed": seed, "command": f"python {script} {' '.join(arguments)}",
        "recall": last["recall"], "val_loss": last["val_loss"], "used": last.get("mem_used"),
        "curve": [[line["iter"], line["recall"]] for line in evaluations],
    }  # fmt: skip


def speed(repeats=5):
    """Print training tokens/s of both models on one thread, in turns: both meet the same disturbances."""
    rates = {"facts-memory": [], "facts-dense": []}
    for _ in range(repeats):
        for preset, measured in rates.items():
            folder, options = OUT / f"speed_{preset}", ["--max_iters=100", "--eval_iters=1"]
            train("train.py", f"--preset={preset}", *options, f"--out_dir={folder}")
            measured.append(statistics.median(line["tokens_per_s"] for line in read_log(folder)))
    for preset, measured in rates.items():
        low, median, high = min(measured), statistics.median(measured), max(measured)
        print(f"{preset}: {median:,.0f} tokens/s on one thread ({low:,.0f} to {high:,.0f})")
    ratios = sorted(memory / dense for memory, dense in zip(*rates.values(), strict=True))
    print(f"memory / dense: {ratios[repeats // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def table(results, group):
    """A group's results as lines of Markdown."""
    lines = ["| model | recall: mean (each seed) | validation loss |", "|---|---|---|"]
    for name in dict.fromkeys(r["name"] for r in results if r["group"] == group):
        rows = [r for r in results if r["group"] == group and r["name"] == name]
        recalls = ", ".join(f"{100 * r['recall']:.0f}" for r in rows)
        mean = {key: statistics.mean(r[key] for r in rows) for key in ("recall", "val_loss")}
        lines.append(f"| {name} | **{100 * mean['recall']:.0f}%** ({recalls}) | {mean['val_loss']:.3f} |")
    return lines


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    groups = [*GROUPS, "speed"]
    parser.add_argument("--only", choices=groups, action="append", help="one group of runs (default: all)")
    args = parser.parse_args()
    if "speed" in (args.only or ["speed"]):
        speed()
    jobs = [
        (group, name, preset, options, seed)
        for group in GROUPS
        if group in (args.only or GROUPS)
        for name, (preset, options) in GROUPS[group].items()
        for seed in SEEDS + MORE_SEEDS.get(name, ())
    ]
    find_folder("facts")  # made once, before two runs would make it at the same time
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(tqdm(pool.map(run, jobs), total=len(jobs), unit="run"))
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    old, new = ({(r["group"], r["name"], r["seed"]): r for r in part} for part in (old, results))
    results = [r for key, r in old.items() if r["group"] in GROUPS and key not in new] + results
    results.sort(key=lambda r: list(GROUPS).index(r["group"]))  # stable
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(r) for r in results) + "\n]\n")
    for group in GROUPS:
        print(f"\n{group}", *table(results, group), sep="\n")


if __name__ == "__main__":
    main()
