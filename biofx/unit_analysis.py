"""Unit analysis: sends the numbers of units through the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from biofx.capture.islands import described
from biofx.dry_run import Values
from biofx.unit_numbers import NOBODY, UnitNumbers, is_one
from biofx.unit_operators import Kind, Operation, argument, held_parameter, operation
from biofx.unit_signs import has_activation, input_name, is_activation, signed_by
from biofx.weight_sites import WeightSite


@dataclass(frozen=True, eq=False)
class Reading:
    """What a weight reads.

    Attributes:
        numbers: the unit behind each presynaptic position, int64, shape (presynaptic_units,).
        signed_by: the operator by which their activity can be negative, or an empty string if it cannot.
        remark: why the positions are units of their own, if they are, or an empty string.
        sources: the numbers of all units that reach the positions, also where the positions are units of their own.
    """

    numbers: Tensor
    signed_by: str
    remark: str
    sources: Tensor


class UnitAnalysis:
    """Sends numbers through the graph, again as long as weights find that they read one unit under two numbers.

    While they travel, numbers are tensors of float64 in the shape of the activation, expanded along axes on which they
    do not differ. Only nodes whose units reach a weight are looked at.

    Attributes:
        numbers: all numbers that were given.
        activations: the unit numbers of each node's value.
        readings: what each weight reads, by the weight's name.
        scales: the parameters that multiply units on their way to a weight.
    """

    def __init__(self, bio: fx.GraphModule, sites: dict[str, WeightSite], values: Values) -> None:
        self.numbers = UnitNumbers()
        self.activations: dict[fx.Node, Any] = {}
        self._bio = bio
        self._sites = sites
        self._values = values
        self._uses = {use: site for site in sites.values() for use in site.calls}
        calls = [n for n in bio.graph.nodes if n.op.startswith("call_") and n not in self._uses]
        self._operations = {node: operation(node, bio) for node in calls}
        self._varying = self._depending_on_inputs()
        self._signed = signed_by(bio, {use: s.operator for use, s in self._uses.items()}, self._operations, values)
        wanted = self._leading_to({_source(use, site) for use, site in self._uses.items()})
        while True:
            before = self.numbers.unifications
            for node in bio.graph.nodes:
                if node in wanted:
                    self._follow(node)
            columns = {name: self._columns(site) for name, site in sites.items()}
            for found in columns.values():
                if found:
                    self.numbers.unify(torch.cat(found, 1))
            if self.numbers.unifications == before:
                break
        self.readings = {name: self._reading(site, columns[name]) for name, site in sites.items()}
        self.scales = frozenset(name for node in wanted for name in self._scaling(node))

    # --- the graph ---------------------------------------------------------------------------------------------

    def _depending_on_inputs(self) -> set[fx.Node]:
        """The nodes whose value depends on the values, and not just the shapes, of the model's inputs."""
        result: set[fx.Node] = set()
        for node in self._bio.graph.nodes:
            call = self._operations.get(node)
            if call is not None and call.kind is Kind.CONSTANT:
                continue
            if node.op == "placeholder" or not result.isdisjoint(node.all_input_nodes):
                result.add(node)
                if call is not None and call.changes is not None:
                    result.add(call.changes)
        return result

    def _leading_to(self, ends: set[fx.Node]) -> set[fx.Node]:
        """The nodes whose units are carried to one of the ends."""
        result = set(ends)
        for node in reversed(self._bio.graph.nodes):
            call = self._operations.get(node)
            if call is not None and call.changes in result:
                result.add(node)
            if call is not None and node in result:
                result.update(self._carried(node, call))
        return result

    def _carried(self, node: fx.Node, call: Operation) -> list[fx.Node]:
        """The operands whose units an operator takes up."""
        if call.kind in (Kind.CONSTANT, Kind.UNKNOWN):
            return []
        if call.key == "scaleddotproductattention":
            return [argument(node, self._bio, 2, "value")]
        if call.kind is Kind.MIX:
            return node.all_input_nodes[-1:]
        if call.kind in (Kind.KEEP, Kind.NORM, Kind.WINDOW, Kind.REDUCE):
            return node.all_input_nodes[:1]
        return node.all_input_nodes

    def _scaling(self, node: fx.Node) -> list[str]:
        """The parameters that multiply units in a node."""
        call = self._operations.get(node)
        if call is None or node not in self._varying:
            return []
        if call.kind is Kind.NORM:
            position = 3 if call.key in ("batchnorm", "instancenorm") else 2
            found = argument(node, self._bio, position, "weight")
            if isinstance(found, nn.Parameter):
                return [f"{node.target}.weight"]
            factors = [found]
        else:
            factors = node.all_input_nodes if call.is_product else []
        names = [held_parameter(factor, self._bio, self._operations) for factor in factors]
        return [name for name in names if name is not None]

    # --- following units through nodes -------------------------------------------------------------------------

    def _follow(self, node: fx.Node) -> None:
        self.activations[node] = self._after(node)
        call = self._operations.get(node)
        if call is not None and call.changes is not None:
            self.activations[call.changes] = self.activations[node]

    def _after(self, node: fx.Node) -> Any:
        """The unit numbers of a node's value."""
        value = self._values[node]
        if node not in self._varying or not has_activation(value):
            return pytree.tree_map(_nobody, value)
        if node in self._uses:
            return self._postsynaptic(node, self._uses[node])
        if node.op == "placeholder":
            return self._entries(node, input_name(node), "input")
        call = self._operations[node]
        try:
            found = _RULES[call.kind](self, node, call)
        except Exception:  # noqa: BLE001 - executed on numbers, an operator may refuse what it takes as values
            found = None
        return found if _fits(found, value) else self._entries(node, self._name(node), "unknown")

    def _postsynaptic(self, use: fx.Node, site: WeightSite) -> Tensor:
        numbers = self.numbers.once(site.name, site.name, "weight", site.units)
        shape = self._values[use].shape
        channel = site.operator.channel_axis
        synapses = shape[channel] // site.units  # Γ, if each synapse has an activation of its own
        numbers = numbers.view(site.groups, 1, -1).expand(-1, synapses, -1).flatten()
        return numbers.view(-1, *[1] * (-1 - channel)).expand(shape)

    def _entries(self, node: fx.Node, name: str, origin: str) -> Any:
        """For every tensor in a value a population with a unit for each entry."""
        leaves, spec = pytree.tree_flatten(self._values[node])
        found: list[Tensor | None] = [None] * len(leaves)
        for index, leaf in enumerate(leaves):
            if is_activation(leaf):
                found[index] = self.numbers.once((node, index), name, origin, leaf.numel()).view(leaf.shape)
        return pytree.tree_unflatten(found, spec)

    def _operands(self, node: fx.Node, call: Operation) -> list[Tensor]:
        """The unit numbers of all tensors that an operator takes up."""
        found = [self.activations[source] for source in self._carried(node, call)]
        return [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor)]

    def _layout(self, node: fx.Node, call: Operation) -> Any:
        if any(self._chooses(source) for source in node.all_input_nodes[1:]):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._numbers_or_value)
        if call.key in ("pad", "constantpad") and self._argument(node, 2, "mode", default="constant") == "constant":
            found = F.pad(args[0], self._argument(node, 1, "pad", "padding"))  # with nobody, whatever the value
        elif node.op == "call_module":
            found = self._bio.get_submodule(str(node.target))(*args, **kwargs)
        elif call.key == "view":  # unit numbers are not laid out in memory as the values are
            found = args[0].reshape(*args[1:], *kwargs.values())
        elif node.op == "call_method":
            found = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            found = node.target(*args, **kwargs)  # type: ignore[operator]
        return pytree.tree_map_only(Tensor, _compressed, found)

    def _argument(self, node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
        return fx.map_arg(argument(node, self._bio, position, *names, default=default), self._values.__getitem__)

    def _chooses(self, index: fx.Node) -> bool:
        """Whether a node holds integers that depend on activity, so that which units they choose does."""
        return index in self._varying and any(
            isinstance(x, Tensor) and not is_activation(x) for x in pytree.tree_leaves(self._values[index])
        )

    def _numbers_or_value(self, node: fx.Node) -> Any:
        return pytree.tree_map(
            lambda value, numbers: value if numbers is None else numbers, self._values[node], self.activations[node]
        )

    def _concatenate(self, node: fx.Node, call: Operation) -> Tensor:
        """A parameter beside units, such as a class token beside other tokens, is their activity at another position."""
        numbers: Tensor = self._layout(node, call)
        axis = self._argument(node, 1, "dim", "axis", default=0)
        low, high = _extremes(numbers, (axis,))
        return torch.where((numbers == NOBODY) & (low == high), low, numbers)

    def _keep(self, node: fx.Node, call: Operation) -> Tensor:
        return self._operands(node, call)[0]

    def _window(self, node: fx.Node, call: Operation) -> Any:
        numbers = self._keep(node, call)
        axes = tuple(range(-(call.axes or numbers.dim() - 2), 0))
        # What pools and interpolates takes a feature map for one unit at many places, as convolutions do.
        self.numbers.unify(_once_along_expanded(numbers)[0].flatten(axes[0]).flatten(0, -2))
        joined = self._join(node, numbers, axes)
        return _like(self._values[node], lambda value: joined.expand(value.shape))

    def _reduce(self, node: fx.Node, call: Operation) -> Any:
        numbers = self._keep(node, call)
        axes = self._argument(node, 2 if call.key == "norm" else 1, "dim", "axis")
        if axes is None:
            axes = range(numbers.dim())
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        joined = self._join(node, numbers, axes)
        return _like(self._values[node], lambda v: joined if v.dim() == numbers.dim() else joined.squeeze(axes))

    def _merge(self, node: fx.Node, call: Operation) -> Tensor:
        operands = self._operands(node, call)
        if call.key == "glu":
            operands = list(operands[0].chunk(2, self._argument(node, 1, "dim", default=-1)))
        result = operands[0]
        for other in operands[1:]:
            shape = torch.broadcast_shapes(result.shape, other.shape)
            a, b = _once_along_expanded(result.expand(shape), other.expand(shape))
            result = self.numbers.merge(node, self._name(node), a, b).expand(shape)
        return result

    def _mix(self, node: fx.Node, call: Operation) -> Tensor | None:
        """What is mixed has to be one unit at many places: then it is that unit still."""
        low, high = _extremes(self._keep(node, call), (-2,))
        if not bool(low.any()) or not torch.equal(low, high):
            return None
        return low.expand(self._values[node].shape)

    def _join(self, node: fx.Node, numbers: Tensor, axes: tuple[int, ...]) -> Tensor:
        """What values along axes have become together, each of size 1."""
        return self.numbers.merge(node, self._name(node), *_extremes(numbers, axes))

    def _name(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack", {})
        path = next((path for path, _ in reversed(stack.values())), "")
        name = self._operations[node].name
        return f"{name} in {path}" if path else name

    # --- reading -----------------------------------------------------------------------------------------------

    def _columns(self, site: WeightSite) -> list[Tensor]:
        """For every use of a weight the units that each of its columns multiplies, shape (presynaptic_units, …)."""
        return [self._columns_of(_source(use, site), site) for use in site.calls]

    def _columns_of(self, source: fx.Node, site: WeightSite) -> Tensor:
        channels, axis = site.presynaptic_units, site.operator.channel_axis
        numbers = self.activations[source]
        if isinstance(numbers, Tensor) and numbers.dim() >= -axis:
            (once,) = _once_along_expanded(numbers.movedim(axis, 0))
            columns = once.reshape(len(once), -1).expand(numbers.shape[axis], -1)
            if columns.shape[0] == channels:
                return self.numbers.standing(columns)
            # Without example inputs, sides are invented: a feature map that was flattened channel by channel?
            units, counts = torch.unique_consecutive(columns[:, 0], return_counts=True)
            if channels % len(units) == 0 and bool((counts == counts[0]).all()):
                return self.numbers.standing(units.repeat_interleave(channels // len(units))[:, None])
        name = self._name(source) if source in self._operations else source.name
        return self.numbers.once((source, channels), name, "unknown", channels).long()[:, None]

    def _reading(self, site: WeightSite, columns: Sequence[Tensor]) -> Reading:
        if site.island is not None:
            return self._reading_inside(site, described(site.island), columns)
        found = torch.cat(list(columns), 1)
        sources = found.unique()
        numbers, remark = found.amax(1), ""
        if not bool(is_one(found).all()):
            remark = "reads different units by the same synapses"
            if all(bool(is_one(column).all()) for column in columns):
                remark = f"used {len(columns)} times, on different units"
            origin = "input" if self.numbers.are_inputs(sources) else "shared"
            name = f"positions of {site.name}"
            numbers = self.numbers.once((site.name, "shared"), name, origin, len(numbers)).long()
        if bool((numbers == NOBODY).any()):
            name = f"constants read by {site.name}"
            own = self.numbers.once((site.name, "constant"), name, "constant", len(numbers)).long()
            numbers = torch.where(numbers == NOBODY, own, numbers)
        signed = next((self._signed[s] for use in site.calls if self._signed[s := _source(use, site)]), "")
        return Reading(numbers, signed, remark, sources[sources != NOBODY])

    def _reading_inside(self, site: WeightSite, island: str, columns: Sequence[Tensor]) -> Reading:
        """Nobody knows what arrives at a weight inside an island, so its positions are units of their own."""
        is_embedding = site.operator.name == "embedding"  # whose presynaptic units are tokens, no neurons
        name = f"{'tokens' if is_embedding else 'positions'} of {site.name}"
        origin = "input" if is_embedding else "shared"
        numbers = self.numbers.once((site.name, "island"), name, origin, site.presynaptic_units).long()
        sources = torch.cat([numbers[:, None], *columns], 1).unique()
        return Reading(numbers, island, f"is in {island}, where units cannot be followed", sources[sources != NOBODY])


_RULES: dict[Kind, Callable[[UnitAnalysis, fx.Node, Operation], Any]] = {
    Kind.LAYOUT: UnitAnalysis._layout,
    Kind.CONCATENATE: UnitAnalysis._concatenate,
    Kind.KEEP: UnitAnalysis._keep,
    Kind.NORM: UnitAnalysis._keep,
    Kind.WINDOW: UnitAnalysis._window,
    Kind.REDUCE: UnitAnalysis._reduce,
    Kind.MERGE: UnitAnalysis._merge,
    Kind.MIX: UnitAnalysis._mix,
    Kind.CONSTANT: lambda analysis, node, call: pytree.tree_map(_nobody, analysis._values[node]),
    Kind.UNKNOWN: lambda analysis, node, call: None,
}


def _source(use: fx.Node, site: WeightSite) -> fx.Node:
    """What an operator on a weight reads."""
    return site.operator.argument(use, 0, "input")  # type: ignore[no-any-return]


def _like(value: Any, numbers: Callable[[Tensor], Tensor]) -> Any:
    return pytree.tree_map(lambda x: numbers(x) if is_activation(x) else None, value)


def _nobody(value: Any) -> Tensor | None:
    return torch.zeros((), dtype=torch.float64).expand(value.shape) if is_activation(value) else None


def _fits(numbers: Any, value: Any) -> bool:
    """Whether unit numbers have the shapes of a value."""
    found = [x.shape for x in pytree.tree_leaves(numbers) if is_activation(x)]
    return found == [x.shape for x in pytree.tree_leaves(value) if is_activation(x)]


def _once_along_expanded(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape, with a length of 1 along the axes on which all are expanded."""
    for axis in range(tensors[0].dim()):
        if all(tensor.stride(axis) == 0 for tensor in tensors):
            tensors = tuple(tensor.narrow(axis, 0, min(1, tensor.shape[axis])) for tensor in tensors)
    return list(tensors)


def _compressed(numbers: Tensor) -> Tensor:
    """Numbers that do not differ along an axis, expanded along it."""
    small = numbers
    for axis in range(numbers.dim()):
        first = small.narrow(axis, 0, min(1, small.shape[axis]))
        if bool((small == first).all()):
            small = first
    return small.expand(numbers.shape)


def _extremes(numbers: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The lowest number along axes, apart from nobody's, and the highest, each of size 1."""
    for axis in axes:
        if numbers.stride(axis) == 0:
            numbers = numbers.narrow(axis, 0, min(1, numbers.shape[axis]))
    low = torch.where(numbers == NOBODY, torch.inf, numbers).amin(axes, keepdim=True)
    return torch.where(low.isinf(), NOBODY, low), numbers.amax(axes, keepdim=True)
