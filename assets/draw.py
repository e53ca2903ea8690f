"""Draws the README's pictures: python assets/draw.py. Plain SVG, nothing but Python's standard library is needed."""

import json
import random
import statistics
from html import escape
from pathlib import Path

ASSETS = Path(__file__).resolve().parent
INK, SOFT, BLUE, ORANGE, GREEN, PALE = "#1f2933", "#7b8794", "#2f6fde", "#e8710a", "#2e9e5b", "#eef2f7"


def text(x, y, words, size=14, color=INK, anchor="middle", weight="normal"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def box(x, y, w, h, fill=PALE, stroke=SOFT, radius=4, width=1):
    shape = f'x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}"'
    return f'<rect {shape} fill="{fill}" stroke="{stroke}" stroke-width="{width}"/>'


def labelled(x, y, w, h, words, below="", fill=PALE, stroke=SOFT):
    """A box with a line of text in it, and a smaller line (a shape, or the name of a function) under that."""
    middle = y + h / 2 + (5 if not below else -3)
    return box(x, y, w, h, fill, stroke) + text(x + w / 2, middle, words) + text(x + w / 2, middle + 17, below, 12, SOFT)


def line(points, color=INK, width=1.5, arrow=False, dash=""):
    path = " ".join(f"{x},{y}" for x, y in points)
    end = f' marker-end="url(#{"arrow" + color[1:]})"' if arrow else ""
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" stroke-dasharray="{dash}"{end}/>'


def arrow(x1, y1, x2, y2, color=INK, width=1.5):
    return line([(x1, y1), (x2, y2)], color, width, arrow=True)


def save(name, width, height, *parts):
    heads = "".join(
        f'<marker id="arrow{c[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{c}"/></marker>'
        for c in (INK, SOFT, BLUE, ORANGE, GREEN)
    )
    (ASSETS / name).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif"><defs>{heads}</defs>'
        f'<rect width="{width}" height="{height}" fill="white"/>' + "".join(parts) + "</svg>\n"
    )


def draw_model():
    """Four blocks; one of them has a memory layer; the pool stands outside and could serve more of them."""
    parts = [text(140, 26, "the model", 15, weight="bold"), text(560, 26, "a memory layer", 15, weight="bold")]
    for i in range(4):
        y = 250 - 62 * i
        memory = i == 2
        parts += [box(30, y, 220, 50, "white", SOFT), text(16, y + 30, str(i), 12, SOFT)]
        parts += [labelled(38, y + 8, 96, 34, "attention")]
        name, fill, edge = ("memory", "#fdebd9", ORANGE) if memory else ("SwiGLU", PALE, SOFT)
        parts += [labelled(146, y + 8, 96, 34, name, fill=fill, stroke=edge)]
        parts += [arrow(140, y + 62, 140, y + 52, SOFT)]
    parts += [text(140, 330, "tokens x (B, T, C)", 13, SOFT), arrow(140, 64, 140, 46, SOFT)]
    parts += [line([(242, 142), (290, 142), (290, 50), (300, 50)], ORANGE, 1.5, dash="4 3")]
    # inside the layer, from left to right
    parts += [box(300, 40, 540, 262, "white", ORANGE, 6)]
    parts += [labelled(316, 150, 62, 44, "x", "(C)", fill="white")]
    parts += [labelled(412, 84, 120, 44, "query W_q", "(H, 2, Q)")]
    parts += [labelled(412, 150, 120, 44, "sub-keys", "(H, 2, N, Q)")]
    parts += [labelled(566, 84, 120, 110, "top-k", "product_topk")]
    parts += [text(626, 178, "H·K slots, weights", 12, SOFT)]
    parts += [labelled(412, 232, 120, 44, "silu(W_g x)", "(D)")]
    parts += [labelled(720, 117, 104, 44, "lookup", "(D)", fill="#fdebd9", stroke=ORANGE)]
    parts += [labelled(720, 232, 104, 44, "output W_o", "(C)")]
    parts += [arrow(378, 165, 410, 112), arrow(378, 182, 410, 246), arrow(532, 106, 564, 120), arrow(532, 172, 564, 160)]
    parts += [arrow(686, 139, 718, 139), arrow(772, 161, 772, 196)]
    parts += [text(772, 216, "×", 24), arrow(772, 220, 772, 230)]
    parts += [line([(532, 254), (640, 254), (640, 210), (758, 210)], arrow=True)]
    # the pool
    parts += [labelled(380, 326, 460, 44, "pool: S = N · N values of width D", "one table, read by every memory layer")]
    parts[-1] = parts[-1].replace(PALE, "#e7efff").replace(SOFT, BLUE, 1)
    parts += [line([(840, 348), (862, 348), (862, 139), (828, 139)], BLUE, 2, arrow=True)]
    save("model.svg", 880, 390, *parts)


