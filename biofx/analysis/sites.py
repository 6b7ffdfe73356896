"""Weight sites: which parameters are synapses, and which of their axes are presynaptic and postsynaptic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, fx, nn

from biofx.analysis.graphs import NodeUse, uses_of
from biofx.base.errors import ArgumentError
from biofx.base.gains import decoded
from biofx.base.shards import Shard, shard_of
from biofx.model.chain import chain, parameter_nodes
from biofx.model.changes import transformed
from biofx.model.control_flow import control_flow_of, describe_control_flow
from biofx.model.gradient_hooks import counter_of, is_hook
from biofx.model.islands import describe_island, island_path
from biofx.model.provenance import inserted, record_of
from biofx.model.slots import Slot
from biofx.model.synapses import Link, Synapses, is_parameter, stored, synapses_of
from biofx.weights.facts import Need, WeightFacts

if TYPE_CHECKING:
    from biofx.weights.axes import Axes

_IN_ONE_PIECE = frozenset(("rnn", "lstm", "gru"))  # operators, and modules, that read several weights at once


@dataclass(frozen=True, eq=False)
class Call:
    """A node of the graph that uses a weight.

    Attributes:
        node: the node.
        use: how it uses the weight.
    """

    node: fx.Node
    use: NodeUse

    @property
    def source(self) -> fx.Node | None:
        """The node whose activity the operator multiplies the weight by, if there is one."""
        return None if self.use.source is None else self.node.all_input_nodes[self.use.source]

    @property
    def bias(self) -> fx.Node | None:
        """The node that holds or computes the bias, if there is one."""
        return self.node.all_input_nodes[self.use.bias] if self.use.bias is not None and self.use.bias >= 0 else None

    @property
    def computes_bias(self) -> bool:
        """Whether the node adds a bias that it computes itself, so that no other node holds it."""
        return self.use.bias is not None and self.bias is None


@dataclass(frozen=True, eq=False)
class WeightSite:
    """A parameter used as synaptic weights by an operator.

    Attributes:
        bio: the model.
        name: the parameter's name in the original model; the first one, if it is tied to others.
        facts: what a run of the model showed about it.
        node: the `get_attr` node of the stored parameter; None if the model is not transformed.
        calls: the nodes of the graph that use it.
        inside: the nodes that use it inside of an island, an untraced submodule, or of a
            part, which has a graph of its own.
    """

    bio: nn.Module = field(repr=False)
    name: str
    facts: WeightFacts
    node: fx.Node | None = None
    calls: tuple[Call, ...] = ()
    inside: tuple[fx.Node, ...] = ()

    @property
    def operator(self) -> str:
        """Name of the operator that consumes the weight; of all, joined by ", ", if there are several."""
        return self.facts.operator

    @property
    def depth(self) -> float:
        """Number of weights on the longest path before it: from 0 for the first to 1 for the last."""
        return self.facts.depth

    @property
    def is_output(self) -> bool:
        """Whether no signal passes another weight after this one."""
        return self.facts.is_output

    @property
    def uses(self) -> tuple[fx.Node, ...]:
        """The nodes that use it."""
        return tuple(dict.fromkeys((*(call.node for call in self.calls), *self.inside)))

    @property
    def biases(self) -> tuple[fx.Node, ...]:
        """The nodes that hold or compute the biases of its operators."""
        return tuple(dict.fromkeys(bias for call in self.calls if (bias := call.bias) is not None))

    @property
    def readers(self) -> tuple[fx.Node, ...]:
        """The nodes that read the stored parameter."""
        return () if self.node is None else tuple(self.node.users)

    @property
    def groups(self) -> int:
        """Number of groups into which the operator divides an axis of units."""
        return self.facts.groups

    @property
    def island(self) -> str | None:
        """Path of the first island that uses the weight: None if none does, empty for the model itself."""
        paths = (island_path(self.bio, node) for node in self.inside)
        return next((path for path in paths if path is not None), None)

    @property
    def surroundings(self) -> str | None:
        """What the weight is used inside of, in words: an island, or a part of the model."""
        if not self.inside:
            return None
        node = self.inside[0]
        path = island_path(self.bio, node)
        return describe_control_flow(self.bio, node) if path is None else describe_island(path)

    @property
    def raw(self) -> nn.Parameter:
        """The stored parameter: shape (Γ, *shape) if the weight is split into Γ synapses, else just shape."""
        return stored(self.bio, self.name)

    @property
    def is_gone(self) -> bool:
        """Whether the module that had the weight was replaced by one that has none of its name."""
        return not is_parameter(self.bio, self.name)

    @property
    def child(self) -> Synapses | None:
        """What holds the stored parameter, its links and their state; None if no pass changed the weight."""
        return synapses_of(self.bio, self.name)

    @property
    def known_synapses(self) -> Synapses:
        """The same, for a weight that a pass changed."""
        synapses = self.child
        assert synapses is not None, f"{self.name} has no synapses"
        return synapses

    @property
    def links(self) -> tuple[Link, ...]:
        """The steps from what is stored to the weight."""
        return () if self.child is None else self.child.links

    def synaptic(self) -> Tensor:
        """Weight of every synapse, in the shape of `raw`: the stored one under its sign constraint, differentiable."""
        return self.raw if self.child is None else self.child(until=Slot.SIGN)

    def direct(self) -> Tensor:
        """What presynaptic units contribute themselves: the effective weight without that of interneurons."""
        return self.raw if self.child is None else self.child(until=Slot.SUM)

    @property
    def has_interneurons(self) -> bool:
        """Whether presynaptic units inhibit through interneurons."""
        return self.child is not None and self.child.has_interneurons

    def effective(self) -> Tensor:
        """What takes the parameter's place in the original model, differentiable in `raw`.

        That is what the operator receives, unless the original model itself transposes, casts or scales the parameter
        on the way.
        """
        return self.raw if self.child is None else self.child()

    @property
    def gain(self) -> Tensor | None:
        """Learning gain c of every synapse, broadcastable to `raw`; None if every synapse learns alike.

        It is the stored tensor. If that is in 8 bits, or there is none, it is computed at each call.
        """
        stored_gain = self.state("gain")
        if stored_gain is not None:
            return decoded(stored_gain)
        return self._product([link for link in self.links if link.target is torch.ops.biofx.drawn_grad][:1])

    @property
    def factor(self) -> Tensor | None:
        """What gradient hooks multiply the learning of every synapse by: gains and state of all passes together.

        Noise of every step is left out. None if no pass has a hook.
        """
        return self._product([link for link in self._hooks if not self._is_noisy(link)])

    @property
    def noisy_factor(self) -> Tensor | None:
        """The same with the noise that the next step draws; None if no hook draws any."""
        return self._product(self._hooks) if any(map(self._is_noisy, self._hooks)) else None

    @property
    def _hooks(self) -> list[Link]:
        """The gradient hooks, except for the share of each of several synapses."""
        return [link for link in self.links if is_hook(link.target) and link.target is not torch.ops.biofx.share_grad]

    def _is_noisy(self, link: Link) -> bool:
        """Whether a gradient hook draws noise at every step; gains that are stored nowhere are the same at each."""
        arguments = self.known_synapses.arguments(link)
        return link.target is not torch.ops.biofx.drawn_grad and counter_of(link.target, arguments)[0] is not None

    def _product(self, hooks: list[Link]) -> Tensor | None:
        raw = self.raw.detach()
        return self.known_synapses.scaled(torch.ones_like(raw), raw, hooks) if hooks else None

    @property
    def sign(self) -> Tensor | None:
        """Sign +1 or −1 of the unit behind every synapse, 0 if it is free, broadcastable to `raw`; None if all are."""
        return self.state("sign")

    @property
    def synapses(self) -> int:
        """Γ, the number of synapses for each connection."""
        return self.raw.shape[0] if self.is_split else 1

    @property
    def shares(self) -> int:
        """The number of synapses that share the gradient of their connection."""
        return 1 if self.child is None else self.child.shares

    @property
    def is_split(self) -> bool:
        """Whether `raw` has a leading axis of synapses."""
        return self.child is not None and self.child.is_split

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight without its axis of synapses."""
        return self.raw.shape[1:] if self.is_split else self.raw.shape

    @property
    def axes(self) -> Axes | None:
        """The axes of the weight, as in the original model, or None if its uses do not agree on them."""
        return self.facts.axes

    def unmet(self, need: Need) -> str | None:
        """The reason why the weight does not meet a need of a pass, or None if it does."""
        if need is Need.NODES:
            if self.surroundings is not None:
                instead = "" if self.island is None else f"; {self._within_reach}"
                return f"it is in {self.surroundings}, so what its operator returns is out of reach{instead}"
            return None if self.calls else "no node of the graph is known to use it"
        if need is Need.OUTPUT:
            return self.unmet(Need.NODES) or self.unmet(Need.AXES) or self._unmet_output()
        if need is Need.INPUT:
            return self.unmet(Need.NODES) or self.unmet(Need.AXES) or self._unmet_input()
        if need is Need.UNITS:
            return self.facts.unmet.get(need) or self.unmet(Need.AXES)
        return self.facts.unmet.get(need)

    @property
    def _within_reach(self) -> str:
        if _IN_ONE_PIECE.isdisjoint(self.operator.split(", ")):
            return 'frontend="export" follows it unless it decides by values'
        return f"no front end finds what one weight of {self.operator} returns"

    def _unmet_output(self) -> str | None:
        if any(len(call.use.output_axes) != 1 for call in self.calls):
            return f"{self.operator} does not return its units on one axis"
        if any(call.use.units != self.units for call in self.calls):
            return "not each of its uses returns all of its units"
        return None

    def _unmet_input(self) -> str | None:
        if any(call.source is None or len(call.use.source_axes) != 1 for call in self.calls):
            return f"{self.operator} does not read its units on one axis"
        return None

    @property
    def known_axes(self) -> Axes:
        """The axes of the weight.

        Raises:
            ValueError: its uses do not agree on them.
        """
        if self.axes is None:
            raise ValueError(f"{self.name}: {self.unmet(Need.AXES)}")
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
        """Row of the weight that does not learn, because it stands for no token; None if there is none."""
        return self.facts.padding

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        """What the calls return to the model: they themselves, or the last of the nodes that passes put behind them."""
        return tuple(_last_output(call.node) for call in self.calls)

    @property
    def chain(self) -> list[fx.Node]:
        """The nodes from the stored parameter to the tensor that the operator receives."""
        return [] if self.node is None else chain(self.node)

    @property
    def passes(self) -> tuple[str, ...]:
        """Names of the passes that changed this weight."""
        return tuple(run.pass_.name for run in record_of(self.bio).passes if self.name in run.weights)

    def state(self, key: str) -> Tensor | None:
        """State that a pass keeps for this weight, or None."""
        synapses = self.child
        return None if synapses is None else synapses.state(key)

    @property
    def shard(self) -> Shard:
        """Which part of the weight this process holds."""
        return shard_of(self.name, self.raw)

    def bound(self) -> BoundSite:
        """The same, with what is looked up by name now; right as long as nothing is assigned to the model."""
        return BoundSite(**{each.name: getattr(self, each.name) for each in fields(WeightSite)})


