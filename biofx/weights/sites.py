"""Weight sites: which parameters are synapses, and which of their axes are presynaptic and postsynaptic."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from biofx import parts
from biofx.chain import attribute, callee, chain, evaluate, parameter_nodes
from biofx.islands import described, is_island, island_path
from biofx.operator_kinds import Kind, operation
from biofx.provenance import Slot, inserted, record_of, transformed
from biofx.weights.axes import Axes
from biofx.weights.depth import depths, reaching
from biofx.weights.operators import PRE, is_operator
from biofx.weights.paths import Dependence, Use, Uses, follow
from biofx.weights.roles import roles, why_unfit

NOT_A_SYNAPSE = "one value for each unit, not a synapse"


@dataclass(frozen=True, eq=False)
class WeightSite:
    """A parameter used as synaptic weights by an operator.

    Attributes:
        bio: the transformed model.
        name: the parameter's name in the original model; the first one, if it is tied to others.
        node: the `get_attr` node of the stored parameter.
        calls: the calls of operators that consume it, several if the weight is used more than once.
        inside: its uses inside of islands, modules whose Python forward is called as it is, and of parts, which have
            graphs of their own: there, operators, their inputs, outputs and biases are not in the graph.
        depth: number of weights that a signal passes before this one, on the longest path, over that of the deepest
            weight: from 0 for the first to 1 for the last; 0 if all are first.
        is_output: whether no signal passes another weight after this one.
    """

    bio: fx.GraphModule = field(repr=False)
    name: str
    node: fx.Node
    calls: tuple[Use, ...]
    inside: tuple[Use, ...]
    depth: float
    is_output: bool

    @property
    def operator(self) -> str:
        """Name of the operator that consumes the weight; of all, joined by ", ", if there are several."""
        return ", ".join(dict.fromkeys(use.call.name for use in self._all))

    @cached_property
    def _all(self) -> tuple[Use, ...]:
        return (*self.calls, *self.inside)

    @property
    def uses(self) -> tuple[fx.Node, ...]:
        """The calls of the operator and of islands, as nodes."""
        return tuple(dict.fromkeys(use.node for use in self._all))

    @property
    def groups(self) -> int:
        """Number of groups into which the operator divides an axis of units."""
        return self._all[0].call.groups

    @property
    def island(self) -> str | None:
        """Path of the first island inside of which the weight is used, or None; empty for the model itself."""
        return next((island_path(use.node) for use in self.inside if is_island(use.node)), None)

    @property
    def surroundings(self) -> str | None:
        """What the weight is used inside of, in words: an island, a part of the model, a call of a recurrent layer."""
        if not self.inside:
            return None
        node = self.inside[0].node
        return f"one call of {self.operator}" if is_operator(node) else _described(self.bio, node)

    @property
    def why_out_of_reach(self) -> str | None:
        """Why what all its operators return cannot be had, or None if it can."""
        if self.surroundings is None:
            return None
        return f"it is in {self.surroundings}, so what its operator returns is out of reach"

    @property
    def raw(self) -> nn.Parameter:
        """The stored parameter: shape (Γ, *shape) if the weight is split into Γ synapses, else just shape."""
        return attribute(self.bio, self.name)  # type: ignore[no-any-return]

    def synaptic(self) -> Tensor:
        """Weight of every synapse, in the shape of `raw`: the stored one under its sign constraint, differentiable."""
        nodes = [n for n in self.chain if (origin := inserted(n)) is None or origin.slot <= Slot.SIGN]
        return evaluate(self.bio, nodes)

    def effective(self) -> Tensor:
        """What takes the parameter's place in the original model, differentiable in `raw`.

        That is what the operator receives, unless the original model itself transposes, casts or scales the parameter
        on the way.
        """
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
        return _is_split(self.chain)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight without its axis of synapses."""
        return self.raw.shape[1:] if self.is_split else self.raw.shape

    @cached_property
    def axes(self) -> Axes | None:
        """The axes of the weight, as in the original model, or None if its uses do not agree on them."""
        first = self._all[0].axes
        agree = first is not None and all(u.axes is not None and first.agree(u.axes) for u in self._all)
        return first if agree else None

    @property
    def why_no_axes(self) -> str | None:
        """Why units cannot be told apart by the axes of the weight, or None if they can."""
        if self.axes is not None:
            return None
        unclear = next((use for use in self._all if use.axes is None), None)
        if unclear is not None and unclear.mixes:
            return unclear.mixes
        if unclear is not None:
            by = ", ".join(callee(step.node) for step in unclear.path)
            return f"which of its axes run over units is lost on the way to {unclear.call.name} (by {by})"
        kinds = dict.fromkeys(f"{use.call.name} ({use.axes})" for use in self._all)
        return f"shared by operators that want different axes: {', '.join(kinds)}"

    @property
    def why_no_source(self) -> str | None:
        """Why its signs are not those with which presynaptic units act, or None if they are."""
        if self.why_no_axes is not None:
            return self.why_no_axes
        is_modulated = any(use.call.roles.count(PRE) > 1 for use in self.inside)
        if is_modulated or any(use.call.source is None for use in self.calls):
            return f"{self.operator} multiplies several activations, so no unit acts with the sign of a weight"
        return next((use.remark for use in self._all if use.remark), None)

    @property
    def why_no_output(self) -> str | None:
        """Why what its operator returns does not have its units on an axis, or None if it has."""
        if self.why_out_of_reach is not None or self.why_no_axes is not None:
            return self.why_out_of_reach or self.why_no_axes
        if any(len(use.call.output_axes) != 1 for use in self.calls):
            return f"{self.operator} does not return its units on one axis"
        if any(use.call.units != self.units for use in self.calls):
            return "each of its uses has a part of its units"
        return None

    @property
    def known_axes(self) -> Axes:
        """The axes of the weight.

        Raises:
            ValueError: its uses do not agree on them.
        """
        if self.axes is None:
            raise ValueError(f"{self.name}: {self.why_no_axes}")
        return self.axes

    @property
    def presynaptic_axis(self) -> int | None:
        """Axis of the weight, as in the original model, that runs over presynaptic units; None if there is not one."""
        return _only(None if self.axes is None else self.axes.presynaptic)

    @property
    def postsynaptic_axis(self) -> int | None:
        """Axis of the weight, as in the original model, that runs over postsynaptic units; None if there is not one."""
        return _only(None if self.axes is None else self.axes.postsynaptic)

    @property
    def units(self) -> int:
        """Number of postsynaptic units."""
        return self.known_axes.units

    @property
    def presynaptic_units(self) -> int:
        """Number of presynaptic units."""
        return self.known_axes.presynaptic_units

    def spread_presynaptic(self, values: Tensor) -> Tensor:
        """Values of the presynaptic units, shape (presynaptic_units,), on the axes of the weight, to be broadcast."""
        return self.known_axes.spread_presynaptic(values)

    def outgoing(self, values: Tensor) -> Tensor:
        """Values on the weight, by the presynaptic unit: shape (presynaptic_units, outgoing connections of each)."""
        return self.known_axes.outgoing(values)

    def incoming(self, values: Tensor) -> Tensor:
        """Values on the weight, by the postsynaptic unit: shape (units, incoming connections of each)."""
        return self.known_axes.incoming(values)

    def from_incoming(self, rows: Tensor) -> Tensor:
        """Values on the weight, from those of `incoming`."""
        return self.known_axes.from_incoming(rows)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the postsynaptic units, shape (units,), on the axes of the weight, to be broadcast against it."""
        return self.known_axes.spread(values)

    @property
    def padding(self) -> int | None:
        """Row of the weight that does not learn, as it stands for no token, or None."""
        rows = {use.call.padding if use.is_direct else None for use in self._all}
        return rows.pop() if len(rows) == 1 else None

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """What the calls return to the model: they themselves, or the last of the nodes that passes put behind them."""
        return tuple(_last_output(use.node) for use in self.calls)

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
    sums = [site.effective().abs().sum() for site in weight_sites(bio).values()]
    return torch.stack([each.to(sums[0].device) for each in sums]).sum()


def find(bio: fx.GraphModule) -> tuple[dict[str, WeightSite], dict[str, str]]:
    """The weight sites, and for every other parameter, and every quantized module, the reason why it is none."""
    nodes = parameter_nodes(bio)
    chains = {name: chain(node) for name, node in nodes.items()}
    depends, unfit = Dependence(bio), {name: why for name, p in bio.named_parameters() if (why := why_unfit(p))}
    found = {
        name: follow(bio, links[-1], _shape(bio.get_parameter(name), links), depends)
        for name, links in chains.items()
        if name not in unfit
    }
    uses = {name: [*f.uses, *f.inside] for name, f in found.items() if f.uses or f.inside}
    counts = Counter(use.node for f in found.values() for use in f.inside)
    operators = {use.node: counts.get(use.node, 1) for calls in uses.values() for use in calls}
    before, followed = depths(bio.graph, operators), reaching(bio.graph, operators)
    place: Counter[fx.Node] = Counter()  # weights of an island stand in the order of its parameters
    depth: dict[str, int] = {}
    for name, calls in uses.items():
        depth[name] = max(before[use.node] + place[use.node] for use in calls)
        place.update(use.node for use in found[name].inside)
    deepest = max(1, *depth.values(), 0)
    inside = _inside_called_modules(bio)
    biases = {id(use.call.bias) for calls in uses.values() for use in calls if use.call.bias is not None}
    sites: dict[str, WeightSite] = {}
    others: dict[str, str] = {}
    for name, parameter in bio.named_parameters():
        is_bias = name in chains and id(chains[name][-1]) in biases
        unable = inside.get(id(parameter)) or unfit.get(name)
        reason = _why_no_site(bio, parameter, found.get(name), unable, is_bias)
        if reason is not None:
            others[name] = reason
            continue
        calls = uses[name]
        is_output = not any(use.node in followed for use in calls)
        sites[name] = WeightSite(
            bio,
            name,
            nodes[name],
            tuple(found[name].uses),
            tuple(found[name].inside),
            depth[name] / deepest,
            is_output,
        )
    return sites, others | _packed(bio)


def _shape(parameter: nn.Parameter, links: list[fx.Node]) -> torch.Size:
    """Shape of a parameter without its axis of synapses."""
    return parameter.shape[1:] if _is_split(links) else parameter.shape


def _is_split(links: list[fx.Node]) -> bool:
    return any(origin is not None and origin.slot is Slot.SUM for origin in map(inserted, links))


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


def _why_no_site(
    bio: fx.GraphModule, parameter: nn.Parameter, found: Uses | None, unable: str | None, is_bias: bool
) -> str | None:
    """Why a parameter is no weight site, or None if it is one."""
    has_uses = found is not None and bool(found.uses or found.inside)
    if not has_uses and (parameter.dim() < 2 or is_bias):
        return NOT_A_SYNAPSE
    if unable is not None:
        return unable
    if found is None:
        return "not used in forward"
    for user in found.changes:
        return f"forward changes it in place, by {_described(bio, user)}"
    if any(user.target is getattr and user.args[1:] == ("data",) for user in found.readers):
        return "forward takes its .data, which no graph can follow"
    final = next((refusal.reason for refusal in found.refusals if refusal.is_final or not has_uses), None)
    if final is not None:
        return final
    if has_uses:
        return None
    if max(parameter.shape) == parameter.numel():
        return NOT_A_SYNAPSE
    users = found.readers or found.on_path
    activated = sorted({_described(bio, user) for user in users if is_operator(user)})
    if activated:
        return f"{' and '.join(activated)} {'read' if activated[1:] else 'reads'} it as an input, not as a weight"
    others = [user for user in users if not _is_constant(bio, user)]
    names = sorted({_described(bio, user) for user in others or users})
    return f"used by {', '.join(names)}, which biofx does not know as an operator on weights"


def _is_constant(bio: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node of the model's own graph depends on no value, such as one that asks for a shape."""
    if node.graph is not bio.graph or is_island(node):
        return False
    return operation(node, bio).kind is Kind.CONSTANT