def draw_product_keys():
    """K = 8 best of the sums of two sorted lists: the staircase that holds every possible winner."""
    K, cell, left, top = 8, 38, 130, 96
    generator = random.Random(4)
    s1, s2 = (sorted((generator.gauss(0, 1) for _ in range(24)), reverse=True)[:K] for _ in range(2))
    ranked = sorted(((s1[a] + s2[b], a, b) for a in range(K) for b in range(K)), reverse=True)
    winners = {(a, b) for _, a, b in ranked[:K]}
    parts = [text(left + K * cell / 2, 28, "best K scores of half 2, sorted", 14), text(left - 78, top - 14, "half 1", 14)]
    for i in range(K):
        parts += [text(left + i * cell + cell / 2, top - 12, f"{s2[i]:.1f}", 13, BLUE)]
        parts += [text(left - 12, top + i * cell + cell / 2 + 5, f"{s1[i]:.1f}", 13, BLUE, "end")]
        for j in range(K):
            candidate, won = (i + 1) * (j + 1) <= K, (i, j) in winners
            fill = ORANGE if won else "#fdebd9" if candidate else "#fafbfc"
            parts += [box(left + j * cell, top + i * cell, cell, cell, fill, "#d5dbe3", 0)]
            if candidate:
                color = "white" if won else INK
                parts += [text(left + j * cell + cell / 2, top + i * cell + cell / 2 + 5, f"{s1[i] + s2[j]:.1f}", 12, color)]
    x, pairs = left + K * cell + 40, sum(K // (a + 1) for a in range(K))
    notes = [
        (INK, "Each slot has a key of two halves, one of N"),
        (INK, "sub-keys for each: N · N slots from 2 N keys."),
        (INK, ""),
        (INK, "A slot's score is s1[i] + s2[j]. The best K of all"),
        (INK, "N · N sums lie among the K best of each list,"),
        (INK, "and, as both are sorted, on the staircase"),
        (INK, "(a + 1)(b + 1) ≤ K: any other sum is beaten by"),
        (INK, "K sums above it and to its left."),
        (INK, ""),
        (ORANGE, f"■ the {K} best"),
        ("#b9793a", f"■ candidates: {pairs} of {K * K} (K = 32: 119 of 1,024)"),
    ]
    parts += [text(x, top + 20 + 24 * i, words, 14, color, "start") for i, (color, words) in enumerate(notes)]
    save("product_keys.svg", 860, 420, *parts)


def draw_lookup():
    """Forward: a token reads rows. Backward: a row collects from tokens. The same picture, turned round."""
    parts = []
    halves = (40, "forward", "y = W V: a token adds up k rows"), (460, "backward", "dV = Wᵀ dY: a row adds up its tokens")
    for x0, title, formula in halves:
        parts += [text(x0 + 180, 28, title, 15, weight="bold"), text(x0 + 180, 50, formula, 14, SOFT)]
        parts += [text(x0 + 40, 84, "tokens", 13, SOFT), text(x0 + 300, 84, "values (S, D)", 13, SOFT)]
        reads = {0: (1, 4, 6), 1: (2, 4, 5), 2: (0, 4, 7)}
        for i in range(3):
            mark = x0 == 40 and i == 1
            parts += [box(x0, 112 + 72 * i, 80, 26, "#fdebd9" if mark else PALE, ORANGE if mark else SOFT)]
        for s in range(8):
            mark = x0 != 40 and s == 4
            parts += [box(x0 + 240, 98 + 26 * s, 120, 22, "#fdebd9" if mark else PALE, ORANGE if mark else SOFT)]
        for i, slots in reads.items():
            for s in slots:
                here = (x0 == 40 and i == 1) or (x0 != 40 and s == 4)
                ends = (x0 + 240, 109 + 26 * s, x0 + 82, 125 + 72 * i)
                ends = ends if x0 == 40 else (ends[2], ends[3], ends[0] - 2, ends[1])
                parts += [arrow(*ends, ORANGE if here else SOFT, 2.2 if here else 0.8)]
    save("lookup.svg", 860, 330, *parts)


def axes(x0, y0, w, h, x_ticks, title, x_title):
    """Frame of a chart of recall from 0 to 100%. x_ticks: [(share of the width, label)]."""
    parts = [text(x0 + w / 2, y0 - 16, title, 15, weight="bold"), text(x0 + w / 2, y0 + h + 44, x_title, 13, SOFT)]
    for percent in range(0, 101, 20):
        y = y0 + h * (1 - percent / 100)
        parts += [line([(x0, y), (x0 + w, y)], "#dde3ea", 1), text(x0 - 8, y + 5, f"{percent}%", 12, SOFT, "end")]
    parts += [text(x0 + share * w, y0 + h + 20, label, 12, SOFT) for share, label in x_ticks]
    return parts


def draw_results():
    """Recall while training, and recall against the number of slots, from results.json (written by compare.py)."""
    results = json.loads((ASSETS / "results.json").read_text())
    x0, y0, w, h = 70, 50, 320, 240
    best = {}
    for preset in ("facts-memory", "facts-dense"):
        names = {r["name"] for r in results if r["group"] == "main" and r["name"].startswith(preset)}
        best[preset] = max(names, key=lambda n: statistics.mean(r["recall"] for r in results if r["name"] == n))
    last = max(step for r in results if r["group"] == "main" for step, _ in r["curve"])
    ticks = [(step / last, f"{step:,}") for step in range(0, last + 1, 500)]
    parts = axes(x0, y0, w, h, ticks, "the same compute, three seeds each", "training steps of 1,024 tokens")
    for preset, color, label in (("facts-memory", ORANGE, "Memory+"), ("facts-dense", BLUE, "dense")):
        runs = [r for r in results if r["name"] == best[preset]]
        for r in runs:
            parts += [line([(x0 + w * step / last, y0 + h * (1 - recall)) for step, recall in [[0, 0], *r["curve"]]], color, 2)]
        end = statistics.mean(r["recall"] for r in runs)
        parts += [text(x0 + w + 6, y0 + h * (1 - end) + 5, label, 13, color, "start")]
    x0 = 530
    means = {}
    for r in results:
        if r["group"] == "slots" or r["name"] == best["facts-memory"]:
            N = int(r["name"][2:]) if r["group"] == "slots" else 128
            means.setdefault(N, []).append(r["recall"])
    order = sorted(means)
    place = {N: (i + 0.5) / len(order) for i, N in enumerate(order)}
    parts += axes(x0, y0, w, h, [(place[N], f"{N * N:,}") for N in order], "more slots, compute within 5%", "slots in the memory")
    for N in order:
        parts += [f'<circle cx="{x0 + w * place[N]}" cy="{y0 + h * (1 - r)}" r="4" fill="{ORANGE}"/>' for r in means[N]]
    parts += [line([(x0 + w * place[N], y0 + h * (1 - statistics.mean(means[N]))) for N in order], ORANGE, 2)]
    save("results.svg", 880, 350, *parts)


if __name__ == "__main__":
    draw_model()
    draw_product_keys()
    draw_lookup()
    if (ASSETS / "results.json").exists():
        draw_results()
