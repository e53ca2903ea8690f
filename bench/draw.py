"""Draw the README's pictures of measurements, assets/{results,slots,updates}.svg: plain SVG, by
Python's standard library only. The other pictures in assets/ are drawn by hand."""

import argparse
import json
from html import escape
from pathlib import Path
from statistics import mean, stdev

BENCH = Path(__file__).resolve().parent
ASSETS = BENCH.parent / "assets"
INK = "#1f2933"
SOFT = "#5b6673"
FAINT = "#8a94a0"
GRID = "#d5dbe3"
BLUE = "#1f5fd0"
ORANGE = "#c2570a"
GREEN = "#2d7d46"
VIOLET = "#8e3fb0"


# --- shapes ---------------------------------------------------------------------------


def tag(name, content="", **attributes):
    """<name a-b="1">content</name> from tag(name, content, a_b=1)."""
    words = [name]
    for key, value in attributes.items():
        words.append(f'{key.replace("_", "-")}="{value}"')
    return f"<{' '.join(words)}>{content}</{name}>"


def text(x, y, words, size=14, color=INK, anchor="middle", **more):
    look = {"font_size": size, "fill": color, "text_anchor": anchor}
    return tag("text", escape(words), x=x, y=y, **look, **more)


def upward_text(x, y, words, size, color=INK):
    return text(x, y, words, size, color, transform=f"rotate(-90 {x} {y})")


def box(x, y, width, height, radius=0):
    look = {"rx": radius, "fill": "white", "stroke": GRID}
    return tag("rect", x=x, y=y, width=width, height=height, **look)


def line(points, color, width):
    path = " ".join(f"{x},{y}" for x, y in points)
    return tag("polyline", points=path, fill="none", stroke=color, stroke_width=width)


def spot(x, y, radius, color, opacity):
    return tag("circle", cx=x, cy=y, r=radius, fill=color, fill_opacity=opacity)


def rings(points, radius, color):
    look = {"r": radius, "fill": "white", "stroke": color, "stroke_width": 1.5}
    return [tag("circle", cx=x, cy=y, **look) for x, y in points]


def save(name, width, height, parts):
    """A white card with round corners: dark ink on it reads well on light and dark pages."""
    card = box(0.5, 0.5, width - 1, height - 1, radius=10)
    drawing = "\n".join([arrowheads(), card, *parts])
    view = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}"}
    size = {"width": width, "height": height}
    page = tag("svg", drawing, **view, **size, font_family="Helvetica, Arial, sans-serif")
    (ASSETS / name).write_text(page + "\n", "utf-8")


def arrowheads():
    """All pictures in assets/ begin with these definitions; those drawn by hand have arrows."""
    look = {"viewBox": "0 0 8 8", "refX": 7, "refY": 4, "orient": "auto"}
    size = {"markerUnits": "userSpaceOnUse", "markerWidth": 10, "markerHeight": 10}
    heads = []
    for color in (INK, SOFT, BLUE, ORANGE):
        head = tag("path", d="M0,0.5 L8,4 L0,7.5 z", fill=color)
        heads.append(tag("marker", head, id=f"arrow{color[1:]}", **look, **size))
    return tag("defs", "".join(heads))


# --- results.svg: recall while training, and at the end -------------------------------