def _described(bio: fx.GraphModule, node: fx.Node) -> str:
    if is_island(node):
        return described(island_path(node))
    if node.graph is not bio.graph:
        return callee(node)
    part = parts.described(bio, node)
    if part is not None:
        return part
    if node.op == "call_module":
        return f"{node.target} ({type(bio.get_submodule(str(node.target))).__name__})"
    return operation(node, bio).name


def _packed(bio: fx.GraphModule) -> dict[str, str]:
    """The quantized modules, which keep their weights in no parameter, each with the reason why these are no sites."""
    result: dict[str, str] = {}
    seen: set[nn.Module] = set()
    for path, module in bio.named_modules():
        if module in seen or not type(module).__module__.startswith("torch.ao.nn."):
            continue
        inside = list(module.modules())
        if any(isinstance(value, torch.ScriptObject) for part in inside for value in vars(part).values()):
            seen.update(inside)
            result[path or "the model"] = (
                "its weights are packed for quantized operators, and synapses are real numbers"
            )
    return result


def _only(axes: tuple[int, ...] | None) -> int | None:
    return axes[0] if axes is not None and len(axes) == 1 else None


def _last_output(node: fx.Node) -> fx.Node:
    while True:
        behind = [n for n in node.users if (origin := inserted(n)) is not None and origin.slot is Slot.OUTPUT]
        if len(behind) != 1:
            return node
        node = behind[0]
