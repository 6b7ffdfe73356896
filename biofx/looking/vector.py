"""Vector graphics and images of a view (`.svg`, `.png`), drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from biofx.base.errors import ArgumentError
from biofx.base.packages import require
from biofx.looking.layout import Gap, route, rows_by_box
from biofx.looking.roles import Role

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from biofx.looking.view import Box, View

LETTER, LINE, GAP, WAY, MARGIN = 5.6, 22.0, 14.0, 8.0, 10.0  # points
LARGEST = 30_000.0  # points of a side of the picture


@dataclass(frozen=True)
class Placed:
    """A box with its place in the picture, in points from the top left.

    Attributes:
        box: the box.
        left: its left side.
        top: its upper side.
        width: its width.
        height: its height.
        parts: what it contains, if it is open.
        ways: the gap of each edge that passes other boxes in it: the middle of the gap in each row, downwards.
    """

    box: Box
    left: float
    top: float
    width: float
    height: float
    parts: tuple[Placed, ...] = ()
    ways: Mapping[tuple[str, str], tuple[tuple[float, float], ...]] | None = None

    def moved(self, right: float, down: float) -> Placed:
        """The same box at another place."""
        ways = {ends: tuple((x + right, y + down) for x, y in way) for ends, way in (self.ways or {}).items()}
        parts = tuple(part.moved(right, down) for part in self.parts)
        return Placed(self.box, self.left + right, self.top + down, self.width, self.height, parts, ways)


def place(box: Box, rows_of: Mapping[str, list[list[str | Gap]]]) -> Placed:
    """Lay out a box, given what each box contains in rows."""
    width = max(LETTER * len(line) for line in _lines(box)) + 2 * MARGIN
    if not box.children:
        return Placed(box, 0.0, 0.0, width, LINE * (0.4 + 0.6 * (len(_lines(box)) + bool(box.inserted))))
    children = {child.name: place(child, rows_of) for child in box.children}
    rows = rows_of[box.name]
    widths = [sum(_width(item, children) + GAP for item in row) - GAP for row in rows]
    inner = max([width, *widths])
    top = LINE + GAP / 2
    parts: list[Placed] = []
    ways: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row, row_width in zip(rows, widths, strict=True):
        left = MARGIN + (inner - row_width) / 2
        height = max([children[item].height for item in row if isinstance(item, str)], default=0.0)
        for item in row:
            if isinstance(item, str):
                child = children[item]
                parts.append(child.moved(left, top + (height - child.height) / 2))
            else:
                middle = left + WAY / 2
                ways.setdefault((item.source, item.target), []).extend([(middle, top), (middle, top + height)])
            left += _width(item, children) + GAP
        top += height + 1.6 * GAP
    found = {ends: tuple(way) for ends, way in ways.items()}
    return Placed(box, 0.0, 0.0, inner + 2 * MARGIN, top - 0.6 * GAP, tuple(parts), found)


def _width(item: str | Gap, children: Mapping[str, Placed]) -> float:
    return WAY if isinstance(item, Gap) else children[item].width


def _lines(box: Box) -> list[str]:
    """What is written in a closed box."""
    return [box.label, *([box.facts["shape"]] if box.role is Role.WEIGHT and "shape" in box.facts else [])]


def draw_vector(view: View, path: Path) -> None:
    """Write a picture of a view."""
    figure_module = require("matplotlib.figure", "draw", "draw")
    placed = place(view.root, rows_by_box(view))
    legend = [role for role in Role if any(box.role is role for box in view.root.walk()) and role is not Role.MODULE]
    width, height = max(placed.width, 260.0) + 2 * MARGIN, placed.height + LINE * (1.5 + len(legend))
    if max(width, height) > LARGEST:
        size = f"{width / 72:.0f} × {height / 72:.0f} inches"
        raise ArgumentError(f"draw: the picture would be {size} large; give a smaller depth, or write .html")
    figure = figure_module.Figure(figsize=(width / 72, height / 72), dpi=72 if height > 10_000 else 144)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    placed = placed.moved((width - placed.width) / 2, MARGIN)
    _draw(axes, placed)
    _draw_edges(axes, view, placed)
    for index, role in enumerate(legend):
        top = placed.height + LINE * (1.2 + index)
        _outline(axes, role, MARGIN, top, 26.0, 13.0)
        axes.text(MARGIN + 34, top + 6.5, role.value, va="center", fontsize=8, zorder=4)
    figure.savefig(path, format=path.suffix[1:])


def _draw(axes: Axes, placed: Placed, depth: int = 0) -> None:
    box = placed.box
    _outline(axes, box.role, placed.left, placed.top, placed.width, placed.height, depth)
    middle = placed.left + placed.width / 2
    if placed.parts:
        axes.text(placed.left + 6, placed.top + 6, plain(box.label), va="top", fontsize=8, fontweight="bold", zorder=4)
        for part in placed.parts:
            _draw(axes, part, depth + 1)
        return
    text = "\n".join(map(plain, _lines(box)))
    height = placed.height - (12 if box.inserted else 0)
    axes.text(middle, placed.top + height / 2, text, ha="center", va="center", fontsize=8, zorder=4)
    for index, role in enumerate(box.inserted):
        left = middle + 16 * (index - len(box.inserted) / 2)
        _outline(axes, role, left, placed.top + placed.height - 14, 14, 9)


def plain(text: str) -> str:
    """A text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")


