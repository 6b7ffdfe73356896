"""Depth: which weights a signal passes before and after a node."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx


def depths(graph: fx.Graph, operators: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
    """Depth of every node: the largest number of weights on a path that ends before it.

    A graph is in topological order, so one sweep finds all longest paths.

    Args:
        graph: the graph.
        operators: the nodes that count, each with the number of its weights.
    """
    result: dict[fx.Node, int] = {}
    for node in graph.nodes:
        result[node] = max((result[n] + operators.get(n, 0) for n in node.all_input_nodes), default=0)
    return result


def reaching(graph: fx.Graph, operators: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes from which a path leads to one of the operators, other than the operator itself."""
    result: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(user in operators or user in result for user in node.users):
            result.add(node)
    return result
