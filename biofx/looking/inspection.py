"""Inspection: tables of a transformed model's weights and nodes, and its graph for networkx."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from biofx.analysis.sites import WeightSite, find_weights
from biofx.base.errors import ArgumentError
from biofx.base.tables import Cell, Table, wrapped
from biofx.looking.roles import role_of
from biofx.model.chain import callee, parameter_nodes
from biofx.model.provenance import RunnablePass, inserted, record_of, transformed
from biofx.model.synapses import State, synapses_in
from biofx.weights.facts import NOT_A_SYNAPSE, Need

if TYPE_CHECKING:
    import networkx

HEADERS = ("weight", "operator", "shape", "Γ", "gain", "sign", "left alone", "remark")


def summary(bio: nn.Module) -> str:
    """The passes that ran, and a table with one row for each weight.

    Columns: the weight's name; its operator, and the island that contains it, if any; its shape, without the axis of
    synapses; Γ, the number of synapses for each connection; mean, standard deviation and range of the learning gain;
    the sign constraint; and, if there are any, the passes that left the weight alone, with the reason, and remarks of
    passes. Long notes of a wide table are numbered and stand below it. Lists follow: the islands (untraced submodules)
    and the weights that no pass could see, each with the reason; the weights that wait for `biofx.attach`; and the
    parameters that are not synapses.

    Args:
        bio: a model made by `biofx.transform`.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        >>> print(biofx.summary(biofx.transform(model, [passes.SplitSynapses(synapses=4)], exclude="2.*")))
        passes: split-synapses{synapses=4}
        <BLANKLINE>
        weight    operator    shape    Γ    gain    sign    left alone
        --------  ----------  -------  ---  ------  ------  -----------------------------------------
        0.weight  linear      8 × 4    4    1       free
        2.weight  linear      2 × 8    1    1       free    split-synapses: excluded by pattern "2.*"
        <BLANKLINE>
        inputs with which the model ran: guessed: input float32 (2, 4)
        <BLANKLINE>
        not synapses: 0.bias, 1.weight, 1.bias, 2.bias
    """
    bio = transformed(bio)
    record = record_of(bio)
    sites, others = find_weights(bio)
    parts = ["passes: " + ",\n        ".join(str(run.pass_) for run in record.passes)]
    parts.append(str(Table(HEADERS, [_row(site) for site in sites.values()])))
    parts += [wrapped(note) for run in record.passes if (note := _function_note(run.pass_))]
    if record.inputs not in ("", "given"):
        parts.append(wrapped(f"inputs with which the model ran: {record.inputs}"))
    parts += map(wrapped, record.notes)
    if record.islands:
        title = "islands (untraced submodules; passes rewrite the weights inside):"
        parts.append("\n".join([title, *(_island(bio, path, why) for path, why in record.islands.items())]))
    unseen = [wrapped(f"  {name}: {reason}") for name, reason in others.items() if reason != NOT_A_SYNAPSE]
    if unseen:
        parts.append("\n".join(["left alone:", *unseen]))
    acting = {name for run in record.passes if run.pass_.acts_at_step for name in run.weights}
    acting |= {name for name, site in sites.items() if site.learning is not None and site.learning.attached}
    idle = [name for name in sites if name in acting - record.attached and not record.by_hand]
    if idle:
        parts.append(_listed("no optimizer is attached, so no rule acts at its steps (biofx.attach)", idle))
    if record.nonnegative:
        parts.append(_listed("scale parameters kept from being negative", record.nonnegative))
    plain = [name for name, reason in others.items() if reason == NOT_A_SYNAPSE]
    if plain:
        parts.append(_listed("not synapses", plain))
    return "\n\n".join(parts)


def _function_note(pass_: RunnablePass) -> str:
    """A sentence on a pass that may change what the model computes; empty for other passes."""
    if pass_.preserves_function:
        return ""
    return f"{pass_.name} changes what the model computes" + (f"; {pass_.instead}" if pass_.instead else "")


def _listed(title: str, names: Iterable[str]) -> str:
    return wrapped(f"{title}: {', '.join(names)}")


def _island(bio: fx.GraphModule, path: str, reason: str) -> str:
    name = type(bio.get_submodule(path)).__name__
    return wrapped(f"  {path} ({name}): {reason}" if path else f"  the model ({name}): {reason}")


def _row(site: WeightSite) -> list[Cell]:
    runs = record_of(site.bio).passes
    remarks = [f"{run.pass_.name}: {run.remarks[site.name]}" for run in runs if site.name in run.remarks]
    unjudged = site.unmet(Need.UNITS)
    if unjudged and not any(unjudged in reason for run in runs for reason in run.left.values()):
        remarks.append(f"not judged: {unjudged}")
    left = [f"{run.pass_.name}: {run.left[site.name]}" for run in runs if site.name in run.left]
    return [
        site.name if site.raw.requires_grad else f"{site.name} (frozen)",
        _operator(site),
        " × ".join(map(str, site.shape)),
        str(site.synapses),
        _gains(site.gain),
        _signs(site.sign),
        left,
        remarks,
    ]


def _operator(site: WeightSite) -> str:
    times = f" × {site.facts.uses}" if site.facts.uses > 1 else ""
    where = site.island if site.island is not None else site.surroundings
    return site.operator + times + (f", in {where}" if where else "")


def _gains(gain: torch.Tensor | None) -> str:
    if gain is None or gain.numel() == 0:
        return "1"
    values = gain.detach().double()
    deviation = float(values.std(correction=0))
    return f"{float(values.mean()):.2f} ± {deviation:.2f} in [{float(values.min()):.2f}, {float(values.max()):.2f}]"


def _signs(sign: torch.Tensor | None) -> str:
    if sign is None:
        return "free"
    excitatory, free = float((sign > 0).double().mean()), float((sign == 0).double().mean())
    return f"{excitatory:.0%} excitatory" + (f", {free:.0%} free" if free else "")


def table(bio: nn.Module, only: str = "inserted") -> str:
    """The graph as a table with one row for each node: its name, function and arguments, and the pass that inserted it.

    Weights that only the Python of islands reads have no nodes; the links of their chains follow the nodes.

    Args:
        bio: a model made by `biofx.transform`.
        only: `"inserted"` for the nodes that passes inserted, `"all"` for all nodes.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`, or `only` is neither of the two.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(4, 2), [passes.FuzzyLearningRates()])
        >>> print(biofx.table(bio))
        node         calls                 arguments            weight    slot           pass
        -----------  --------------------  -------------------  --------  -------------  --------------------
        weight_gain  weight_synapses.gain                       weight    gradient hook  fuzzy-learning-rates
        scale_grad   biofx.scale_grad      weight, weight_gain  weight    gradient hook  fuzzy-learning-rates
    """
    if only not in ("inserted", "all"):
        raise ArgumentError(f'table: only must be "inserted" or "all", got {only!r}')
    bio = transformed(bio)
    rows: list[list[Cell]] = []
    for node in bio.graph.nodes:
        origin = inserted(node)
        if origin is None and only == "inserted":
            continue
        where = (origin.parameter, origin.slot.label, origin.by) if origin else ("", "", "")
        rows.append([node.name, callee(node), written_arguments(node), *where])
    shown = parameter_nodes(bio)
    for name, synapses in synapses_in(bio).items():
        for link in synapses.links if name not in shown else ():
            arguments = ", ".join(["…", *(str(arg.key if isinstance(arg, State) else arg) for arg in link.args)])
            rows.append(["", link.name, arguments, name, link.origin.slot.label, link.origin.by])
    return str(Table(("node", "calls", "arguments", "weight", "slot", "pass"), rows))


def written_arguments(node: fx.Node) -> str:
    """The arguments of a node, as in a call."""
    return ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])


def to_networkx(bio: nn.Module) -> networkx.MultiDiGraph[str]:
    """The graph as a networkx multigraph, in which a node may use another more than once.

    Nodes are named as in the graph. Their attributes are strings: `op`, `calls`, `module` (the path of the module whose
    forward made the node), `role` (as in pictures, such as `original` and `stored weight`), and `weight` and `pass`,
    which are empty for nodes that no pass inserted. The key of an edge, and its attribute `position`, is the argument's
    position among all inputs of the node. GraphML, GEXF and node-link JSON can hold the graph.

    Args:
        bio: a model made by `biofx.transform`.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(4, 2), [passes.FuzzyLearningRates()])
        >>> graph = biofx.to_networkx(bio)
        >>> list(graph.predecessors("scale_grad"))
        ['weight', 'weight_gain']
    """
    import networkx

    bio = transformed(bio)
    graph: networkx.MultiDiGraph[str] = networkx.MultiDiGraph()
    for node in bio.graph.nodes:
        origin = inserted(node)
        stack = node.meta.get("nn_module_stack", {})
        graph.add_node(
            node.name,
            op=node.op,
            calls=callee(node),
            module=next((path for path, _ in reversed(stack.values())), ""),
            role=role_of(node, bio).value,
            weight=origin.parameter if origin else "",
            **{"pass": origin.by if origin else ""},
        )
        inputs: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), inputs.append)
        for position, source in enumerate(inputs):
            graph.add_edge(source.name, node.name, key=position, position=position)
    return graph
