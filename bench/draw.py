"""Draws the README's pictures: python assets/draw.py. Plain SVG; it needs Python's standard library only."""

import json
from html import escape
from pathlib import Path
from statistics import mean, stdev

ASSETS = Path(__file__).resolve().parent
INK, SOFT, FAINT, GRID = "#1f2933", "#5b6673", "#8a94a0", "#d5dbe3"
BLUE, ORANGE, GREEN, VIOLET = "#1f5fd0", "#c2570a", "#2d7d46", "#8e3fb0"
PALE, PALE_BLUE, PALE_ORANGE = "#eef2f7", "#e1ebff", "#fde3cb"
MARKED = {"fill": PALE_ORANGE, "stroke": ORANGE}


def tag(name, content="", **attributes):
    """<name a-b="1">content</name> from tag(name, content, a_b=1); attributes that are "" are left out."""
    words = "".join(
        f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items() if value != ""
    )
    return f"<{name}{words}>{content}</{name}>"


def text(x, y, words, size=14, color=INK, anchor="middle", weight="", upward=False):
    look = {"font_size": size, "fill": color, "text_anchor": anchor, "font_weight": weight}
    return tag(
        "text", escape(words), x=x, y=y, **look, transform=f"rotate(-90 {x} {y})" if upward else ""
    )


def box(x, y, w, h, fill=PALE, stroke=SOFT, radius=4, dash=""):
    shape = {"x": x, "y": y, "width": w, "height": h, "rx": radius}
    return tag("rect", **shape, fill=fill, stroke=stroke, stroke_dasharray=dash)


def labelled(x, y, w, h, words, below="", **look):
    """A box with a line of text in it, and a smaller line (a shape, or what is done) under that."""
    parts = [box(x, y, w, h, **look), text(x + w / 2, y + h / 2 + (-3 if below else 5), words)]
    parts += [text(x + w / 2, y + h / 2 + 14, below, 12, SOFT)] if below else []
    return "".join(parts)


def line(*points, color=INK, width=1.5, arrow=False, dash=""):
    path = " ".join(f"{x},{y}" for x, y in points)
    look = {"stroke_dasharray": dash, "marker_end": f"url(#arrow{color[1:]})" if arrow else ""}
    return tag("polyline", points=path, fill="none", stroke=color, stroke_width=width, **look)


def arrow(x1, y1, x2, y2, color=INK, width=1.5):
    return line((x1, y1), (x2, y2), color=color, width=width, arrow=True)


def down(x, *ends, color=INK):
    """Arrows downwards, each from one of the heights to the next: down(x, from, to, from, to)."""
    return "".join(arrow(x, y1, x, y2, color) for y1, y2 in zip(ends[::2], ends[1::2], strict=True))


def save(name, width, height, parts):
    """Dark ink on a white card with round corners, which reads well on GitHub's light and dark pages."""
    look = {
        "viewBox": "0 0 8 8",
        "refX": 7,
        "refY": 4,
        "orient": "auto",
        "markerUnits": "userSpaceOnUse",
    }
    look |= {"markerWidth": 10, "markerHeight": 10}
    heads = {
        c[1:]: tag("path", d="M0,0.5 L8,4 L0,7.5 z", fill=c) for c in (INK, SOFT, BLUE, ORANGE)
    }
    markers = tag(
        "defs", "".join(tag("marker", head, id=f"arrow{c}", **look) for c, head in heads.items())
    )
    drawing = "\n".join([markers, box(0.5, 0.5, width - 1, height - 1, "white", GRID, 10), *parts])
    page = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {width} {height}",
        "width": width,
    }
    page |= {"height": height, "font_family": "Helvetica, Arial, sans-serif"}
    (ASSETS / name).write_text(tag("svg", drawing, **page) + "\n", "utf-8")


