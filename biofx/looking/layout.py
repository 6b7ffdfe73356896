"""Layout: the contents of a box in rows, in which values flow downwards and edges can pass other boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from biofx.base.packages import require

if TYPE_CHECKING:
    from biofx.looking.view import View


@dataclass(frozen=True)
class Gap:
    """A gap in a row, through which an edge passes.

    Attributes:
        source: the name of the box where the edge starts, or the entrance of the box around the row.
        target: the name of the box where it ends, or the exit of the box around the row.
    """

    source: str
    target: str


def entrance(box: str) -> str:
    """What stands for the upper side of a box among the ends of edges inside."""
    return f"{box}>"


def exit_of(box: str) -> str:
    """What stands for the lower side of a box among the ends of edges inside."""
    return f"{box}<"


def route(parents: Mapping[str, str], source: str, target: str) -> list[tuple[str, str]]:
    """The steps of an edge: out of the modules around its source, past their neighbours, into those around its target.

    Args:
        parents: the box around each box.
        source: where the edge starts.
        target: where it ends; neither contains the other.
    """
    above = [source]
    while above[-1] in parents:
        above.append(parents[above[-1]])
    into, end = [], target
    while parents[end] not in above:
        into.append((entrance(parents[end]), end))
        end = parents[end]
    start = above[above.index(parents[end]) - 1]
    out = [(child, exit_of(around)) for child, around in pairwise(above[: above.index(start) + 1])]
    return [*out, (start, end), *reversed(into)]


def rows_by_box(view: View) -> dict[str, list[list[str | Gap]]]:
    """The contents of each box that contains others, in rows, by its name (see `rows_of`)."""
    parents = {child.name: box.name for box in view.root.walk() for child in box.children}
    steps: dict[str, dict[tuple[str, str], None]] = {name: {} for name in (view.root.name, *parents)}
    for source, target in view.edges:
        for step in route(parents, source, target):
            steps[parents[step[0]] if step[0] in parents else parents[step[1]]][step] = None
    boxes = (box for box in view.root.walk() if box.children)
    return {box.name: rows_of(box.name, [child.name for child in box.children], [*steps[box.name]]) for box in boxes}


def rows_of(box: str, children: Sequence[str], edges: Sequence[tuple[str, str]]) -> list[list[str | Gap]]:
    """Arrange the contents of a box in rows: each below those that it reads, with few crossings (Sugiyama's method).

    Args:
        box: the name of the box.
        children: the names of what it contains, in the order of the graph.
        edges: the steps of edges in it. Those against the order of the graph (modules that are called in turn) get no
            gaps.
    """
    ends = {entrance(box), exit_of(box)}
    used = {end for edge in edges for end in edge}
    names = [
        *([entrance(box)] if entrance(box) in used else []),
        *children,
        *([exit_of(box)] if exit_of(box) in used else []),
    ]
    rows = [[item for item in row if item not in ends] for row in _arranged(names, ends, edges)]
    return [row for row in rows if any(isinstance(item, str) for item in row)]


def _arranged(names: Sequence[str], ends: Set[str], edges: Sequence[tuple[str, str]]) -> list[list[str | Gap]]:
    position = {name: index for index, name in enumerate(names)}
    forward = [(a, b) for a, b in dict.fromkeys(edges) if position[a] < position[b]]
    layer = _layers(names, ends, forward)
    items: list[str | Gap] = [*names]
    layers = [layer[name] for name in names]
    steps: list[tuple[int, int]] = []
    for source, target in forward:
        previous = position[source]
        for between in range(layer[source] + 1, layer[target]):
            items.append(Gap(source, target))
            layers.append(between)
            steps.append((previous, len(items) - 1))
            previous = len(items) - 1
        steps.append((previous, position[target]))
    columns = _columns(layers, steps)
    rows: list[list[tuple[float, int]]] = [[] for _ in range(max(layers) + 1)]
    for index, (row, column) in enumerate(zip(layers, columns, strict=True)):
        rows[row].append((column, index))
    return [[items[index] for _, index in sorted(row)] for row in rows]


def _layers(names: Sequence[str], ends: Set[str], edges: Sequence[tuple[str, str]]) -> Mapping[str, int]:
    """The row of each box: below all that it reads. What reads nothing stands just above its first reader.

    The ends have the first and the last row for themselves, so edges from and to the outside get ways past the rest.
    """
    import networkx as nx  # takes 0.2 s to import

    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(name for name in names if name not in ends)
    graph.add_edges_from((a, b) for a, b in edges if a not in ends and b not in ends)
    layer = {name: index for index, row in enumerate(nx.topological_generations(graph), 1) for name in row}
    for name in graph:
        if not graph.in_degree(name) and graph.out_degree(name):
            layer[name] = min(layer[reader] for reader in graph[name]) - 1
    last = max(layer.values(), default=0) + 1
    return layer | {name: 0 if name == names[0] else last for name in names if name in ends}


def _columns(layers: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[float]:
    """Where each item stands in its row, from left to right."""
    if len(set(layers)) == len(layers):
        return [0.0] * len(layers)
    graph = require("igraph", "draw", "draw").Graph(n=len(layers), edges=list(edges), directed=True)
    return [float(column) for column, _ in graph.layout_sugiyama(layers=list(layers)).coords]