def read_results():
    lines = (BENCH / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def place(x0, share, recall):
    """A point in a chart with its left edge at x0. share: of the chart's width."""
    return round(x0 + 290 * share, 1), round(82 + 250 * (1 - recall), 1)


def axes(x0, ticks, title, note, x_title):
    """Frame of a chart of recall from 0 to 100%. ticks: [(share of the width, label)]."""
    parts = [
        text(x0 + 145, 38, title, font_weight="bold"),
        text(x0 + 145, 60, note, 13, SOFT),
        text(x0 + 145, 374, x_title, 13),
        upward_text(x0 - 48, 207, "recall of facts", 13),
    ]
    for percent in range(0, 101, 20):
        _, y = place(x0, 0, percent / 100)
        right = place(x0, 1, percent / 100)
        parts.append(line([(x0, y), right], GRID, 1))
        parts.append(text(x0 - 8, y + 4, f"{percent}%", 12, SOFT, "end"))
    for share, label in ticks:
        x, _ = place(x0, share, 0)
        parts.append(text(x, 352, label, 12, SOFT))
    return parts


def training_curves():
    """{options: [[(step, recall), ...] of each seed]}, on the machine of the first line."""
    results = read_results()
    curves = {}
    for result in results:
        if result["machine"] == results[0]["machine"]:
            _, _, words = result["command"].partition("--preset=")
            options, _, seed = words.rpartition(" --seed=")
            curve = [(step, recall) for step, recall, *_ in result["curve"]]
            curves.setdefault(options, {})[seed] = curve  # the last, of a seed trained twice
    return {options: list(seeds.values()) for options, seeds in curves.items()}


def draw_results():
    curves = training_curves()
    looks = [
        ("facts-memory", ORANGE, "Memory+", ""),
        ("facts-moe --max_iters=5000", GREEN, "experts,", "same time"),
        ("facts-dense --max_iters=6000", FAINT, "dense,", "same time"),
        ("facts-dense2x", INK, "dense,", "2x FLOPs"),
        ("facts-dense", BLUE, "dense", ""),
    ]
    last = max(step for look in looks for curve in curves[look[0]] for step, _ in curve)
    ticks = [(step / last, f"{step / 1000:g}") for step in range(0, last + 1, 1000)]
    columns = [((i + 0.5) / 5, look[2]) for i, look in enumerate(looks)]
    note = "each thin line a seed, thick: their mean"
    parts = axes(84, ticks, "while training", note, "thousand training steps of 1,024 tokens")
    note = "each dot a seed, the bars their mean and its error"
    parts += axes(500, columns, "at the end", note, "")
    for i, (options, color, _, second_line) in enumerate(looks):
        seeds = curves[options]
        steps = [step for step, _ in seeds[0]]
        average = [mean(recall for _, recall in points) for points in zip(*seeds, strict=True)]
        parts += [recall_line(curve, last, color, 0.7) for curve in seeds]
        parts.append(recall_line(zip(steps, average, strict=True), last, color, 3.2))
        recalls = [curve[-1][1] for curve in seeds]
        parts += draw_ends(recalls, (i + 0.5) / 5, color, second_line)
    save("results.svg", 822, 396, parts)


def recall_line(curve, last, color, width):
    points = [place(84, step / last, recall) for step, recall in curve]
    return line(points, color, width)


def draw_ends(recalls, share, color, second_line):
    average = mean(recalls)
    error = stdev(recalls) / len(recalls) ** 0.5
    x, y = place(500, share, average)
    top = place(500, share, average + error)
    bottom = place(500, share, average - error)
    return [
        line([top, bottom], color, 3.2),
        line([(x - 22, y), (x + 22, y)], color, 3.2),
        text(x, 368, second_line, 12, SOFT),
        *rings([place(500, share, recall) for recall in recalls], 4, color),
    ]


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
    save("slots.svg", 822, 500, parts)


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

UPDATES = [  # options, color, note at the end of the curve, and how far below that end
    ("", INK, "", 0),
    ("--learning_rate=0.0003", FAINT, "", 0),
    ("--learning_rate=0.0001 --mem_sgd=1.0", VIOLET, "", 0),
    ("--slots=0", GREEN, "", 0),
    ("--slots=32768", BLUE, "32,768", -22),
    ("--slots=16384", BLUE, "16,384", 18),
    ("--slots=4096", BLUE, "4,096", 18),
    ("--slots=1024", BLUE, "1,024", 18),
    ("--slots=16384 --choose_by=reads", ORANGE, "16,384", 18),
]
LEGEND = [
    (INK, "all weights, AdamW and RowAdam at the rates of training"),
    (FAINT, "all weights, AdamW at 3e-4"),
    (VIOLET, "all weights, AdamW at 1e-4, SGD for values"),
    (GREEN, "all rows of the table, SGD"),
    (ORANGE, "16,384 rows, chosen by reads"),
    (BLUE, "so many rows"),
]


def update_curves():
    """{options: [(recall of new facts, of old ones), ...]}, means over seeds."""
    seeds = {}
    for result in read_results():
        _, is_update, words = result["command"].partition("--dataset=out/facts-new")
        if is_update:
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
    parts = recall_axes(84, 0.0, "all of it")
    for options, color, _, _ in UPDATES:
        points = update_points(curves[options], 84, 0.0)
        parts += [line(points, color, 2), *rings(points, 3, color)]
    parts += recall_axes(500, 0.85, "above 85%")
    for options, color, note, shift in UPDATES:
        points = update_points(curves[options], 500, 0.85)
        parts += [line(points, color, 2), *rings(points, 3, color)]
        if note:
            x, y = points[-1]
            parts.append(text(x - 10, y + shift, note, 12, color))
    for i, (color, words) in enumerate(LEGEND):
        x = 50 + 390 * (i % 2)
        y = 378 + 20 * (i // 2)
        parts.append(line([(x, y - 4), (x + 22, y - 4)], color, 2.5))
        parts.append(text(x + 30, y, words, 12, anchor="start"))
    save("updates.svg", 822, 432, parts)


def recall_axes(x0, low, title):
    """Frame of a chart of old recall, from low to 100%, against new recall, from 0 to 100%."""
    parts = [
        text(x0 + 145, 34, title, 15, font_weight="bold"),
        text(x0 + 145, 350, "new facts known", 13),
        upward_text(x0 - 50, 180, "old facts known", 13),
    ]
    for i in range(6):
        y = 305 - 50 * i
        parts.append(line([(x0, y), (x0 + 290, y)], GRID, 1))
        parts.append(text(x0 - 8, y + 4, f"{low + (1 - low) * i / 5:.0%}", 12, SOFT, "end"))
        parts.append(text(x0 + 58 * i, 326, f"{i / 5:.0%}", 12, SOFT))
    return parts


def update_points(curve, x0, low):
    """Where the part of a curve above low is drawn."""
    points = []
    for new, old in curve:
        if old >= low:
            y = 305 - 250 * (old - low) / (1 - low)
            points.append((round(x0 + 290 * new, 1), round(y, 1)))
    return points


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    draw_results()
    draw_slots()
    draw_updates()