class BoundSite(WeightSite):
    """A weight site that looks up once what belongs to its name."""

    @cached_property
    def raw(self) -> nn.Parameter:
        """The stored parameter."""
        return super().raw

    @cached_property
    def child(self) -> Synapses | None:
        """What holds it, if a pass changed the weight."""
        return super().child

    @cached_property
    def known_synapses(self) -> Synapses:
        """The same, for a weight that a pass changed."""
        return super().known_synapses

    @cached_property
    def shard(self) -> Shard:
        """Which part of the weight this process holds."""
        return super().shard

    @cached_property
    def shares(self) -> int:
        """The number of synapses that share the gradient of their connection."""
        return super().shares


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
    return find_weights(transformed(bio)).sites


def l1(bio: nn.Module) -> Tensor:
    r"""Sum of the magnitudes of the effective weights of all sites, a differentiable scalar to add to a loss.

    $$L_1 = \sum_{\text{sites}} \sum_{ij} |w_{ij}|$$

    with $w$ the tensor that the operator receives, not the synapses that it is made of. The reference package sums its
    own learning-rate factors instead, and under `no_grad`. Weights that were assigned after the transform are no sites.

    Raises:
        ArgumentError: `bio` was not made by `biofx.transform`, or has no weight site any more.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(3, 2), [passes.SplitSynapses()])
        >>> bool(torch.isclose(biofx.l1(bio), biofx.weight_sites(bio)["weight"].effective().abs().sum()))
        True
    """
    sums = [site.effective().abs().sum() for site in weight_sites(bio).values()]
    if not sums:
        raise ArgumentError("l1: all weights were replaced or removed since the transform; transform the model again")
    return torch.stack([each.to(sums[0].device) for each in sums]).sum()


