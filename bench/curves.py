"""Draw loss and recall of runs, against tokens and against seconds, as one SVG.

    python bench/curves.py out/facts-memory out/facts-dense
    python bench/curves.py out/compare-mine --out=out/mine.svg     all runs in that folder

The numbers are those of log.jsonl (its fields: README.md): the points are evaluations. Seconds are
training time, without evaluations. Losses compare only if the runs have the same data.
"""

import json
import math
import os
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shapes import BLUE, GREEN, GRID, INK, ORANGE, SOFT, VIOLET, line, rings, save, text
from runtime.arguments import Parser, path_argument
from runtime.files import explain_errors, fail, ignore_stream_errors

COLORS = (ORANGE, BLUE, GREEN, VIOLET, INK, "#b8860b", "#c2185b")
AXES = {"tokens": "tokens", "seconds": "seconds of training"}
MEASURES = {
    "val_loss": "validation loss, nats",
    "recall": "recall",
    "old_val_loss": "validation loss on old data, nats",
    "old_recall": "recall of old facts",
}
WIDTH = 300  # of a panel
HEIGHT = 220
LEFT = 78  # room for the numbers of an axis
ROW = HEIGHT + 84
TOP = 46


def read_log(folder):
    """Return the lines of a run's log that hold an evaluation."""
    path = Path(folder, "log.jsonl")
    if not path.exists():
        raise FileNotFoundError(f"no {path}; give the folder of a run")
    points = []
    with explain_errors(f"{path} is damaged", "remove its last line"):
        for row in path.read_text(encoding="utf-8").splitlines():
            point = json.loads(row)
            if "val_loss" in point:
                points.append(point)
    if not points:
        raise ValueError(f"{path} has no evaluation yet")
    for name in AXES:
        if any(name not in point for point in points):
            raise ValueError(f"{path} has no {name}: an earlier version wrote it")
    return points


def draw_curves(groups, path):
    """groups: {name: [log of each seed, from read_log]}. Thin: a seed; thick: their mean."""
    measures = {}
    for name, title in MEASURES.items():
        if any(name in point for logs in groups.values() for log in logs for point in log):
            measures[name] = title
    parts = []
    for row, (measure, title) in enumerate(measures.items()):
        for column, (axis, words) in enumerate(AXES.items()):
            corner = (LEFT + column * (WIDTH + LEFT), TOP + row * ROW)
            parts += draw_panel(groups, axis, words, measure, title, corner)
    y = TOP + len(measures) * ROW - 8
    for number, name in enumerate(groups):
        color = COLORS[number % len(COLORS)]
        parts.append(line([(LEFT, y - 5), (LEFT + 24, y - 5)], color, 3))
        parts.append(text(LEFT + 32, y, name, 14, anchor="start"))
        y += 24
    save(path, 2 * (WIDTH + LEFT) + 30, y, parts)


def draw_panel(groups, axis, words, measure, title, corner):
    """A chart of one measure against one axis, with its upper left corner at a point."""
    curves = {}  # {name: [points (x, y) of each seed]}
    for name, logs in groups.items():
        curves[name] = []
        for log in logs:
            curves[name].append([(p[axis], p[measure]) for p in log if measure in p])
    points = [point for several in curves.values() for curve in several for point in curve]
    xs = ticks(0, max(x for x, _ in points))
    ys = ticks(min(y for _, y in points), max(y for _, y in points))
    if "recall" in measure:
        ys = [0, 0.2, 0.4, 0.6, 0.8, 1]

    place = scale(xs, ys, corner)
    parts = [
        text(corner[0] + WIDTH / 2, corner[1] - 16, title, 14, font_weight="bold"),
        text(corner[0] + WIDTH / 2, corner[1] + HEIGHT + 40, words, 14),
    ]
    for y in ys:
        left = place(xs[0], y)
        parts.append(line([left, place(xs[-1], y)], GRID, 1))
        number = f"{y:.6g}"
        if "recall" in measure:
            number = f"{y:.0%}"
        parts.append(text(left[0] - 8, left[1] + 5, number, 12, SOFT, "end"))
    for x in xs:
        bottom = place(x, ys[0])
        parts.append(text(bottom[0], bottom[1] + 18, short(x), 12, SOFT))
    for number, several in enumerate(curves.values()):
        parts += draw_seeds(several, place, COLORS[number % len(COLORS)])
    return parts


def scale(xs, ys, corner):
    """Return the function that places a point in a panel. xs, ys: its ticks"""

    def place(x, y):
        across = (x - xs[0]) / (xs[-1] - xs[0])
        up = (y - ys[0]) / (ys[-1] - ys[0])
        return round(corner[0] + WIDTH * across, 1), round(corner[1] + HEIGHT * (1 - up), 1)

    return place


def draw_seeds(several, place, color):
    """Thin curves of the seeds, if there are several, and a thick one of their mean."""
    parts = []
    if len(several) > 1:
        for curve in several:
            thin = [place(x, y) for x, y in curve]
            parts.append(line(thin, color, 1, stroke_opacity=0.35))
    middle = [place(x, y) for x, y in mean_curve(several)]
    return [*parts, line(middle, color, 2.5), *rings(middle, 3, color)]


def mean_curve(several):
    """The mean over seeds of both coordinates, up to the end of the shortest curve."""
    points = []
    for seeds in zip(*several, strict=False):
        points.append((mean(x for x, _ in seeds), mean(y for _, y in seeds)))
    return points


def ticks(low, high, count=5):
    """About `count` round numbers that enclose low and high."""
    width = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(width / count))
    for factor in (1, 2, 5, 10):
        if width / (step * factor) <= count:
            step *= factor
            break
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [i * step for i in range(first, last + 1)]


def short(number):
    """1500000 -> 1.5M"""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def find_runs(names):
    """Folders of runs, or of several runs -> folders of runs"""
    runs = []
    for name in names:
        folder = Path(name)
        if not folder.is_dir():
            way_out = "give the folder of a run, or of several runs"
            raise ValueError(f"{name} is not a folder; {way_out}")
        several = sorted(log.parent for log in folder.rglob("log.jsonl"))
        if several and not (folder / "log.jsonl").exists():
            runs += several
        else:
            runs.append(folder)
    return list(dict.fromkeys(runs))


def main(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", type=os.path.expanduser, nargs="+", help="folders of runs, or of several runs")
    picture = "picture (default: %(default)s)"
    add("--out", type=path_argument, default="out/curves.svg", help=picture)
    args = parser.parse_args(argv)
    if args.out.suffix != ".svg":
        parser.error(f"--out={args.out}: the picture is an SVG, so its name must end in .svg")
    try:
        groups = {str(folder): [read_log(folder)] for folder in find_runs(args.runs)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(groups, args.out)
    except (Exception, KeyboardInterrupt) as error:
        fail(error)
    for name, (log,) in groups.items():
        last = log[-1]
        numbers = f"validation loss {last['val_loss']:.3f}"
        if "recall" in last:
            numbers += f", recall {last['recall']:.1%}"
        print(f"{name}: {numbers} after {last['tokens']:,} tokens, {last['seconds']:,.0f} s")
    if any(len(log) == 1 for (log,) in groups.values()):
        print("A run with one evaluation is one point; a lower --eval_interval gives a curve.")
    print(f"written to {args.out}")


if __name__ == "__main__":
    ignore_stream_errors()
    main(sys.argv[1:])