def _outline(axes: Axes, role: Role, left: float, top: float, width: float, height: float, depth: int = 0) -> None:
    patches: Any = require("matplotlib.patches", "draw", "draw")
    is_module = role is Role.MODULE
    style: dict[str, Any] = {
        "facecolor": "#ffffff" if is_module and depth % 2 == 0 else role.style.colour,
        "edgecolor": "#555555",
        "linestyle": "--" if role in (Role.ISLAND, Role.OMITTED) else "-",
        "linewidth": 0.7,
        "zorder": 1 + 0.01 * depth if is_module else 3,  # edges run above modules and below nodes
    }
    if role.style.corners == "cut":
        bottom, right, cut = top + height, left + width, min(height / 2, 7.0)
        corners = [(left, top + height / 2), (left + cut, top), (right - cut, top), (right, top + height / 2)]
        axes.add_patch(patches.Polygon([*corners, (right - cut, bottom), (left + cut, bottom)], **style))
        return
    radius = {"square": 0.0, "round": 5.0, "oval": min(width, height) / 2}[role.style.corners]
    boxstyle = f"round,pad=0,rounding_size={radius}" if radius else "square,pad=0"
    axes.add_patch(patches.FancyBboxPatch((left, top), width, height, boxstyle=boxstyle, **style))


def _draw_edges(axes: Axes, view: View, root: Placed) -> None:
    patches: Any = require("matplotlib.patches", "draw", "draw")
    paths: Any = require("matplotlib.path", "draw", "draw")
    placed = {p.box.name: p for p in _all(root)}
    ways = {key: way for p in _all(root) for key, way in (p.ways or {}).items()}
    parents = {child.name: box.name for box in view.root.walk() for child in box.children}
    labelled = set()
    for (source, target), label in view.edges.items():
        a, b = placed[source], placed[target]
        between = [point for step in route(parents, source, target) for point in ways.get(step, ())]
        points = [(a.left + a.width / 2, a.top + a.height), *between, (b.left + b.width / 2, b.top)]
        line: list[tuple[float, float]] = [points[0]]
        codes = [paths.Path.MOVETO]
        for (x0, y0), (x1, y1) in pairwise(points):
            bend = (y1 - y0) / 2
            line += [(x0, y0 + bend), (x1, y1 - bend), (x1, y1)]
            codes += [paths.Path.CURVE4] * 3
        arrow = patches.FancyArrowPatch(
            path=paths.Path(line, codes), arrowstyle="-|>", mutation_scale=6, color="#666666", linewidth=0.7, zorder=2
        )
        axes.add_patch(arrow)
        if label and source not in labelled:
            labelled.add(source)
            axes.text(points[0][0] + 3, points[0][1] + 8, label, fontsize=5.5, color="#333333", zorder=4)


def _all(placed: Placed) -> list[Placed]:
    return [placed, *(inner for part in placed.parts for inner in _all(part))]