class Weights(NamedTuple):
    """Which parameters of a model are weight sites, and why others are not.

    Attributes:
        sites: the weight sites, by name.
        others: why each other parameter, or quantized module, is not a weight site, by name.
    """

    sites: dict[str, WeightSite]
    others: dict[str, str]


def find_weights(bio: fx.GraphModule) -> Weights:
    """Separate the weight sites of a transformed model from its other parameters."""
    record, nodes = record_of(bio), parameter_nodes(bio)
    calls: dict[str, list[Call]] = {}
    for node in bio.graph.nodes:
        for use in uses_of(node):
            calls.setdefault(use.parameter, []).append(Call(node, use))
    callers = _callers(bio)
    sites: dict[str, WeightSite] = {}
    others = dict(record.others)
    for name, facts in record.weights.items():
        parameter = stored(bio, name)
        readers = chain(nodes[name])[-1].users if name in nodes else ()
        inside = (*(node for node in readers if control_flow_of(bio, node)), *callers.get(id(parameter), ()))
        if name in nodes and not readers and not inside:
            others[name] = "no operator uses it any more"
        else:
            own = tuple(call for call in calls.get(name, ()) if call.node not in inside)
            sites[name] = WeightSite(bio, name, facts, nodes.get(name), own, inside)
    return Weights(sites, others | dict(_packed(bio)))


