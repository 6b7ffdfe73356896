"""Questions about a network, put to its graph with networkx.

Run it with `python examples/graph_questions.py` (a few seconds). A residual network under Dale's principle becomes a
networkx graph by `biofx.to_networkx(bio)`. You see

1. which weights one unit reaches: the weights that read it, from `biofx.units`, and those that its activity gets to,
   which are the descendants in the graph,
2. what lies between two layers: the operators on any path from the one to the other,
3. how deep the network is: the longest and the shortest path from images to logits, counted in weights,
4. which weights every path has to pass, and would disconnect images and logits,
5. what passes inserted, by pass and role.

The graph is written to `residual.gexf`, which Gephi opens, and is read again.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import networkx
import torch
from tabulate import tabulate

import biofx
from biofx import passes
from command_line import headline
from dale import ResidualNet

Graph = networkx.MultiDiGraph


def operators(graph: Graph) -> dict[str, str]:
    """The operator that receives each weight: the first node behind its stored tensor that no pass inserted."""
    found = {}
    for node, weight in graph.nodes(data="weight"):
        if graph.nodes[node]["role"] == "stored weight":
            reached = networkx.descendants(graph, node)
            found[weight] = next(n for n in graph if n in reached and graph.nodes[n]["role"] == "original")
    return found


def readers(units: biofx.Units, name: str, unit: int) -> list[str]:
    """The weights that read one unit of a population: the outputs of a layer, or a sum of them behind a shortcut."""
    population = [population.name for population in units.populations].index(name)
    number = units.members(population)[unit]
    return [name for name, reading in units.readings.items() if (reading.numbers == number).any()]


def reached(graph: Graph, weight: str) -> list[str]:
    """The weights that the output of a layer gets to, through whatever lies between."""
    behind = networkx.descendants(graph, operators(graph)[weight])
    return [name for name, operator in operators(graph).items() if operator in behind]


def between(graph: Graph, first: str, last: str) -> list[str]:
    """The nodes on any path between the operators of two weights, in the order in which they run."""
    start, end = operators(graph)[first], operators(graph)[last]
    inside = networkx.descendants(graph, start) & networkx.ancestors(graph, end)
    on_path = inside - {n for n in inside if graph.nodes[n]["weight"]}
    return [f"{graph.nodes[n]['calls']}" for n in graph if n in on_path]


def depths(graph: Graph, source: str, target: str) -> tuple[int, int]:
    """The number of weights on the shortest and on the longest path between two nodes."""
    weighted = set(operators(graph).values())
    lengths = networkx.DiGraph()
    lengths.add_edges_from((a, b, {"weights": int(b in weighted)}) for a, b in graph.edges())
    inside = networkx.descendants(lengths, source) & networkx.ancestors(lengths, target) | {source, target}
    longest = networkx.dag_longest_path_length(lengths.subgraph(inside), weight="weights")
    return networkx.shortest_path_length(lengths, source, target, weight="weights"), longest


def bottlenecks(graph: Graph, source: str) -> list[str]:
    """The weights whose operators every path from a node has to pass."""
    dominators, node = networkx.immediate_dominators(graph, source), "output"
    passed = set()
    while node != source:
        passed.add(node)
        node = dominators[node]
    return [name for name, operator in operators(graph).items() if operator in passed]


def main() -> None:
    images = torch.zeros(2, 1, 8, 8)
    bio = biofx.transform(ResidualNet(), [passes.DalesPrinciple(), passes.FuzzyLearningRates()], example_inputs=images)
    graph, units = biofx.to_networkx(bio), biofx.units(bio, images)

    headline("Which weights does a unit reach?")
    populations = [population for population in units.populations if population.origin in ("weight", "merged")]
    rows = [[population.name, ", ".join(readers(units, population.name, 0))] for population in populations]
    print(tabulate(rows, headers=["the first unit of", "is read by"]), end="\n\n")
    rows = [[weight, ", ".join(reached(graph, weight)) or "the output"] for weight in units.sites]
    print(tabulate(rows, headers=["the output of", "gets to"], maxcolwidths=[None, 70]))

    headline("What lies between blocks.0.conv1 and blocks.1.conv1?")
    print(" → ".join(between(graph, "blocks.0.conv1.weight", "blocks.1.conv1.weight")))

    headline("How deep is it?")
    shortest, longest = depths(graph, "images", "output")
    print(f"From images to logits, the shortest path has {shortest} weights, the longest {longest}.")

    headline("Which weights does every path pass?")
    print(", ".join(bottlenecks(graph, "images")))

    headline("What did passes insert?")
    inserted = Counter((data["pass"], data["role"]) for _, data in graph.nodes(data=True) if data["pass"])
    print(tabulate([(*key, count) for key, count in inserted.items()], headers=["pass", "role", "nodes"]))

    path = Path("residual.gexf")
    networkx.write_gexf(graph, path)
    again = networkx.read_gexf(path)
    print(f"\n{path} has {again.number_of_nodes()} nodes and {again.number_of_edges()} edges")


if __name__ == "__main__":
    main()
