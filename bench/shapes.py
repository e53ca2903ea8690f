"""Shapes of SVG pictures, as text."""

import re
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runtime.files import write_file

INK = "#1f2933"
SOFT = "#5b6673"
FAINT = "#8a94a0"
GRID = "#d5dbe3"
BLUE = "#1f5fd0"
ORANGE = "#c2570a"
GREEN = "#2d7d46"
VIOLET = "#8e3fb0"


def tag(name, content="", **attributes):
    """<name a-b="1">content</name> from tag(name, content, a_b=1)."""
    words = [name]
    for key, value in attributes.items():
        words.append(f'{key.replace("_", "-")}="{value}"')
    return f"<{' '.join(words)}>{content}</{name}>"


def text(x, y, words, size=14, color=INK, anchor="middle", **more):
    look = {"font_size": size, "fill": color, "text_anchor": anchor}
    words = re.sub(r"[\x00-\x1f]", " ", words)  # XML has no place for them
    return tag("text", escape(words), x=x, y=y, **look, **more)


def label(x, y, words, color, anchor="start", **more):
    """A text with a white edge, which can be read on top of lines."""
    halo = {"stroke": "white", "stroke_width": 5, "paint_order": "stroke"}
    return text(x, y, words, 14, color, anchor, stroke_linejoin="round", **halo, **more)


def upward_text(x, y, words, size, color=INK):
    return text(x, y, words, size, color, transform=f"rotate(-90 {x} {y})")


def box(x, y, width, height, radius=0):
    look = {"rx": radius, "fill": "white", "stroke": GRID}
    return tag("rect", x=x, y=y, width=width, height=height, **look)


def line(points, color, width, **more):
    path = " ".join(f"{x},{y}" for x, y in points)
    return tag("polyline", points=path, fill="none", stroke=color, stroke_width=width, **more)


def spot(x, y, radius, color, opacity):
    return tag("circle", cx=x, cy=y, r=radius, fill=color, fill_opacity=opacity)


def rings(points, radius, color):
    look = {"r": radius, "fill": "white", "stroke": color, "stroke_width": 1.5}
    return [tag("circle", cx=x, cy=y, **look) for x, y in points]


def save(path, width, height, parts):
    """A white card with round corners: dark ink on it reads well on light and dark pages."""
    card = box(0.5, 0.5, width - 1, height - 1, radius=10)
    drawing = "\n".join([arrowheads(), card, *parts])
    view = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}"}
    size = {"width": width, "height": height}
    page = tag("svg", drawing, **view, **size, font_family="Helvetica, Arial, sans-serif")
    write_file(path, page + "\n")


def arrowheads():
    """All pictures in assets/ begin with these definitions; those drawn by hand have arrows."""
    look = {"viewBox": "0 0 8 8", "refX": 7, "refY": 4, "orient": "auto"}
    size = {"markerUnits": "userSpaceOnUse", "markerWidth": 10, "markerHeight": 10}
    heads = []
    for color in (INK, SOFT, BLUE, ORANGE):
        head = tag("path", d="M0,0.5 L8,4 L0,7.5 z", fill=color)
        heads.append(tag("marker", head, id=f"arrow{color[1:]}", **look, **size))
    return tag("defs", "".join(heads))