def _callers(bio: fx.GraphModule) -> dict[int, list[fx.Node]]:
    """The nodes that call a module whose Python reads a parameter, by the parameter's id."""
    found: dict[int, list[fx.Node]] = {}
    for node in bio.graph.nodes:
        path = island_path(bio, node)
        for parameter in bio.get_submodule(path).parameters() if path is not None else ():
            found.setdefault(id(parameter), []).append(node)
    return found


def _packed(bio: fx.GraphModule) -> Iterator[tuple[str, str]]:
    """The quantized modules, which keep their weights in no parameter, each with the reason why these are not sites."""
    seen: set[nn.Module] = set()
    for path, module in bio.named_modules():
        if module in seen or not type(module).__module__.startswith("torch.ao.nn."):
            continue
        inside = list(module.modules())
        if any(isinstance(value, torch.ScriptObject) for part in inside for value in vars(part).values()):
            seen.update(inside)
            yield path or "the model", "its weights are packed for quantized operators, and synapses are real numbers"


def _only(axes: tuple[int, ...] | None) -> int | None:
    return axes[0] if axes is not None and len(axes) == 1 else None


def _last_output(node: fx.Node) -> fx.Node:
    while True:
        behind = [n for n in node.users if (origin := inserted(n)) is not None and origin.slot is Slot.OUTPUT]
        if len(behind) != 1:
            return node
        node = behind[0]
