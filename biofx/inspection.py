"""Looking at a transformed model: as tables and as a networkx graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import fx, nn

from biofx.chain import attribute
from biofx.errors import ArgumentError
from biofx.provenance import inserted, record_of, unwrap
from biofx.weight_sites import NOT_A_SYNAPSE, WeightSite, find

if TYPE_CHECKING:
    import networkx


def summary(bio: nn.Module) -> str:
    """A table with one row for each weight: what it is and what the passes made of it.

    Columns: the weight's name, its operator and its shape (without the axis of synapses), Γ synapses for each
    connection, the range, mean and standard deviation of the learning gain, the sign constraint, and the passes that
    changed it. Below it: every weight that some pass left alone with the reason, and the parameters that are not
    synapses.

    Args:
        bio: a model made by `biofx.transform`.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        >>> print(biofx.summary(biofx.transform(model, [passes.SplitSynapses(synapses=4)], exclude="2.*")))
        weight    operator    shape      Γ  gain    sign    passes
        --------  ----------  -------  ---  ------  ------  --------------------------
        0.weight  linear      8 × 4      4  1       free    split-synapses{synapses=4}
        2.weight  linear      2 × 8      1  1       free    -
        <BLANKLINE>
        left alone:
          2.weight: split-synapses: excluded by the pattern "2.*"
        <BLANKLINE>
        not synapses: 0.bias, 1.weight, 1.bias, 2.bias
    """
    bio = unwrap(bio)
    record = record_of(bio)
    assert isinstance(bio, fx.GraphModule)
    sites, others = find(bio)
    rows = [_row(site) for site in sites.values()]
    headers = ["weight", "operator", "shape", "Γ", "gain", "sign", "passes"]
    parts = [tabulate(rows, headers=headers, disable_numparse=[4])]
    left = [f"{name}: {run.pass_.name}: {why}" for run in record.passes for name, why in run.left.items()]
    left += [f"{name}: {why}" for name, why in others.items() if why != NOT_A_SYNAPSE]
    if left:
        parts.append("left alone:\n" + "\n".join(f"  {line}" for line in left))
    plain = [name for name, why in others.items() if why == NOT_A_SYNAPSE]
    if plain:
        parts.append(f"not synapses: {', '.join(plain)}")
    return "\n\n".join(parts)


def _row(site: WeightSite) -> list[Any]:
    runs = [str(run.pass_) for run in record_of(site.bio).passes if site.name in run.weights]
    return [
        site.name if site.raw.requires_grad else f"{site.name} (frozen)",
        site.operator.name + (f" × {len(site.uses)}" if len(site.uses) > 1 else ""),
        " × ".join(map(str, site.shape)),
        site.synapses,
        _spread(site.gain),
        _signs(site.sign),
        ", ".join(runs) or "-",
    ]


def _spread(gain: torch.Tensor | None) -> str:
    if gain is None:
        return "1"
    values = gain.detach().double()
    deviation = float(values.std(correction=0))
    return f"{float(values.mean()):.2f} ± {deviation:.2f} in [{float(values.min()):.2f}, {float(values.max()):.2f}]"


def _signs(sign: torch.Tensor | None) -> str:
    return "free" if sign is None else f"{float((sign > 0).double().mean()):.0%} excitatory"


def table(bio: nn.Module, only: str = "inserted") -> str:
    """The graph as a table with one row for each node: its name, what it calls, its inputs and where it comes from.

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
        node         calls             inputs               weight    slot           pass
        -----------  ----------------  -------------------  --------  -------------  --------------------
        weight_gain  weight_gain                            weight    gradient hook  fuzzy-learning-rates
        scale_grad   biofx.scale_grad  weight, weight_gain  weight    gradient hook  fuzzy-learning-rates
    """
    if only not in ("inserted", "all"):
        raise ArgumentError(f'table: only must be "inserted" or "all", got {only!r}')
    bio = unwrap(bio)
    record_of(bio)
    assert isinstance(bio, fx.GraphModule)
    rows = []
    for node in bio.graph.nodes:
        origin = inserted(node)
        if origin is None and only == "inserted":
            continue
        inputs = ", ".join(str(n) for n in node.all_input_nodes)
        where = (origin.parameter, origin.slot.label, origin.by) if origin else ("", "", "")
        rows.append([node.name, callee(node), inputs, *where])
    return tabulate(rows, headers=["node", "calls", "inputs", "weight", "slot", "pass"], disable_numparse=True)


def callee(node: fx.Node) -> str:
    """What a node calls or reads, as a short name."""
    if isinstance(node.target, str):
        return node.target
    name = getattr(node.target, "_qualified_op_name", None)  # of a dispatcher operator
    if name is not None:
        return str(name).replace("::", ".")
    return str(getattr(node.target, "__name__", node.target))


def role(node: fx.Node, bio: fx.GraphModule) -> str:
    """What a node is for: `original`, `weight`, or the slot in which a pass inserted it."""
    origin = inserted(node)
    if origin is not None:
        return origin.slot.label
    is_weight = node.op == "get_attr" and isinstance(attribute(bio, str(node.target)), nn.Parameter)
    return "weight" if is_weight else "original"


def to_networkx(bio: nn.Module) -> networkx.MultiDiGraph[str]:
    """The graph as a networkx multigraph: a node may use another more than once.

    Nodes are named as in the graph. Their attributes are all strings: `op`, `calls`, `module` (path of the module whose
    forward made the node), `role` (`original`, `weight`, or the slot), and `weight` and `pass` for inserted nodes, else
    empty. The key of an edge is the argument's position among all inputs of the node, and is repeated as its attribute
    `position`. GraphML and node-link JSON take it as it is.

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

    bio = unwrap(bio)
    record_of(bio)
    assert isinstance(bio, fx.GraphModule)
    graph: networkx.MultiDiGraph[str] = networkx.MultiDiGraph()
    for node in bio.graph.nodes:
        origin = inserted(node)
        stack = node.meta.get("nn_module_stack", {})
        graph.add_node(
            node.name,
            op=node.op,
            calls=callee(node),
            module=next((path for path, _ in reversed(stack.values())), ""),
            role=role(node, bio),
            weight=origin.parameter if origin else "",
            **{"pass": origin.by if origin else ""},
        )
        inputs: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), inputs.append)
        for position, source in enumerate(inputs):
            graph.add_edge(source.name, node.name, key=position, position=position)
    return graph
