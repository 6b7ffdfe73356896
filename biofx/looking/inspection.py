"""Inspection: tables of a transformed model's weights and nodes, and its graph for networkx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from biofx.analysis.sites import WeightSite, find_weights
from biofx.base.errors import ArgumentError
from biofx.base.tables import Cell, Report, Table, wrapped
from biofx.looking.roles import role_of
from biofx.looking.view import written_shape
from biofx.model.chain import callee, module_of, parameter_nodes
from biofx.model.changes import transformed
from biofx.model.provenance import inserted, record_of
from biofx.model.synapses import State, synapses_in
from biofx.weights.facts import NOT_A_SYNAPSE, Need

if TYPE_CHECKING:
    import networkx

    from biofx.rewrite.registry import Pass

HEADERS = ("weight", "operator", "shape", "Γ", "gain", "sign", "left alone", "remark")
USUAL = {"Γ": "1", "gain": "1", "sign": "free"}
LIMITS = {"operator": 24, "gain": 15, "sign": 10}  # widths in a table that is too wide
NAMES = 6  # of a longer list, the text gives the number and the first few


def summary(bio: nn.Module) -> Report:
    """The passes that ran, and a table with one row for each weight.

    Columns: the weight's name; its operator, and the island that contains it, if any; its shape, without the axis of
    synapses; Γ, the number of synapses for each connection; mean, standard deviation and range of what gradient hooks
    multiply learning by; the sign constraint; and, if there are any, the passes that left the weight alone, with the
    reason, and remarks of passes, among them why the units that the weight reads cannot be judged. A column in which
    all weights are as without biofx is omitted. Long notes of a wide table are numbered and stand below it. Lists
    follow: the islands (untraced submodules) and the weights that no pass could see, each with the reason; the weights
    that wait for `biofx.attach`; the memory that synapses take; and the parameters that are not synapses.

    Args:
        bio: a model made by `biofx.transform`.

    Returns:
        A text. Its `rows` are the table as data, a dict for each weight, and `to_dict()` is all that it says, with
        lists that the text shortens. A notebook shows it as a table.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        >>> summary = biofx.summary(biofx.transform(model, [passes.SplitSynapses(synapses=4)], exclude="2.*"))
        >>> print(summary)
        passes: split-synapses{synapses=4}
        <BLANKLINE>
        weight    operator    shape    Γ    left alone
        --------  ----------  -------  ---  -----------------------------------------
        0.weight  linear      8 × 4    4
        2.weight  linear      2 × 8    1    split-synapses: excluded by pattern "2.*"
        <BLANKLINE>
        inputs with which the model ran: guessed: input float32 (2, 4)
        <BLANKLINE>
        memory: 384 bytes more than the model's 368 (+104 %)
        <BLANKLINE>
        not synapses: 0.bias, 1.weight, 1.bias, 2.bias
        >>> [row["synapses"] for row in summary.rows]
        [4, 1]
    """
    bio = transformed(bio)
    record = record_of(bio)
    sites, others = find_weights(bio)
    unseen = {name: reason for name, reason in others.items() if reason != NOT_A_SYNAPSE}
    plain = [name for name, reason in others.items() if reason == NOT_A_SYNAPSE]
    acting = {name for run in record.passes if run.pass_.acts_at_step for name in run.weights}
    acting |= {name for name, site in sites.items() if site.child is not None and site.child.attached}
    idle = [name for name in sites if name in acting - record.attached and not record.by_hand]
    added, total = _memory(bio)
    rows = [_row(site) for site in sites.values()]
    parts: list[Table | str] = ["passes: " + ",\n        ".join(str(run.pass_) for run in record.passes)]
    parts.append(Table(HEADERS, [_cells(row) for row in rows], LIMITS, USUAL))
    parts += [wrapped(note) for run in record.passes if (note := _function_note(run.pass_))]
    if record.inputs not in ("", "given"):
        parts.append(wrapped(f"inputs with which the model ran: {record.inputs}"))
    parts += map(wrapped, record.notes)
    if record.islands:
        title = "islands (untraced submodules; passes rewrite the weights inside):"
        parts.append("\n".join([title, *(_island(bio, path, why) for path, why in record.islands.items())]))
    if unseen:
        parts.append("\n".join(["left alone:", *(wrapped(f"  {name}: {why}") for name, why in unseen.items())]))
    if idle:
        parts.append(_listed("no optimizer is attached, so no rule acts at its steps (biofx.attach)", idle))
    if record.nonnegative:
        parts.append(_listed("scale parameters kept from being negative", [*record.nonnegative]))
    if added:
        more = f"{100 * added / total:.0f}" if total else "∞"
        parts.append(
            f"memory: {_bytes(added)} more than the model's {_bytes(total).removesuffix(' bytes')} (+{more} %)"
        )
    if plain:
        parts.append(_listed("not synapses", plain))
    return Report(
        parts,
        rows,
        passes=[str(run.pass_) for run in record.passes],
        inputs=record.inputs,
        notes=list(record.notes),
        islands=dict(record.islands),
        left_alone=unseen,
        not_attached=idle,
        nonnegative=dict(record.nonnegative),
        bytes_added=added,
        bytes_of_model=total,
        not_synapses=plain,
    )


def _memory(bio: fx.GraphModule) -> tuple[int, int]:
    """The bytes that synapses and their state take beyond one number for each connection, and those of the model."""
    added = 0
    for synapses in set(synapses_in(bio).values()):
        added += sum(
            _size(each) for each in (*synapses.buffers(), *synapses.parameters()) if each is not synapses.stored
        )
        if synapses.is_split:
            added += _size(synapses.stored[1:])
    return added, sum(map(_size, (*bio.parameters(), *bio.buffers()))) - added


def _size(tensor: torch.Tensor) -> int:
    return 0 if tensor.layout is not torch.strided or tensor.is_nested else tensor.numel() * tensor.element_size()


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _function_note(pass_: Pass) -> str:
    """A sentence on a pass that may change what the model computes; empty for other passes."""
    if pass_.preserves_function:
        return ""
    return f"{pass_.name} changes what the model computes" + (f"; {pass_.instead}" if pass_.instead else "")


def _listed(title: str, names: Sequence[str]) -> str:
    if len(names) <= NAMES:
        return wrapped(f"{title}: {', '.join(names)}")
    return wrapped(f"{title}: {', '.join(names[: NAMES // 2])}, … ({len(names)} in all)")


def _island(bio: fx.GraphModule, path: str, reason: str) -> str:
    name = type(bio.get_submodule(path)).__name__
    return wrapped(f"  {path} ({name}): {reason}" if path else f"  the model ({name}): {reason}")


def _row(site: WeightSite) -> dict[str, Any]:
    """What a summary says of a weight, as data."""
    runs = record_of(site.bio).passes
    unjudged = site.unmet(Need.UNITS) or ""
    gain, sign = site.factor, site.sign
    values = None if gain is None or gain.numel() == 0 else gain.detach().double()
    return {
        "weight": site.name,
        "frozen": not site.raw.requires_grad,
        "operator": site.operator,
        "uses": site.facts.uses,
        "inside": site.island if site.island is not None else site.surroundings,
        "shape": tuple(site.shape),
        "synapses": site.synapses,
        "gain_mean": 1.0 if values is None else float(values.mean()),
        "gain_std": 0.0 if values is None else float(values.std(correction=0)),
        "gain_min": 1.0 if values is None else float(values.min()),
        "gain_max": 1.0 if values is None else float(values.max()),
        "excitatory": None if sign is None else float((sign > 0).double().mean()),
        "free": None if sign is None else float((sign == 0).double().mean()),
        "left_alone": {run.pass_.name: run.left[site.name] for run in runs if site.name in run.left},
        "remarks": {run.pass_.name: run.remarks[site.name] for run in runs if site.name in run.remarks},
        "not_judged": unjudged,
    }


def _cells(row: Mapping[str, Any]) -> list[Cell]:
    """The cells of a row."""
    left = [f"{name}: {reason}" for name, reason in row["left_alone"].items()]
    remarks = [f"{name}: {remark}" for name, remark in row["remarks"].items()]
    if row["not_judged"] and not any(row["not_judged"] in reason for reason in row["left_alone"].values()):
        remarks.append(f"not judged: {row['not_judged']}")
    times = f" × {row['uses']}" if row["uses"] > 1 else ""
    inside = "" if row["inside"] is None else f", in {row['inside']}"
    return [
        row["weight"] + (" (frozen)" if row["frozen"] else ""),
        row["operator"] + times + inside,
        written_shape(row["shape"]),
        str(row["synapses"]),
        _gain(row),
        _signs(row),
        left,
        remarks,
    ]


def _gain(row: Mapping[str, Any]) -> str:
    if row["gain_min"] == row["gain_max"] == 1:
        return "1"
    return f"{row['gain_mean']:.2f} ± {row['gain_std']:.2f} in [{row['gain_min']:.2f}, {row['gain_max']:.2f}]"


def _signs(row: Mapping[str, Any]) -> str:
    if row["excitatory"] is None:
        return "free"
    return f"{row['excitatory']:.0%} excitatory" + (f", {row['free']:.0%} free" if row["free"] else "")


def table(bio: nn.Module, only: str = "inserted") -> Report:
    """The graph as a table with one row for each node: its name, function and arguments, and the pass that inserted it.

    Some links have no nodes, and are listed last, without a name: those of weights that only the Python of islands
    reads, and those that sleep while an optimizer is attached, because rules then act at its steps.

    Args:
        bio: a model made by `biofx.transform`.
        only: `"inserted"` for the nodes that passes inserted, `"all"` for all nodes.

    Returns:
        A text, whose `rows` are the table as data.

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
        active = {link.name for link in synapses.active_links} if name in shown else set()
        for link in [link for link in synapses.links if link.name not in active]:
            arguments = ", ".join(["…", *(str(arg.key if isinstance(arg, State) else arg) for arg in link.args)])
            rows.append(["", link.name, arguments, name, link.origin.slot.label, link.origin.by])
    headers = ("node", "calls", "arguments", "weight", "slot", "pass")
    return Report([Table(headers, rows)], [dict(zip(headers, row, strict=True)) for row in rows])


