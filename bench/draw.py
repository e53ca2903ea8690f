"""Draw the pictures of measurements in assets/, as plain SVG:

    results.svg      recall while training and at the end      from results.jsonl
    more_slots.svg   recall against the number of slots        from results.jsonl
    updates.svg      old facts against new facts               from results.jsonl
    slots.svg        the slots that questions read             from slots.json

The other pictures in assets/ are drawn by hand."""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.experiments import PARTS
from bench.reproduce import select_results
from bench.shapes import (
    BLUE,
    FAINT,
    GREEN,
    GRID,
    INK,
    ORANGE,
    SOFT,
    VIOLET,
    box,
    label,
    line,
    rings,
    save,
    spot,
    tag,
    text,
    upward_text,
)
from runtime.arguments import Parser

BENCH = Path(__file__).resolve().parent
ASSETS = BENCH.parent / "assets"


# --- results.svg: recall while training, and at the end -------------------------------

LOOKS = [  # options of the runs, color, name, note; the curve's name, and where it stands
    ("facts-memory", ORANGE, "Memory+", "", "Memory+", (2.35, 0.84, "end")),
    ("facts-moe --max_iters=4300", GREEN, "mixture of experts", "same time",
     "mixture of experts", (5.0, 1.03, "end")),
    ("facts-dense --max_iters=5000", VIOLET, "dense", "same time",
     "dense, same time", (5.05, 0.36, "end")),
    ("facts-dense2x", INK, "dense", "twice the FLOPs",
     "2x FLOPs", (3.08, 0.485, "start")),
    ("facts-dense", BLUE, "dense", "", "dense", (3.08, 0.235, "start")),
]  # fmt: skip