def draw_model():
    """Six blocks, two of them with a memory layer; the one pool that both read; the inside of a layer."""
    parts = [
        text(142, 32, "the model", 15, weight="bold"),
        text(142, 66, "tokens, (B, T, C)", 13, SOFT),
    ]
    for i in range(6):
        y, look = 92 + 74 * i, MARKED if i in (1, 4) else {}
        parts += [down(142, y - 20, y, color=SOFT), text(24, y + 31, str(i), 13, SOFT)]
        parts += [box(36, y, 212, 54, "white"), labelled(44, y + 8, 82, 38, "attention")]
        parts += [labelled(148, y + 8, 92, 38, "memory" if look else "SwiGLU", **look)]
        parts += [arrow(126, y + 27, 148, y + 27, SOFT)]
        parts += [arrow(290, y + 34, 240, y + 34, BLUE, 2)] if look else []
    parts += [
        down(142, 516, 536, color=SOFT),
        text(142, 554, "to the output matrix, (B, T, C)", 13, SOFT),
    ]
    parts += [text(142, 602, "norms and residual sums are not drawn", 12, SOFT)]
    # the pool, with a few of its rows being read
    parts += [box(290, 160, 104, 338, PALE_BLUE, BLUE), text(342, 186, "ValuePool", weight="bold")]
    parts += [text(342, 206, "S = N·N rows", 12), text(342, 223, "(S, D)", 12, SOFT)]
    for row in range(22):
        parts += [
            box(302, 234 + 11.5 * row, 80, 8, BLUE if row in (2, 9, 14, 19) else "white", BLUE, 1)
        ]
    parts += [
        text(342, 518, "one table for all", 12, SOFT),
        text(342, 534, "memory layers", 12, SOFT),
    ]
    # a layer from top to bottom: on the left what finds and reads slots, on the right the gate
    parts += [text(648, 32, "MemoryLayer, shapes for one token", 15, weight="bold")]
    parts += [box(432, 46, 432, 536, "white", ORANGE, 6)]
    parts += [line((240, 180), (264, 180), (264, 73), (432, 73), color=ORANGE, dash="4 3")]
    parts += [labelled(448, 56, 136, 34, "x (C)", fill="white"), down(516, 90, 112)]
    for x, name, shape, rows in (
        (448, "query W_q x", "(H, 2, Q)", 1),
        (600, "sub-keys", "(H, 2, N, Q)", 4),
    ):
        h, middle = 62 + 7.5 * rows, x + 68
        parts += [box(x, 112, 136, h), text(middle, 129, name), text(middle, 146, shape, 12, SOFT)]
        for half, left in ((1, x + 10), (2, x + 74)):
            parts += [text(left + 26, 163, f"half {half}", 12)]
            parts += [box(left, 169 + 7.5 * row, 52, 5.5, "white", radius=0) for row in range(rows)]
        parts += [down(middle, 112 + h, 222, 250, 268), labelled(x, 222, 136, 28, "RMSNorm")]
    parts += [text(743, 240, "qk-norm", 12, SOFT, "start")]
    parts += [
        labelled(448, 268, 288, 42, "scores: sub-key · query / √Q", "N for each half: (H, 2, N)")
    ]
    parts += [
        labelled(448, 328, 288, 42, "product_topk", "the K best of the N·N sums s1[i] + s2[j]")
    ]
    parts += [labelled(536, 388, 200, 42, "softmax over the K scores", "H·K weights")]
    parts += [
        labelled(
            448, 448, 288, 42, "lookup: Σ weight · values[slot]", "over H·K slots: (D)", **MARKED
        )
    ]
    parts += [text(486, 405, "H·K", 12, SOFT, "end"), text(486, 421, "slots", 12, SOFT, "end")]
    parts += [
        arrow(394, 469, 448, 469, BLUE, 2),
        down(492, 370, 448),
        down(636, 370, 388, 430, 448),
    ]
    parts += [line((584, 73), (804, 73), (804, 268), arrow=True)]
    parts += [labelled(756, 268, 96, 42, "silu(W_g x)", "gate: (D)")]
    parts += [
        line((804, 310), (804, 511), (602, 511), arrow=True),
        down(592, 310, 328, 490, 501, 521, 534),
    ]
    parts += [box(582, 501, 20, 20, "white", INK, 10), line((588, 507), (596, 515))]
    parts += [line((588, 515), (596, 507)), labelled(524, 534, 136, 34, "output W_o (C)")]
    parts += [
        down(592, 568, 596),
        text(592, 612, "out, added to the block's x: (B, T, C)", 13, SOFT),
    ]
    save("model.svg", 880, 626, parts)