def written_arguments(node: fx.Node) -> str:
    """The arguments of a node, as in a call."""
    return ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])


def to_networkx(bio: nn.Module) -> networkx.MultiDiGraph[str]:
    """The graph as a networkx multigraph, in which a node may use another more than once.

    Nodes are named as in the graph. Their attributes are strings: `op`, `calls`, `module` (the path of the module whose
    forward made the node), `role` (as in pictures, such as `original` and `stored weight`), `weight` (the weight's name
    in the original model, for stored weights and inserted nodes), and `pass` (for inserted nodes); what a node does not
    have is empty. The key of an edge, and its attribute `position`, is the argument's position among all inputs of the
    node. GraphML, GEXF and node-link JSON can hold the graph. `examples/graph_questions.py` asks it about reach, depth
    and what lies between layers.

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
    stored = {node: name for name, node in parameter_nodes(bio).items()}
    for node in bio.graph.nodes:
        origin = inserted(node)
        graph.add_node(
            node.name,
            op=node.op,
            calls=callee(node),
            module=module_of(node),
            role=role_of(node, bio).value,
            weight=origin.parameter if origin else stored.get(node, ""),
            **{"pass": origin.by if origin else ""},
        )
        inputs: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), inputs.append)
        for position, source in enumerate(inputs):
            graph.add_edge(source.name, node.name, key=position, position=position)
    return graph