def read_results():
    lines = (BENCH / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def training_curves(part):
    """{options: [[(step, recall), ...] of each seed]} of the runs of a part, on the machine of the
    first line."""
    runs = PARTS[part].runs()
    lines = read_results()
    same = {"machine": lines[0]["machine"]}
    curves = {}
    for command, result in select_results(lines, same).items():
        _, _, words = command.partition("--preset=")
        options, _, _ = words.rpartition(" --seed=")
        if command in runs:
            curve = [(step, recall) for step, recall, *_ in result["curve"]]
            curves.setdefault(options, []).append(curve)
    return curves


def draw_results():
    curves = training_curves("headline")
    last = max(step for look in LOOKS for curve in curves[look[0]] for step, _ in curve)
    parts = [
        text(231, 34, "while training", 16, font_weight="bold"),
        text(231, 56, "thin: a seed; thick: their mean", 14, SOFT),
        text(231, 392, "training steps, in thousands", 14),
        upward_text(22, 210, "recall of 12,000 facts", 14),
        text(630, 34, "at the end", 16, font_weight="bold"),
        text(630, 56, "circle: a seed; bar: mean ± standard error", 14, SOFT),
        text(700, 392, "recall of 12,000 facts", 14),
    ]
    for percent in range(0, 101, 20):
        _, y = chart_point(0, percent / 100)
        parts.append(line([(76, y), (386, y)], GRID, 1))
        parts.append(text(68, y + 5, f"{percent}%", 14, SOFT, "end"))
        x = row_x(percent / 100)
        parts.append(line([(x, 74), (x, 348)], GRID, 1))
        parts.append(text(x, 368, f"{percent}%", 14, SOFT))
    for step in range(0, last + 1, 1000):
        x, _ = chart_point(step / last, 0)
        parts.append(text(x, 368, f"{step / 1000:g}", 14, SOFT))
    for options, color, *_ in LOOKS:
        for curve in curves[options]:
            parts.append(recall_line(curve, last, color, 1, stroke_opacity=0.35))
    for row, look in enumerate(LOOKS):
        parts += draw_mean(look, curves[look[0]], last)
        parts += draw_row(look, [curve[-1][1] for curve in curves[look[0]]], 96 + 55 * row)
    save(ASSETS / "results.svg", 822, 410, parts)


def chart_point(share, recall):
    """share: of the width of the chart on the left."""
    return round(76 + 310 * share, 1), round(342 - 264 * recall, 1)


def row_x(recall):
    """In the rows on the right."""
    return round(604 + 192 * recall, 1)


def recall_line(curve, last, color, width, **more):
    points = [chart_point(step / last, recall) for step, recall in curve]
    return line(points, color, width, **more)


def draw_mean(look, seeds, last):
    _, color, _, _, name, (thousands, recall, anchor) = look
    steps = [step for step, _ in seeds[0]]
    average = [mean(recall for _, recall in points) for points in zip(*seeds, strict=True)]
    x, y = chart_point(1000 * thousands / last, recall)
    return [
        recall_line(zip(steps, average, strict=True), last, color, 3.2),
        label(x, y + 5, name, color, anchor),
    ]


def draw_row(look, recalls, y):
    _, color, name, note, *_ = look
    average = mean(recalls)
    error = stdev(recalls) / len(recalls) ** 0.5
    x = row_x(average)
    number = f"{100 * average:.0f} ± {100 * error:.0f}%"
    if note:
        number = f"{note}: {number}"
    return [
        text(590, y - 3, name, 14, color, "end", font_weight="bold"),
        text(590, y + 15, number, 14, color, "end"),
        line([(row_x(average - error), y), (row_x(average + error), y)], color, 3.2),
        line([(x, y - 17), (x, y + 17)], color, 3.2),
        *rings([(row_x(recall), y) for recall in recalls], 4.5, color),
    ]


# --- more_slots.svg: recall against the number of slots -------------------------------

SLOTS = {  # options of the runs of each number of slots at equal FLOPs, and their parameters
    256: ("facts-memory --mem_keys=16 --n_ffn=384", "0.32M"),
    1024: ("facts-memory --mem_keys=32 --n_ffn=352", "0.37M"),
    4096: ("facts-memory --mem_keys=64 --n_ffn=288", "0.57M"),
    16384: ("facts-memory", "1.35M"),
    36864: ("facts-memory --mem_keys=192 --n_ffn=32", "2.66M"),
}
MORE_FLOPS = ("facts-memory --mem_keys=192", "7% more FLOPs")  # 36,864 slots, SwiGLU as with 16,384
LINES = [  # and the x of the label
    ("facts-dense2x", INK, "dense, twice the FLOPs", 106),
    ("facts-dense", BLUE, "dense", 560),
]


def draw_more_slots():
    curves = training_curves("slots")
    others = training_curves("headline")
    parts = [
        text(46, 360, "slots", 14),
        text(46, 380, "parameters", 14, SOFT),
        upward_text(22, 180, "recall of 12,000 facts", 14),
    ]
    for percent in range(0, 101, 20):
        _, y = slots_point(0, percent / 100)
        parts.append(line([(100, y), (690, y)], GRID, 1))
        parts.append(text(92, y + 5, f"{percent}%", 14, SOFT, "end"))
    for options, color, name, x in LINES:
        average = mean(curve[-1][1] for curve in others[options])
        _, y = slots_point(0, average)
        parts.append(line([(100, y), (690, y)], color, 2, stroke_dasharray="6 5"))
        parts.append(label(x, y - 7, name, color))
    means = []
    for column, (slots, (options, parameters)) in enumerate(SLOTS.items()):
        recalls = [curve[-1][1] for curve in curves[options]]
        means.append(slots_point(column, mean(recalls)))
        parts += recalls_in_column(column, recalls)
        x, _ = means[-1]
        parts.append(text(x, 360, f"{slots:,}", 14))
        parts.append(text(x, 380, parameters, 14, SOFT))
    parts.append(line(means, ORANGE, 3.2))
    x, y = means[3]
    parts.append(label(x - 16, y - 8, "Memory+", ORANGE, "end", font_weight="bold"))
    options, words = MORE_FLOPS
    recalls = [curve[-1][1] for curve in curves[options]]
    end = slots_point(4, mean(recalls))
    parts.append(line([means[3], end], ORANGE, 2, stroke_dasharray="2 4"))
    parts += recalls_in_column(4, recalls)
    parts.append(label(end[0] - 9, end[1] - 13, words, ORANGE, "end"))
    save(ASSETS / "more_slots.svg", 722, 400, parts)


def recalls_in_column(column, recalls):
    """A ring for each seed, and a bar for mean ± standard error."""
    average = mean(recalls)
    error = stdev(recalls) / len(recalls) ** 0.5
    ends = [slots_point(column, average - error), slots_point(column, average + error)]
    points = [slots_point(column, recall) for recall in recalls]
    return [line(ends, ORANGE, 3.2), *rings(points, 4.5, ORANGE)]


def slots_point(column, recall):
    return round(150 + 122 * column, 1), round(330 - 300 * recall, 1)


# --- slots.svg: what questions read in a table of N * N slots -------------------------


def draw_slots():
    """From slots.json."""
    file = json.loads((BENCH / "slots.json").read_text())
    person = file["reads"][0][0]
    one_person = [read for read in file["reads"] if read[0] == person]
    one_attribute = [read for read in file["reads"] if read[1] == "employer"]
    names = [attribute for _, attribute, _ in one_person]
    parts = draw_table(40, f"six facts of {person}", one_person, names, file["keys"])
    names = [name for name, _, _ in one_attribute]
    parts += draw_table(450, "the employers of six people", one_attribute, names, file["keys"])
    save(ASSETS / "slots.svg", 822, 500, parts)


def draw_table(x0, title, reads, names, keys):
    side = 340
    parts = [
        text(x0 + side / 2, 34, title, 15, font_weight="bold"),
        box(x0, 52, side, side),
        upward_text(x0 - 14, 52 + side / 2, "sub-key of half 1", 12, SOFT),
        text(x0 + side / 2, 72 + side, "sub-key of half 2", 12, SOFT),
    ]
    colors = [BLUE, ORANGE, GREEN, VIOLET, "#b8860b", "#c2185b"]
    for i, (_, _, slots) in enumerate(reads):
        for slot, share in slots:
            row, column = divmod(slot, keys)
            x = x0 + round((column + 0.5) * side / keys, 1)
            y = 52 + round((row + 0.5) * side / keys, 1)
            parts.append(spot(x, y, round(15 * share**0.5, 1), colors[i], 0.55))
        x = x0 + 10 + 168 * (i % 2)
        y = 96 + side + 20 * (i // 2)
        parts.append(spot(x, y, 5, colors[i], 0.7))
        parts.append(text(x + 10, y + 4, names[i], 12, anchor="start"))
    return parts


# --- updates.svg: old facts against new ones while a model learns 100 people ----------

UPDATES = [  # options, color, words in the legend or ""; words at the curve's end, and where
    ("", INK, "all weights, rates of training: falls to {}", "", ()),
    ("--learning_rate=0.0003", FAINT, "all weights, AdamW 3e-4: falls to {}", "", ()),
    ("--learning_rate=0.0001 --mem_learning_rate=0.005", VIOLET, "all weights, AdamW 1e-4", "", ()),
    ("--slots=0", GREEN, "all rows, SGD", "", ()),
    ("--slots=16384 --choose_by=reads", ORANGE, "slots chosen by reads", "16,384", (-30, 22)),
    ("--slots=65536", BLUE, "slots chosen by gradient", "65,536", (-34, -14)),
    ("--slots=16384", BLUE, "", "16,384", (-20, -16)),
    ("--slots=4096", BLUE, "", "4,096", (-18, -16)),
    ("--slots=1024", BLUE, "", "1,024", (-16, -14)),
]


def update_curves():
    """{options: [(recall of new facts, of old ones), ...]}, means over seeds."""
    runs = PARTS["new people"].runs()
    lines = read_results()
    same = {"machine": lines[0]["machine"]}
    seeds = {}
    for command, result in select_results(lines, same).items():
        if command in runs:
            _, _, words = command.partition("--dataset=out/facts-new")
            options, _, _ = words.rpartition(" --seed=")
            seeds.setdefault(options.strip(), []).append(result["curve"])
    curves = {}
    for options, several in seeds.items():
        curves[options] = []
        for points in zip(*several, strict=True):  # a point: step, new recall, ..., old one, loss
            new = mean(point[1] for point in points)
            old = mean(point[-2] for point in points)
            curves[options].append((new, old))
    return curves


def draw_updates():
    curves = update_curves()
    parts = [
        text(280, 382, "new facts known", 14),
        upward_text(22, 185, "old facts known", 14),
    ]
    for percent in range(90, 101, 2):
        _, y = update_point(0, percent / 100)
        parts.append(line([(80, y), (480, y)], GRID, 1))
        parts.append(text(72, y + 5, f"{percent}%", 14, SOFT, "end"))
    for percent in range(0, 101, 20):
        x, _ = update_point(percent / 100, 0)
        parts.append(text(x, 358, f"{percent}%", 14, SOFT))
    frame = tag("clipPath", box(80, 20, 410, 318), id="frame")
    drawn = []
    labels = []
    for options, color, _, words, shift in UPDATES:
        points = [update_point(new, old) for new, old in curves[options]]
        drawn += [line(points, color, 2), *rings(points, 3.5, color)]
        if words:
            x, y = points[-1]
            dx, dy = shift
            labels.append(label(x + dx, y + dy, words, color))
    parts += [frame, tag("g", "".join(drawn), clip_path="url(#frame)"), *labels]
    y = 60
    for options, color, words, _, _ in UPDATES:
        if words:
            _, old = curves[options][-1]  # for the curves that leave the chart
            parts.append(line([(500, y - 5), (522, y - 5)], color, 3))
            parts.append(text(530, y, words.format(f"{old:.0%}"), 14, anchor="start"))
            y += 28
    save(ASSETS / "updates.svg", 822, 400, parts)


def update_point(new, old):
    """Old recall is shown from 89 to 100%."""
    return round(80 + 400 * new, 1), round(338 - 318 * (old - 0.89) / 0.11, 1)


if __name__ == "__main__":
    Parser(__doc__).parse_args()
    draw_results()
    draw_more_slots()
    draw_slots()
    draw_updates()
