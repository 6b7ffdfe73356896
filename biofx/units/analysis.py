"""Unit analysis: sends the numbers of units through the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from biofx.chain import compute
from biofx.dry_run import Values
from biofx.operator_kinds import Kind, Operation, argument, held_parameter, operation
from biofx.units.numbers import NOBODY, Population, UnitNumbers, is_one
from biofx.units.signs import has_activation, input_name, is_activation, signed_by
from biofx.weights.operators import Source
from biofx.weights.paths import Use
from biofx.weights.sites import WeightSite


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
        self._uses = {use.node: (site, use) for site in sites.values() for use in site.calls}
        self._read = {name: site for name, site in sites.items() if site.why_no_source is None}
        self._reads = {use.node: (site, use) for site in self._read.values() for use in site.calls}
        calls = [n for n in bio.graph.nodes if n.op.startswith("call_") and n not in self._uses]
        self._operations = {node: operation(node, bio) for node in calls}
        self._varying = self._depending_on_units()
        self._inputs = self._made_of_inputs()
        self._signed = signed_by(bio, {node: use for node, (_, use) in self._uses.items()}, self._operations, values)
        self._wanted = self._leading_to({_source(use).node for _, use in self._reads.values()})
        while (columns := self._columns_of_uses()) is None:
            self.numbers.start_again()
        self.readings = {
            name: self._reading(site, [columns[use.node] for use in site.calls]) for name, site in self._read.items()
        }
        self.scales = frozenset(name for node in self._wanted for name in self._scaling(node))

    def populations(self) -> tuple[tuple[Population, ...], Tensor]:
        """All populations whose units reach a weight, and the index of its population for each number."""
        tensors = [x for x in pytree.tree_leaves(self.activations) if isinstance(x, Tensor)]
        carried = [_once_along_expanded(numbers)[0] for numbers in tensors]
        return self.numbers.summary([*carried, *(reading.numbers for reading in self.readings.values())])

    # --- the graph ---------------------------------------------------------------------------------------------

    def _depending_on_units(self) -> set[fx.Node]:
        """The nodes whose value depends on the values, and not just the shapes, of inputs or of what weights return."""
        result: set[fx.Node] = set()
        for node in self._bio.graph.nodes:
            call = self._operations.get(node)
            is_source = node.op == "placeholder" or node in self._uses
            if is_source or (not result.isdisjoint(node.all_input_nodes) and not (call and call.kind is Kind.CONSTANT)):
                result.add(node)
                if call is not None and call.changes is not None:
                    result.add(call.changes)
        return result

    def _made_of_inputs(self) -> set[fx.Node]:
        """The nodes that known operators make of inputs only."""
        result: set[fx.Node] = set()
        for node in self._bio.graph.nodes:
            kind = self._operations[node].kind if node in self._operations else Kind.UNKNOWN
            is_made = kind is not Kind.UNKNOWN and result.issuperset(node.all_input_nodes)
            if node.op == "placeholder" or kind is Kind.CONSTANT or is_made:
                result.add(node)
            elif node in self._operations:
                result.discard(self._operations[node].changes)
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
            in_dispatcher = hasattr(node.target, "overloadpacket")
            position = (1 if in_dispatcher else 3) if call.key in ("batchnorm", "instancenorm") else 2
            found = argument(node, self._bio, position, "weight")
            if isinstance(found, nn.Parameter):
                return [f"{node.target}.weight"]
            factors = [found]
        else:
            factors = node.all_input_nodes if call.is_product else []
        names = [held_parameter(factor, self._bio, self._operations) for factor in factors]
        return [name for name in names if name is not None]

    # --- following units through nodes -------------------------------------------------------------------------

    def _columns_of_uses(self) -> dict[fx.Node, Tensor] | None:
        """Follow units through the graph: what every use of a weight reads, or None if numbers turned out to be one."""
        columns: dict[fx.Node, Tensor] = {}
        before = self.numbers.unifications
        for node in self._bio.graph.nodes:
            if node in self._reads:
                columns[node] = self._columns(*self._reads[node])
                self.numbers.unify(columns[node])
            if node in self._wanted:
                self.activations[node] = self._after(node)
                call = self._operations.get(node)
                if call is not None and call.changes is not None:
                    self.activations[call.changes] = self.activations[node]
            if self.numbers.unifications > before:
                return None
        for site in self._read.values():
            if site.calls:
                self.numbers.unify(torch.cat([columns[use.node] for use in site.calls], 1))
        return columns if self.numbers.unifications == before else None

    def _after(self, node: fx.Node) -> Any:
        """The unit numbers of a node's value."""
        value = self._values[node]
        if node not in self._varying or not has_activation(value):
            return pytree.tree_map(_nobody, value)
        if node in self._uses:
            return self._postsynaptic(*self._uses[node])
        if node.op == "placeholder":
            return self._entries(node, input_name(node), "input")
        call = self._operations[node]
        try:
            found = _RULES[call.kind](self, node, call)
        except Exception:  # noqa: BLE001 - executed on numbers, an operator may refuse what it takes as values
            found = None
        return found if _fits(found, value) else self._entries(node, self._name(node), self._origin(node))

    def _origin(self, node: fx.Node) -> str:
        """The origin of what cannot be followed. What is made of inputs has no units of the network, in any shape."""
        return "input" if node in self._inputs else "unknown"

    def _postsynaptic(self, site: WeightSite, use: Use) -> Any:
        call, value = use.call, self._values[use.node]
        if not isinstance(value, Tensor):
            return self._entries(use.node, site.name, "weight")
        axes = tuple(_within(axis, value.dim()) for axis in call.output_axes)
        sizes = [value.shape[axis] for axis in axes]
        numbers = self._numbers_of(site, use)
        if call.postsynaptic:
            last = call.lengths[call.postsynaptic[-1]]
            synapses = math.prod(sizes) // max(1, call.units)  # Γ, if each synapse has an activation of its own
            numbers = numbers.view(-1, 1, last).expand(-1, synapses, -1)
        return _placed(numbers.reshape(sizes), axes, value.shape)

    def _numbers_of(self, site: WeightSite, use: Use) -> Tensor:
        """The numbers of the postsynaptic units of a use, in order."""
        if site.axes is None:  # each of its uses has units of its own
            return self.numbers.once(use.node, site.name, "weight", use.call.units)
        numbers = self.numbers.once(site.name, site.name, "weight", site.units)
        positions = use.postsynaptic_positions()
        return numbers if positions is None else numbers[positions]

    def _entries(self, node: fx.Node, name: str, origin: str) -> Any:
        """For every tensor in a value that is read a population with a unit for each entry."""
        value = self._values[node]
        leaves, spec = pytree.tree_flatten(value)
        found: list[Tensor | None] = [None] * len(leaves)
        for index in self._leaves_that_are_read(node, value):
            if is_activation(leaves[index]):
                numbers = self.numbers.once((node, index), name, origin, leaves[index].numel())
                found[index] = _compressed(numbers.view(leaves[index].shape))
        return pytree.tree_unflatten(found, spec)

    def _leaves_that_are_read(self, node: fx.Node, value: Any) -> list[int]:
        readers = [reader for reader in node.users if reader in self._wanted or reader in self._uses]
        if isinstance(value, tuple | list) and all(r.target is getitem and isinstance(r.args[1], int) for r in readers):
            parts = [index for index, part in enumerate(value) for _ in pytree.tree_leaves(part)]
            taken = {range(len(value))[reader.args[1]] for reader in readers}  # type: ignore[index]
            return [leaf for leaf, part in enumerate(parts) if part in taken]
        return list(range(len(pytree.tree_leaves(value))))

    def _operands(self, node: fx.Node, call: Operation) -> list[Tensor]:
        """The unit numbers of all tensors that an operator takes up."""
        found = [self.activations[source] for source in self._carried(node, call)]
        return [x for x in pytree.tree_leaves(found) if isinstance(x, Tensor)]

    def _layout(self, node: fx.Node, call: Operation) -> Any:
        if any(self._chooses(source) for source in node.all_input_nodes[1:]):
            return None
        args, kwargs = self._numbers_or_values((node.args, node.kwargs))
        if call.key in ("pad", "constantpad") and self._argument(node, 2, "mode", default="constant") == "constant":
            found = F.pad(args[0], self._argument(node, 1, "pad", "padding"))  # with nobody, whatever the value
        elif call.key in ("view", "unsafeview"):  # unit numbers are not laid out in memory as the values are
            found = args[0].reshape(*args[1:], *kwargs.values())
        else:
            found = compute(self._bio, node, args, kwargs)
        return pytree.tree_map_only(Tensor, _compressed, found)

    def _argument(self, node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
        return fx.map_arg(argument(node, self._bio, position, *names, default=default), self._values.__getitem__)

    def _chooses(self, index: fx.Node) -> bool:
        """Whether a node holds integers that depend on activity, so that which units they choose does."""
        return index in self._varying and any(
            isinstance(x, Tensor) and not is_activation(x) for x in pytree.tree_leaves(self._values[index])
        )

    def _numbers_or_values(self, arguments: Any) -> Any:
        """Arguments with unit numbers in place of activity."""

        def look_up(node: fx.Node) -> Any:
            value, numbers = self._values[node], self.activations[node]
            return pytree.tree_map(lambda v, n: v if n is None else n, value, numbers)

        return fx.map_arg(arguments, look_up)

    def _concatenate(self, node: fx.Node, call: Operation) -> Tensor:
        """A parameter beside units, as a class token beside other tokens, is their activity at another position."""
        tensors: Any = fx.map_arg(argument(node, self._bio, 0, "tensors"), self.activations.__getitem__)
        axis = self._argument(node, 1, "dim", "axis", default=0)
        if call.key == "stack":
            tensors = [tensor.unsqueeze(axis) for tensor in tensors]
        numbers = torch.cat(_once_along_expanded(*tensors, keep=axis % tensors[0].dim()), axis)
        low, high = _extremes(numbers, (axis,))
        return torch.where((numbers == NOBODY) & (low == high), low, numbers).expand(self._values[node].shape)

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

    def _columns(self, site: WeightSite, use: Use) -> Tensor:
        """The units that a use of a weight multiplies by each of its columns, shape (presynaptic_units, …)."""
        columns, positions = self._columns_read(site, use), use.presynaptic_positions()
        if positions is None:
            return columns
        result = torch.zeros(site.presynaptic_units, columns.shape[1], dtype=torch.int64)
        result[positions] = columns
        return result

    def _columns_read(self, site: WeightSite, use: Use) -> Tensor:
        """The same at each presynaptic position of the use, in the operator's order."""
        call, source = use.call, _source(use)
        sizes = [call.lengths[index] for index in call.presynaptic]
        channels = math.prod(sizes)
        if source.is_tokens:
            name = f"tokens of {site.name}"
            return self.numbers.once((source.node, channels), name, "input", channels).long()[:, None]
        numbers = self.activations[source.node]
        if isinstance(numbers, Tensor) and numbers.dim() >= len(source.axes):
            if len(source.axes) > 1:  # an activation that has no axis for groups, or one of length 1, feeds all of them
                numbers = _with_axes(numbers, source.axes, sizes)
            axes = [_within(axis, numbers.dim()) for axis in source.axes]
            (once,) = _once_along_expanded(numbers.movedim(axes, list(range(len(axes)))))
            shape = [numbers.shape[axis] for axis in axes]
            columns = once.expand(*shape, *once.shape[len(axes) :]).reshape(math.prod(shape), -1)
            if columns.shape[0] == channels:
                return self.numbers.standing(columns)
            # Without example inputs, sides are invented: a feature map that was flattened channel by channel?
            units, counts = torch.unique_consecutive(columns[:, 0], return_counts=True)
            if channels % len(units) == 0 and bool((counts == counts[0]).all()):
                return self.numbers.standing(units.repeat_interleave(channels // len(units))[:, None])
        node = source.node
        name = self._name(node) if node in self._operations else node.name
        return self.numbers.once((node, channels), name, self._origin(node), channels).long()[:, None]

    def _reading(self, site: WeightSite, columns: Sequence[Tensor]) -> Reading:
        if site.surroundings is not None:
            return self._reading_inside(site, site.surroundings, columns)
        found = torch.cat(list(columns), 1)
        units = found[found != NOBODY].unique()
        numbers, remark = found.amax(1), ""
        if not bool(is_one(found).all()):
            remark = "reads different units by the same synapses"
            if all(bool(is_one(column).all()) for column in columns):
                remark = f"used {len(columns)} times, on different units"
            origin = "input" if self.numbers.are_inputs(units) else "shared"
            name = f"positions of {site.name}"
            numbers = self.numbers.once((site.name, "shared"), name, origin, len(numbers)).long()
        if bool((numbers == NOBODY).any()):
            name = f"constants read by {site.name}"
            own = self.numbers.once((site.name, "constant"), name, "constant", len(numbers)).long()
            numbers = torch.where(numbers == NOBODY, own, numbers)
        signed = next((self._signed[use.node] for use in site.calls if self._signed[use.node]), "")
        return Reading(numbers, signed, remark, units)

    def _reading_inside(self, site: WeightSite, where: str, columns: Sequence[Tensor]) -> Reading:
        """Nobody knows what arrives at a weight inside an island or part, so its positions are units of their own."""
        is_embedding = site.operator == "embedding"  # whose presynaptic units are tokens, no neurons
        name = f"{'tokens' if is_embedding else 'positions'} of {site.name}"
        origin = "input" if is_embedding else "shared"
        numbers = self.numbers.once((site.name, "island"), name, origin, site.presynaptic_units).long()
        units = torch.cat([numbers[:, None], *columns], 1).unique()
        return Reading(numbers, where, f"is in {where}, where units cannot be followed", units[units != NOBODY])


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


def _source(use: Use) -> Source:
    """What an operator on a weight reads."""
    source = use.call.source
    assert source is not None, f"{use.node} reads several activations"
    return source


def _within(axis: int, rank: int) -> int:
    """An axis of a tensor; a matrix times a vector has its units on the only axis that there is."""
    return -1 if axis == -2 and rank == 1 else axis


def _placed(numbers: Tensor, axes: Sequence[int], shape: torch.Size) -> Tensor:
    """Numbers on some axes of a tensor, in the order of the numbers' axes, expanded along the others."""
    places = [axis % len(shape) for axis in axes]
    order = sorted(range(len(places)), key=places.__getitem__)
    sizes = [length if axis in places else 1 for axis, length in enumerate(shape)]
    return numbers.permute(order).reshape(sizes).expand(shape)


def _with_axes(numbers: Tensor, axes: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Numbers with axes of the given sizes, expanded where they have none or one of length 1."""
    rank = max(numbers.dim(), *(-axis for axis in axes), *(axis + 1 for axis in axes))
    shape = [1] * (rank - numbers.dim()) + list(numbers.shape)
    for axis, size in zip(axes, sizes, strict=True):
        shape[axis] = size if shape[axis] == 1 else shape[axis]
    return numbers.expand(shape)


def _like(value: Any, numbers: Callable[[Tensor], Tensor]) -> Any:
    return pytree.tree_map(lambda x: numbers(x) if is_activation(x) else None, value)


def _nobody(value: Any) -> Tensor | None:
    return torch.zeros((), dtype=torch.float64).expand(value.shape) if is_activation(value) else None


def _fits(numbers: Any, value: Any) -> bool:
    """Whether unit numbers have the shapes of a value."""
    found = [x.shape for x in pytree.tree_leaves(numbers) if is_activation(x)]
    return found == [x.shape for x in pytree.tree_leaves(value) if is_activation(x)]


def _once_along_expanded(*tensors: Tensor, keep: int | None = None) -> list[Tensor]:
    """Tensors of one shape, with a length of 1 along the axes on which all are expanded, other than `keep`."""
    for axis in range(tensors[0].dim()):
        if axis != keep and all(tensor.stride(axis) == 0 for tensor in tensors):
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