def draw_product_keys():
    """K = 8 best of the sums of two sorted lists: the staircase that holds every possible winner."""
    half1, half2 = (
        [27, 25, 22, 15, 9, 4, 3, 1],
        [30, 26, 19, 13, 10, 9, 5, 1],
    )  # in tenths, for exact sums
    K, cell, left, top = len(half1), 38, 96, 76
    ranked = sorted(((half1[a] + half2[b], a, b) for a in range(K) for b in range(K)), reverse=True)
    winners = {(a, b) for _, a, b in ranked[:K]}
    parts = [text(left + K * cell / 2, 34, f"half 2: the K = {K} best of its N scores, sorted")]
    parts += [
        text(
            38, top + K * cell / 2, f"half 1: the K = {K} best of its N scores, sorted", upward=True
        )
    ]
    for a in range(K):
        parts += [text(left + (a + 0.5) * cell, top - 12, str(half2[a] / 10), 13, BLUE)]
        parts += [text(left - 12, top + (a + 0.5) * cell + 5, str(half1[a] / 10), 13, BLUE, "end")]
        for b in range(K):
            x, y, inside, won = (
                left + b * cell,
                top + a * cell,
                (a + 1) * (b + 1) <= K,
                (a, b) in winners,
            )
            parts += [
                box(
                    x, y, cell, cell, ORANGE if won else PALE_ORANGE if inside else "white", GRID, 0
                )
            ]
            if inside:
                look = {"color": "white", "weight": "bold"} if won else {}
                parts += [
                    text(
                        x + cell / 2, y + cell / 2 + 5, str((half1[a] + half2[b]) / 10), 13, **look
                    )
                ]
    notes = [
        "2N sub-keys, N for each half, make N·N slots:",
        "the score of slot (i, j) is s1[i] + s2[j].",
        "",
        "The K best of the N·N sums lie on the staircase",
        "(a + 1)(b + 1) ≤ K of the two sorted lists, with",
        "row a and column b from 0: any other sum is",
        "beaten by K or more, above it and to its left.",
    ]
    x, pairs = left + K * cell + 40, sum(K // (a + 1) for a in range(K))
    parts += [text(x, top + 38 + 23 * i, words, anchor="start") for i, words in enumerate(notes)]
    marks = {
        ORANGE: f"the {K} best",
        PALE_ORANGE: f"candidates: {pairs} of {K * K} (K = 32: 119 of 1,024)",
    }
    for y, (fill, words) in zip((top + 222, top + 250), marks.items(), strict=True):
        parts += [box(x, y, 16, 16, fill, GRID, 0), text(x + 26, y + 13, words, anchor="start")]
    save("product_keys.svg", 800, 404, parts)


def draw_lookup():
    """Forward: a token reads rows. Backward: a row collects from tokens. The same picture, turned round."""
    weights = {(0, 1): 0.5, (0, 4): 0.2, (0, 6): 0.3, (1, 2): 0.5, (1, 4): 0.3, (1, 5): 0.2}
    weights |= {(2, 0): 0.1, (2, 4): 0.6, (2, 7): 0.3}  # (token, row): weight
    parts = [line((430, 24), (430, 376), color=GRID, width=1)]
    forward = 36, "forward: y = W V", "a token adds up the rows that it reads", "", "not read"
    backward = (
        466,
        "backward: dV = Wᵀ dY",
        "a row adds up the tokens that read it",
        "d",
        "no gradient",
    )
    for x0, title, words, d, unread in (forward, backward):
        chosen = {(i, s): weight for (i, s), weight in weights.items() if (s == 4 if d else i == 1)}
        terms = [
            f"{weight} dy[{i}]" if d else f"{weight} V[{s}]" for (i, s), weight in chosen.items()
        ]
        total = ("dV[4] = " if d else "y[1] = ") + " + ".join(terms)
        parts += [
            text(x0 + 180, 34, title, 15, weight="bold"),
            text(x0 + 180, 56, words, color=SOFT),
        ]
        parts += [text(x0 + 180, 366, total, color=ORANGE, weight="bold")]
        parts += [
            text(x0 + 40, 88, "tokens (n, D)", 12, SOFT),
            text(x0 + 300, 88, "values (S, D)", 12, SOFT),
        ]
        for i, s in sorted(
            weights, key=chosen.__contains__
        ):  # the chosen ones last, over the others
            token, row, mark = (x0 + 80, 142 + 72 * i), (x0 + 240, 111 + 30 * s), (i, s) in chosen
            ends = (token, row) if d else (row, token)
            parts += [
                line(*ends, color=ORANGE if mark else FAINT, width=2.2 if mark else 1, arrow=mark)
            ]
        for (i, s), weight in chosen.items():  # on its line, near to where that begins
            share = 0.25 if d else 0.8
            x, y = (
                x0 + 80 + 160 * share,
                round((142 + 72 * i) * (1 - share) + (111 + 30 * s) * share),
            )
            parts += [box(x - 13, y - 9, 26, 18, "white", "none")]
            parts += [text(x, y + 5, str(weight), 13, ORANGE, weight="bold")]
        for i in range(3):
            parts += [
                labelled(x0, 128 + 72 * i, 80, 28, f"{d}y[{i}]", **({} if d or i != 1 else MARKED))
            ]
        for s in range(8):
            read = any((i, s) in weights for i in range(3))
            look = MARKED if d and s == 4 else {} if read else {"fill": "white", "dash": "4 3"}
            words = f"{d}V[{s}]" if read else f"V[{s}]: {unread}"
            parts += [labelled(x0 + 240, 98 + 30 * s, 130, 26, words, **look)]
    save("lookup.svg", 870, 388, parts)


def place(x0, share, recall):
    """Where in a chart with its left edge at x0 a recall is drawn; share: of the chart's width."""
    return round(x0 + 290 * share, 1), round(82 + 250 * (1 - recall), 1)


def axes(x0, ticks, title, note, x_title):
    """Frame of a chart of recall from 0 to 100%. ticks: [(share of the width, label)]."""
    parts = [text(x0 + 145, 38, title, weight="bold"), text(x0 + 145, 60, note, 13, SOFT)]
    parts += [
        text(x0 + 145, 374, x_title, 13),
        text(x0 - 48, 207, "recall of facts", 13, upward=True),
    ]
    for percent in range(0, 101, 20):
        (_, y), right = place(x0, 0, percent / 100), place(x0, 1, percent / 100)
        parts += [line((x0, y), right, color=GRID, width=1)]
        parts += [text(x0 - 8, y + 4, f"{percent}%", 12, SOFT, "end")]
    return parts + [text(place(x0, share, 0)[0], 352, label, 12, SOFT) for share, label in ticks]


def draw_results():
    """Recall while training, and at the end: results.jsonl, of bench/reproduce.py."""
    curves = {}  # command without its seed: {seed: [[step, recall, ...]]}; of a seed run twice the last
    lines = [json.loads(line) for line in (ASSETS / "results.jsonl").read_text().splitlines()]
    for result in (line for line in lines if line["machine"] == lines[0]["machine"]):
        command, _, seed = result["command"].partition("--preset=")[2].rpartition(" --seed=")
        curves.setdefault(command, {})[seed] = result["curve"]
    looks = [("facts-memory", ORANGE, "Memory+", "")]
    looks += [("facts-moe --max_iters=5000", GREEN, "experts,", "same time")]
    looks += [("facts-dense --max_iters=6000", FAINT, "dense,", "same time")]
    looks += [("facts-dense2x", INK, "dense,", "2x FLOPs"), ("facts-dense", BLUE, "dense", "")]
    looks = [look for look in looks if len(curves.get(look[0], ())) > 1]  # what has been run
    last = max(
        [points[-1][0] for look in looks for points in curves[look[0]].values()], default=1000
    )
    ticks = [(step / last, f"{step / 1000:g}") for step in range(0, last + 1, 1000)]
    title, note = "while training", "each thin line a seed, thick: their mean"
    parts = axes(84, ticks, title, note, "thousand training steps of 1,024 tokens")
    ticks = [((i + 0.5) / 5, first) for i, (_, _, first, _) in enumerate(looks)]
    parts += axes(
        500, ticks, "at the end", "each dot a seed, the bars their mean and its error", ""
    )
    for i, (command, color, _, second) in enumerate(looks):
        seeds = [[point[:2] for point in curve] for curve in curves[command].values()]
        average = [
            (points[0][0], mean(y for _, y in points)) for points in zip(*seeds, strict=True)
        ]
        for curve, width in [*((curve, 0.7) for curve in seeds), (average, 3.2)]:
            parts += [
                line(*(place(84, step / last, y) for step, y in curve), color=color, width=width)
            ]
        x, y = place(500, (i + 0.5) / 5, average[-1][1])
        error = stdev(curve[-1][1] for curve in seeds) / len(seeds) ** 0.5
        ends = (place(500, (i + 0.5) / 5, average[-1][1] + e) for e in (error, -error))
        parts += [line(*ends, color=color, width=3.2)]
        parts += [
            line((x - 22, y), (x + 22, y), color=color, width=3.2),
            text(x, 368, second, 12, SOFT),
        ]
        for x, y in (place(500, (i + 0.5) / 5, curve[-1][1]) for curve in seeds):
            parts += [tag("circle", cx=x, cy=y, r=4, fill="white", stroke=color, stroke_width=1.5)]
    save("results.svg", 822, 396, parts)


def draw_slots():
    """What questions for some facts read in a table of N * N slots: slots.json (bench/slots.py --draw)."""
    file, side, parts = json.loads((ASSETS / "slots.json").read_text()), 340, []
    reads, person = file["reads"], file["reads"][0][0]
    colors = BLUE, ORANGE, GREEN, VIOLET, "#b8860b", "#c2185b"
    one = 40, f"six facts of {person}", [read for read in reads if read[0] == person], 1
    six = 450, "the employers of six people", [read for read in reads if read[1] == "employer"], 0
    for x0, title, facts, name in (one, six):
        parts += [text(x0 + side / 2, 34, title, 15, weight="bold")]
        parts += [box(x0, 52, side, side, "white", GRID, 0)]
        parts += [text(x0 - 14, 52 + side / 2, "sub-key of half 1", 12, SOFT, upward=True)]
        parts += [text(x0 + side / 2, 72 + side, "sub-key of half 2", 12, SOFT)]
        for i, (fact, color) in enumerate(zip(facts, colors, strict=True)):
            for slot, share in fact[2]:
                row, column = divmod(slot, file["keys"])
                x, y = (round(z * side / file["keys"], 1) for z in (column + 0.5, row + 0.5))
                radius = round(15 * share**0.5, 1)
                parts += [
                    tag("circle", cx=x0 + x, cy=52 + y, r=radius, fill=color, fill_opacity=0.55)
                ]
            x, y = x0 + 10 + 168 * (i % 2), 96 + side + 20 * (i // 2)
            parts += [tag("circle", cx=x, cy=y, r=5, fill=color, fill_opacity=0.7)]
            parts += [text(x + 10, y + 4, fact[name], 12, anchor="start")]
    save("slots.svg", 822, 500, parts)


def draw_updates():
    """Old facts against new ones while a model learns 100 people: results.jsonl, of bench/reproduce.py."""
    curves = {}  # options: the curves, [[step, new recall, ..., old recall, old loss], ...], of each seed
    for result in map(json.loads, (ASSETS / "results.jsonl").read_text().splitlines()):
        _, _, options = result["command"].partition("--dataset=out/facts-new")
        if options:
            curves.setdefault(options.rpartition(" --seed=")[0].strip(), []).append(result["curve"])
    rows = "--update=memory --update_slots="
    looks = [("", INK, "all weights, AdamW and RowAdam at the rates of training")]
    looks += [("--learning_rate=0.0003", FAINT, "all weights, AdamW at 3e-4")]
    looks += [
        (
            "--learning_rate=0.0001 --mem_sgd=1.0",
            VIOLET,
            "all weights, AdamW at 1e-4, SGD for values",
        )
    ]
    looks += [(f"{rows}0", GREEN, "all rows of the table, SGD")]
    looks += [(f"{rows}{T}", BLUE, f"{T:,} rows") for T in (32768, 16384, 4096, 1024)]
    looks += [(f"{rows}16384 --update_by=reads", ORANGE, "16,384 rows, chosen by reads")]
    looks, parts = [look for look in looks if look[0] in curves], []
    for x0, low, title in ((84, 0.0, "all of it"), (500, 0.85, "above 85%")):
        parts += [
            text(x0 + 145, 34, title, 15, weight="bold"),
            text(x0 + 145, 350, "new facts known", 13),
        ]
        parts += [text(x0 - 50, 180, "old facts known", 13, upward=True)]
        for i in range(6):
            value, y = f"{low + (1 - low) * i / 5:.0%}", 305 - 50 * i
            parts += [line((x0, y), (x0 + 290, y), color=GRID, width=1)]
            parts += [text(x0 - 8, y + 4, value, 12, SOFT, "end")]
            parts += [text(x0 + 58 * i, 326, f"{i / 5:.0%}", 12, SOFT)]
        for options, color, _ in looks:
            steps = zip(*curves[options], strict=True)
            means = [(mean(p[1] for p in points), mean(p[-2] for p in points)) for points in steps]
            inside = [(round(x0 + 290 * new, 1), round(305 - 250 * (old - low) / (1 - low), 1))
                      for new, old in means if old >= low]  # fmt: skip
            look = {"r": 3, "fill": "white", "stroke": color, "stroke_width": 1.5}
            parts += [line(*inside, color=color, width=2)]
            parts += [tag("circle", cx=x, cy=y, **look) for x, y in inside]
            if low and "memory" in options and "slots=0" not in options:
                words, (x, y) = options.partition("slots=")[2].partition(" ")[0], inside[-1]
                y += -22 if words == "32768" else 18
                parts += [text(x - 10, y, f"{int(words):,}", 12, color)]
    several = [(color, words) for _, color, words in looks if color != BLUE] + [
        (BLUE, "so many rows")
    ]
    for i, (color, words) in enumerate(several):
        x, y = 50 + 390 * (i % 2), 378 + 20 * (i // 2)
        parts += [line((x, y - 4), (x + 22, y - 4), color=color, width=2.5)]
        parts += [text(x + 30, y, words, 12, anchor="start")]
    save("updates.svg", 822, 432, parts)


if __name__ == "__main__":
    draw_model()
    draw_product_keys()
    draw_lookup()
    draw_results()
    draw_slots()
    draw_updates()
