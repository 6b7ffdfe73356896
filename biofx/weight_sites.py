"""Weight sites: which parameters are synapses, and which of their axes are presynaptic and postsynaptic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from biofx.capture.islands import is_island, island_path, island_weights
from biofx.chain import attribute, callee, chain, evaluate, parameter_nodes
from biofx.depth import depths, reaching
from biofx.island_weights import Role, role, roles
from biofx.provenance import Slot, inserted, record_of, transformed


@dataclass(frozen=True)
class Operator:
    """How a PyTorch operator consumes a weight.

    Attributes:
        name: the operator's name in tables.
        presynaptic_axis: axis of the weight that runs over presynaptic units (within one group, if there are groups).
        postsynaptic_axis: axis of the weight that runs over postsynaptic units.
        channel_axis: axis of the output that runs over postsynaptic units, counted from the end.
        groups: position of the number of groups among the arguments, if the operator has groups.
        weight: position of the weight among the arguments; the bias follows it.
    """

    name: str
    presynaptic_axis: int
    postsynaptic_axis: int
    channel_axis: int
    groups: int | None = None
    weight: int = 1

    def argument(self, node: fx.Node, position: int | None, name: str, default: Any = None) -> Any:
        """An argument of a call of this operator, given by position or by name."""
        if position is not None and position < len(node.args):
            return node.args[position]
        return node.kwargs.get(name, default)


OPERATORS: dict[Callable[..., Any], Operator] = {F.linear: Operator("linear", 1, 0, channel_axis=-1)}
for _n in (1, 2, 3):
    OPERATORS[getattr(F, f"conv{_n}d")] = Operator(f"conv{_n}d", 1, 0, channel_axis=-1 - _n, groups=6)
    OPERATORS[getattr(F, f"conv_transpose{_n}d")] = Operator(
        f"conv_transpose{_n}d", 0, 1, channel_axis=-1 - _n, groups=6
    )


NOT_A_SYNAPSE = "one value for each unit, not a synapse"


@dataclass(frozen=True, eq=False)
class WeightSite:
    """A parameter used as synaptic weights by an operator.

    Attributes:
        bio: the transformed model.
        name: the parameter's name in the original model; the first one, if it is tied to others.
        node: the `get_attr` node of the stored parameter.
        operator: the operator that consumes the weight.
        groups: number of groups into which the operator divides its units.
        uses: the calls of the operator, several if the weight is used more than once; and the calls of islands (modules
            whose Python forward is called as it is), inside of which it is used.
        depth: number of weights that a signal passes before this one, on the longest path, over that of the deepest
            weight: from 0 for the first to 1 for the last; 0 if all are first.
        is_output: whether no signal passes another weight after this one.
    """

    bio: fx.GraphModule = field(repr=False)
    name: str
    node: fx.Node
    operator: Operator
    groups: int
    uses: tuple[fx.Node, ...]
    depth: float
    is_output: bool

    @property
    def calls(self) -> tuple[fx.Node, ...]:
        """The uses that are calls of the operator in the graph."""
        return tuple(use for use in self.uses if not is_island(use))

    @property
    def island(self) -> str | None:
        """Path of the first island inside of which the weight is used, or None; empty for the model itself.

        Operators inside an island, their inputs, outputs and biases are not in the graph.
        """
        return next((island_path(use) for use in self.uses if is_island(use)), None)

    @property
    def raw(self) -> nn.Parameter:
        """The stored parameter: shape (Γ, *shape) if the weight is split into Γ synapses, else just shape."""
        return attribute(self.bio, self.name)  # type: ignore[no-any-return]

    def synaptic(self) -> Tensor:
        """Weight of every synapse, in the shape of `raw`: the stored one under its sign constraint, differentiable."""
        nodes = [n for n in self.chain if (origin := inserted(n)) is None or origin.slot <= Slot.SIGN]
        return evaluate(self.bio, nodes)

    def effective(self) -> Tensor:
        """The tensor that the operator receives, differentiable in `raw`."""
        return evaluate(self.bio, self.chain)

    @property
    def gain(self) -> Tensor | None:
        """Learning gain c of every synapse, broadcastable to `raw`; None if every synapse learns alike."""
        return self.state("gain")

    @property
    def sign(self) -> Tensor | None:
        """Sign +1 or −1 of the unit behind every synapse, 0 if it is free, broadcastable to `raw`; None if all are."""
        return self.state("sign")

    @property
    def synapses(self) -> int:
        """Γ, the number of synapses for each connection."""
        return self.raw.shape[0] if self.is_split else 1

    @property
    def is_split(self) -> bool:
        """Whether `raw` has a leading axis of synapses."""
        return any(origin is not None and origin.slot is Slot.SUM for origin in map(inserted, self.chain))

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight without its axis of synapses."""
        return self.raw.shape[1:] if self.is_split else self.raw.shape

    @property
    def presynaptic_axis(self) -> int:
        """Axis of the weight, as in the original model, that runs over presynaptic units."""
        return self.operator.presynaptic_axis

    @property
    def postsynaptic_axis(self) -> int:
        """Axis of the weight, as in the original model, that runs over postsynaptic units."""
        return self.operator.postsynaptic_axis

    @property
    def units(self) -> int:
        """Number of postsynaptic units."""
        # A transposed convolution's weight has its presynaptic units first, and the postsynaptic ones of one group.
        return self.shape[self.postsynaptic_axis] * (self.groups if self.presynaptic_axis == 0 else 1)

    @property
    def presynaptic_units(self) -> int:
        """Number of presynaptic units."""
        return self.shape[self.presynaptic_axis] * (self.groups if self.presynaptic_axis == 1 else 1)

    def spread_presynaptic(self, values: Tensor) -> Tensor:
        """Values of the presynaptic units, shape (presynaptic_units,), on the axes of the weight, to be broadcast."""
        if self.presynaptic_axis == 1:
            grouped = values.view(self.groups, 1, -1)
            if self.groups > 1:
                grouped = grouped.expand(-1, self.shape[0] // self.groups, -1)
            values = grouped.flatten(0, 1)
        return values.reshape(*values.shape, *[1] * (len(self.shape) - values.dim()))

    def outgoing(self, values: Tensor) -> Tensor:
        """Values on the weight, by the presynaptic unit: shape (presynaptic_units, outgoing connections of each)."""
        if self.presynaptic_axis == 1:
            values = values.reshape(self.groups, -1, self.shape[1], self.shape[2:].numel()).movedim(2, 1)
        return values.reshape(self.presynaptic_units, -1)

    def incoming(self, values: Tensor) -> Tensor:
        """Values on the weight, by the postsynaptic unit: shape (units, incoming connections of each)."""
        if self.presynaptic_axis == 0:
            values = values.reshape(self.groups, -1, self.shape[1], self.shape[2:].numel()).movedim(2, 1)
        return values.reshape(self.units, -1)

    def from_incoming(self, rows: Tensor) -> Tensor:
        """Values on the weight, from those of `incoming`."""
        if self.presynaptic_axis == 0:
            rows = rows.view(self.groups, self.shape[1], -1, self.shape[2:].numel()).movedim(1, 2)
        return rows.reshape(self.shape)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the postsynaptic units, shape (units,), on the axes of the weight, to be broadcast against it."""
        if self.presynaptic_axis == 0:
            grouped = values.view(self.groups, 1, -1).expand(-1, self.shape[0] // self.groups, -1)
            values = grouped.reshape(self.shape[0], -1)
        return values.reshape(*values.shape, *[1] * (len(self.shape) - values.dim()))

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """What the calls return to the model: they themselves, or the last of the nodes that passes put behind them."""
        return tuple(_last_output(use) for use in self.calls)

    @property
    def chain(self) -> list[fx.Node]:
        """The nodes from the stored parameter to the tensor that the operator receives."""
        return chain(self.node)

    @property
    def passes(self) -> tuple[str, ...]:
        """Names of the passes that changed this weight."""
        return tuple(run.pass_.name for run in record_of(self.bio).passes if self.name in run.weights)

    def state_name(self, key: str) -> str:
        """Name of the buffer that holds `key` for this weight."""
        return f"{self.name}_{key}"

    def state(self, key: str) -> Tensor | None:
        """State that a pass keeps for this weight, or None."""
        name = self.state_name(key)
        return attribute(self.bio, name) if name in record_of(self.bio).state else None


def weight_sites(bio: nn.Module) -> dict[str, WeightSite]:
    """The weight sites of a transformed model.

    Args:
        bio: a model made by `biofx.transform`, bare or inside `torch.compile` or a data-parallel wrapper.

    Returns:
        The sites by the parameter's name in the original model, in the order of its parameters. Weights that were
        left alone are in it if an operator is known to use them as synapses; see `summary` for the reasons.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(3, 2), [passes.SplitSynapses(synapses=4)])
        >>> site = biofx.weight_sites(bio)["weight"]
        >>> site.raw.shape, site.effective().shape, site.synapses
        (torch.Size([4, 2, 3]), torch.Size([2, 3]), 4)
    """
    return find(transformed(bio))[0]


def l1(bio: nn.Module) -> Tensor:
    r"""Sum of the magnitudes of all effective weights, a differentiable scalar to add to a loss.

    $$L_1 = \sum_{\text{sites}} \sum_{ij} |w_{ij}|$$

    with $w$ the tensor that the operator receives, not the synapses that it is made of. The reference package sums its
    own learning-rate factors instead, and under `no_grad`.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(3, 2), [passes.SplitSynapses()])
        >>> bool(torch.isclose(biofx.l1(bio), biofx.weight_sites(bio)["weight"].effective().abs().sum()))
        True
    """
    return torch.stack([site.effective().abs().sum() for site in weight_sites(bio).values()]).sum()


def find(bio: fx.GraphModule) -> tuple[dict[str, WeightSite], dict[str, str]]:
    """The weight sites, and for every other parameter the reason why it is none."""
    nodes = parameter_nodes(bio)
    ends = {name: chain(node)[-1] for name, node in nodes.items()}
    uses = {name: _uses(bio, end) for name, end in ends.items()}
    counts = Counter(use.node for found in uses.values() for use in found if is_island(use.node))
    operators = {use.node: counts.get(use.node, 1) for found in uses.values() for use in found}
    before, followed = depths(bio.graph, operators), reaching(bio.graph, operators)
    place: Counter[fx.Node] = Counter()  # weights of an island stand in the order of its parameters
    depth: dict[str, int] = {}
    for name, found in uses.items():
        for use in found:
            depth[name] = max(depth.get(name, 0), before[use.node] + place[use.node])
        place.update(use.node for use in found if is_island(use.node))
    deepest = max(1, *depth.values(), 0)
    inside = _inside_called_modules(bio)
    sites: dict[str, WeightSite] = {}
    others: dict[str, str] = {}
    for name, parameter in bio.named_parameters():
        reason = _why_no_site(parameter, ends.get(name), uses.get(name, []), inside.get(id(parameter)))
        if reason is not None:
            others[name] = reason
            continue
        first = min(uses[name], key=lambda use: is_island(use.node))
        calls = tuple(dict.fromkeys(use.node for use in uses[name]))
        is_output = not any(call in followed for call in calls)
        sites[name] = WeightSite(
            bio, name, nodes[name], first.operator, first.groups, calls, depth[name] / deepest, is_output
        )
    return sites, others


@dataclass(frozen=True)
class Use:
    """A call that consumes a weight.

    Attributes:
        node: the call, of an operator or of an island.
        operator: the operator that consumes the weight.
        groups: number of groups into which the operator divides its units.
    """

    node: fx.Node
    operator: Operator
    groups: int

    @property
    def axes(self) -> tuple[int, int, int]:
        """What all uses of a weight have to agree on."""
        return self.operator.presynaptic_axis, self.operator.postsynaptic_axis, self.groups


def _uses(bio: fx.GraphModule, weight: fx.Node) -> list[Use]:
    """The calls that consume a node as their weight."""
    result = []
    for user in weight.users:
        operator = OPERATORS.get(user.target) if user.op == "call_function" else None  # type: ignore[arg-type]
        if operator is not None and operator.argument(user, operator.weight, "weight") is weight:
            result.append(Use(user, operator, operator.argument(user, operator.groups, "groups", 1)))
        elif is_island(user):
            result += _uses_inside(bio, user, weight)
    return result


def _uses_inside(bio: fx.GraphModule, island: fx.Node, weight: fx.Node) -> list[Use]:
    """The uses of a weight inside an island: one for each module that owns it."""
    result = []
    for name in [name for name, end in island_weights(island).items() if end is weight]:
        path, _, key = f"{island_path(island)}.{name}".lstrip(".").rpartition(".")
        found = role(bio.get_submodule(path), key)
        if isinstance(found, Role):
            operator = Operator(found.operator, found.presynaptic_axis, found.postsynaptic_axis, found.channel_axis)
            result.append(Use(island, operator, found.groups))
    return result


def _inside_called_modules(bio: fx.GraphModule) -> dict[int, str]:
    """For every parameter of a module that the graph calls as it is, by id: which module that is, and why no site."""
    result: dict[int, str] = {}
    for path in record_of(bio).islands:
        island = bio.get_submodule(path)
        where = f"{path} ({type(island).__name__})" if path else "the model"
        for parameter, why in roles(island).values():
            if isinstance(why, str):
                result.setdefault(id(parameter), f"inside {where}, an island: {why}")
    for path in dict.fromkeys(str(node.target) for node in bio.graph.find_nodes(op="call_module")):
        module = bio.get_submodule(path)
        for parameter in module.parameters():
            called = f"inside {path} ({type(module).__name__}), which is called as it is"
            result.setdefault(id(parameter), f"{called}: biofx has no operator for its weights")
    return result


def _why_no_site(parameter: nn.Parameter, end: fx.Node | None, uses: list[Use], inside: str | None) -> str | None:
    """Why a parameter is no weight site, or None if it is one."""
    if not uses and (parameter.dim() < 2 or (end is not None and _is_bias(end))):
        return NOT_A_SYNAPSE
    if inside is not None:
        return inside
    if end is None:
        return "not used in forward"
    for user in end.users:
        if user.op == "call_method" and str(user.target).endswith("_") and not str(user.target).endswith("__"):
            return f"forward changes it in place, by {user.target}"
        if user.target is getattr and user.args[1:] == ("data",):
            return "forward takes its .data, which no graph can follow"
    if not uses:
        users = sorted({callee(user) for user in end.users})
        return f"used by {', '.join(users)}, which biofx does not know as an operator on weights"
    if len({use.axes for use in uses}) > 1:
        described = sorted({f"{use.operator.name} with groups={use.groups}" for use in uses})
        return f"shared by operators that want different axes: {', '.join(described)}"
    return None


def _is_bias(end: fx.Node) -> bool:
    """Whether operators take a parameter as their bias; one that was split has two axes."""
    operators = [(user, OPERATORS.get(user.target)) for user in end.users]  # type: ignore[arg-type]
    return any(op is not None and op.argument(user, op.weight + 1, "bias") is end for user, op in operators)


def _last_output(node: fx.Node) -> fx.Node:
    while True:
        behind = [n for n in node.users if (origin := inserted(n)) is not None and origin.slot is Slot.OUTPUT]
        if len(behind) != 1:
            return node
        node = behind[0]
