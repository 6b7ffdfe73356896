"""Unit analysis: sends the numbers of units through a recording."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from biofx.analysis.activity import Activity
from biofx.analysis.forms import Forms, Read
from biofx.analysis.layouts import CannotFollowError, compressed, execute, once, varies
from biofx.analysis.numbers import MOST, NOBODY, UnitNumbers
from biofx.analysis.operators import PRODUCTS_OF_ENTRIES, Kind
from biofx.analysis.recording import Depends, Operation, Recording, Value
from biofx.weights.axes import Axes

if TYPE_CHECKING:
    from torch import fx

PASSES = 8  # times that numbers are sent through a recording, at most
MANY = 1024  # uses of a weight on different units, of which repetitions are left out
FEW = 16  # different units that merge one by one where values along an axis are joined


@dataclass(frozen=True, eq=False)
class Reading:
    """What a weight reads.

    Attributes:
        numbers: the unit behind each presynaptic position, int64, shape (presynaptic_units,). A position that reads
            several units has one of them.
        classes: the number that stands for all units that need one sign with it, in the same shape.
        signed_by: the operator by which their activity can be negative, or an empty string if it cannot.
        remark: why the units cannot be told, so that the positions are units of their own; empty if they can.
        sources: the numbers of all units that reach the positions, also where they cannot be told.
        is_free: for each position, whether it reads the network's inputs or constants only.
        returns: for each postsynaptic unit of the weight, the position at which the weight reads it again, as recurrent
            weights do; −1 if it does not.
    """

    numbers: Tensor
    classes: Tensor
    signed_by: str
    remark: str
    sources: Tensor
    is_free: Tensor
    returns: Tensor


@dataclass(eq=False)
class Orientation:
    """The uses of a weight that agree on its axes.

    Attributes:
        axes: the axes, or None if they cannot be told.
        reads: the uses.
    """

    axes: Axes | None
    reads: list[Read] = field(default_factory=list)


@dataclass(slots=True)
class _Held:
    """Unit numbers of a tensor, and the numbers of the tensor below it that they were taken from."""

    numbers: Tensor
    below: Tensor | None = None
    version: int = 0


class UnitAnalysis:
    """Sends numbers through a recording, again as long as weights find that units are of one class.

    While they travel, numbers are tensors of int64 in the shape of the activation, expanded along axes on which they
    do not differ. Only tensors whose units reach a weight are looked at.

    Attributes:
        numbers: all numbers that were given.
        orientations: the uses of each weight, by its name.
        readings: what each weight reads, by its name.
        outputs: the units that each node of a captured graph returns that has an operator on weights.
    """

    def __init__(self, recording: Recording, forms: Forms, activity: Activity) -> None:
        self.numbers = UnitNumbers()
        self.outputs: dict[fx.Node, Tensor] = {}
        self._recording = recording
        self._forms = forms
        self._activity = activity
        self._held: dict[Value, _Held] = {}
        self._views: dict[Operation, tuple[Tensor, int, list[Tensor]]] = {}  # numbers of all outputs of one operator
        self._reads: dict[Operation, list[Read]] = {}
        self._place = {operation: index for index, operation in enumerate(recording.operations)}
        self.orientations = self._oriented()
        self._of_read = {
            read: (name, i) for name, many in self.orientations.items() for i, o in enumerate(many) for read in o.reads
        }
        self._columns: dict[Read, Tensor] = {}
        self._neural = torch.zeros(0, dtype=torch.bool)
        self._returned = self._returned_by_nodes()
        self._wanted = self._leading_to_weights()
        self._of_network = self._touched_by_weights()
        for _ in range(PASSES):
            self._united = False
            self._run()
            for many in self.orientations.values():
                for orientation in many:
                    self._unite(self._rows(orientation))
            if not self._united:
                break
        self.readings = {name: self._reading(name) for name in self.orientations}

    # --- what is looked at ---------------------------------------------------------------------------------------

    def _oriented(self) -> dict[str, list[Orientation]]:
        found: dict[str, list[Orientation]] = {}
        for read in self._forms.reads:
            self._reads.setdefault(read.operation, []).append(read)
            axes = read.axes()
            known = found.setdefault(read.parameter.name, [])
            same = next((o for o in known if axes is not None and o.axes is not None and o.axes.agree(axes)), None)
            if same is None:
                known.append(same := Orientation(axes))
            same.reads.append(read)
        for read in self._forms.computed:
            self._reads.setdefault(read.operation, []).append(read)
        return found

    def _returned_by_nodes(self) -> dict[fx.Node, list[Value]]:
        """What nodes return that have an operator on weights."""
        nodes = {operation.node for operation in self._reads if operation.node is not None}
        found = {node: pytree.tree_leaves(self._recording.nodes.get(node)) for node in nodes}
        return {node: [x for x in leaves if isinstance(x, Value)] for node, leaves in found.items()}

    def _leading_to_weights(self) -> set[Value]:
        """The tensors whose units are carried to a weight, or returned by one; those below views stand for them."""
        wanted = {
            _below(v) for reads in self._reads.values() for r in reads for v in (r.source, r.output) if v is not None
        }
        wanted |= {_below(value) for values in self._returned.values() for value in values}
        for operation in reversed(self._recording.operations):
            if any(_below(v) in wanted for v in (*operation.outputs, *operation.written)):
                wanted.update(map(_below, self._carried(operation)))
        return wanted

    def _carried(self, operation: Operation) -> list[Value]:
        """The operands whose units an operator takes up."""
        kind, operands = operation.kind, [v for v in operation.operands if v.is_activity]
        if kind in (Kind.CONSTANT, Kind.UNKNOWN) or operation in self._reads:
            return []
        if kind is Kind.ATTENTION:
            return [operation.argument("value")]
        if kind is Kind.PRODUCT:
            return operands[-1:]
        if kind in (Kind.KEEP, Kind.NORM, Kind.WINDOW, Kind.REDUCE, Kind.ALONG, Kind.CONVOLUTION):
            return operands[:1]
        return operands

    # --- one pass ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._held.clear()
        self._views.clear()
        for operation in self._recording.operations:
            reads = self._reads.get(operation, ())
            for read in reads:
                self._columns[read] = columns = self._read_columns(read)
                self._unite(columns)
            if not any(_below(v) in self._wanted for v in (*operation.outputs, *operation.written)):
                continue
            if not _makes_views(operation):  # whose numbers are taken from the tensor below when they are asked for
                found = self._after(operation, reads)
                for output, numbers in zip(operation.outputs, found, strict=True):
                    self._hold(operation, output, numbers)
                for value in operation.written:
                    if value not in operation.outputs:
                        self._hold(operation, value, found[0] if found else self._unknown(operation, value, 0))
            if operation.node in self._returned:
                values = [v for v in self._returned[operation.node] if v in operation.outputs]
                if operation.node is not None and values:
                    self.outputs[operation.node] = self._of(values[0])

    def _unite(self, rows: Tensor | None) -> None:
        """Make one class of what each position of a weight reads, unless it mixes positions."""
        if rows is not None and rows.shape[1] > 1 and not self._mixes_positions(rows):
            self._united |= self.numbers.unite(rows)

    def _rows(self, orientation: Orientation) -> Tensor | None:
        """The units that each presynaptic position of a weight reads, over all uses; None if there are none to tell."""
        axes = orientation.axes
        if axes is None or any(read.source is None or read.others for read in orientation.reads):
            return None
        rows: dict[bytes, Tensor] = {}
        for read in orientation.reads:
            columns = self._columns[read]
            placed = torch.zeros(axes.presynaptic_units, columns.shape[1], dtype=torch.int64)
            placed[read.presynaptic_positions(axes)] = columns
            rows.setdefault(placed.numpy().tobytes(), placed)
        return torch.cat(list(rows.values()), 1)

    def _mixes_positions(self, rows: Tensor) -> bool:
        """Whether a position reads several units of which another position reads one, as weights over tokens do."""
        rows = self.numbers.classes(rows)
        if rows.shape[0] < 2 or rows.shape[1] < 2:
            return False
        positions = torch.arange(len(rows))[:, None].expand_as(rows)
        known = (rows != NOBODY) & ~self.numbers.are_open(rows)
        pairs = torch.unique(positions[known] << 32 | rows[known])
        position, unit = pairs >> 32, pairs & 0xFFFFFFFF
        _, index, readers = torch.unique(unit, return_inverse=True, return_counts=True)
        of_position = torch.bincount(position, minlength=len(rows))
        return bool(((readers[index] > 1) & (of_position[position] > 1)).any())

    # --- unit numbers of tensors ---------------------------------------------------------------------------------

    def _of(self, value: Value) -> Tensor:
        """The unit numbers of a tensor now."""
        held, below = self._held.get(value), value.view_of
        if below is None:
            if held is None:
                self._held[value] = held = _Held(self._source(value))
            return held.numbers
        numbers = self._of(below)
        if held is None or held.below is not numbers or held.version != numbers._version:
            self._held[value] = held = _Held(self._seen(value, numbers), numbers, numbers._version)
        return held.numbers

    def _seen(self, value: Value, below: Tensor) -> Tensor:
        """The numbers of a view, from those of the tensor below it."""
        operation = value.producer
        assert operation is not None
        index, version = operation.outputs.index(value), below._version
        known = self._views.get(operation)
        if known is None or known[0] is not below or known[1] != version:
            try:
                found = [compressed(x) for x in execute(operation, lambda v: below if v is value.view_of else None)]
            except CannotFollowError:
                found = [self._unknown(operation, v, i) for i, v in enumerate(operation.outputs)]
            self._views[operation] = known = below, version, found
        return known[2][index]

    def _source(self, value: Value) -> Tensor:
        """The numbers of a tensor that no operator of the run made."""
        if not value.is_activity or value.kind not in ("input", "unknown"):
            return _nobody(value.shape)
        name, origin = f"input {value.name}", "input"
        if value.kind == "unknown":
            name, origin = "a tensor that no operator made", "foreign"
        return self.numbers.base(_maker(value), name, origin, value.shape.numel()).view(value.shape)

    def _unknown(self, operation: Operation, value: Value, index: int) -> Tensor:
        """A unit for each entry of what an operator makes that cannot be followed."""
        if not value.is_activity or value.shape.numel() > MOST:
            return _nobody(value.shape)
        origin = "input" if self._is_made_of_inputs(operation) else "unknown"
        maker = (self._place[operation], index, origin)
        return self.numbers.base(maker, operation.described, origin, value.shape.numel()).view(value.shape)

    def _is_made_of_inputs(self, operation: Operation) -> bool:
        """Whether no unit of the network is in what an operator is given."""
        return operation not in self._reads and not any(_below(v) in self._of_network for v in operation.operands)

    def _touched_by_weights(self) -> set[Value]:
        """The tensors that a weight had a part in."""
        touched: set[Value] = set()
        for operation in self._recording.operations:
            if operation in self._reads or any(_below(v) in touched for v in operation.operands):
                touched.update(map(_below, (*operation.outputs, *operation.written)))
        return touched

    def _hold(self, operation: Operation, value: Value, numbers: Tensor) -> None:
        """Note the numbers of what an operator returns or changes; what is written into a view is in what is below."""
        if value.view_of is None:
            self._held[value] = _Held(numbers)
            return
        views = [value]
        while views[-1].view_of is not None:
            views.append(views[-1].view_of)
        root = views.pop()
        memory = self._of(root)
        if memory.storage_offset() or not memory.is_contiguous() or memory._base is not None:
            memory = memory.contiguous().clone()
            self._held[root] = _Held(memory)
        target = memory
        for view in reversed(views):
            made = view.producer
            assert made is not None
            try:
                target = execute(made, _in_place_of(view.view_of, target))[made.outputs.index(view)]
            except CannotFollowError:
                self._held[root] = _Held(self._unknown(operation, root, len(operation.outputs)))
                return
        if target.untyped_storage().data_ptr() != memory.untyped_storage().data_ptr():  # numbers lie in another order
            self._held[root] = _Held(self._unknown(operation, root, len(operation.outputs)))
            return
        target.copy_(numbers)

    # --- operators -----------------------------------------------------------------------------------------------

    def _after(self, operation: Operation, reads: Sequence[Read]) -> list[Tensor]:
        """The unit numbers of what an operator returns."""
        outputs = operation.outputs
        if reads:
            return [self._postsynaptic(operation, reads, v, i) for i, v in enumerate(outputs)]
        if operation.kind is Kind.CONSTANT or self._is_constant(operation):
            return [_nobody(v.shape) for v in outputs]
        if not any(v.is_activity for v in operation.operands):
            return [self._of_integers(operation, v, i) for i, v in enumerate(outputs)]
        try:
            found = _RULES[operation.kind](self, operation)
        except CannotFollowError:
            found = [None] * len(outputs)
        return [
            self._unknown(operation, v, i) if x is None or x.shape != v.shape else x
            for i, (v, x) in enumerate(zip(outputs, found, strict=True))
        ]

    def _is_constant(self, operation: Operation) -> bool:
        """Whether no unit and no input is in what an operator is given."""
        if operation.depends is Depends.INPUTS:
            return False
        return all(_is_nobody(self._of(v)) for v in operation.operands if v.is_activity)

    def _of_integers(self, operation: Operation, value: Value, index: int) -> Tensor:
        """Activity that is made of integers is an input; masks are nobody's."""
        given = [v for v in operation.operands if v.depends is Depends.INPUTS]
        if all(v.dtype is torch.bool for v in given) or not value.is_activity:
            return _nobody(value.shape)
        return self._unknown(operation, value, index)

    def _operands(self, operation: Operation) -> list[Tensor]:
        """The unit numbers of all operands that are activity."""
        return [self._of(v) for v in operation.operands if v.is_activity]

    def _first(self, operation: Operation) -> Tensor:
        return self._of(next(v for v in operation.operands if v.is_activity))

    def _layout(self, operation: Operation) -> list[Tensor | None]:
        moved = execute(operation, lambda v: self._of(v) if v.is_activity else None)
        return [compressed(x) for x in moved]

    def _concatenate(self, operation: Operation) -> list[Tensor | None]:
        """A parameter next to units, as a class token next to other tokens, is their activity at another position."""
        shape = operation.outputs[0].shape
        tensors = [self._of(v) for v in operation.operands]
        axis = operation.argument("dim")
        if operation.name == "stack":
            axis %= len(shape)
            tensors = [tensor.unsqueeze(axis) for tensor in tensors]
        tensors = [tensor for tensor in tensors if tensor.dim() == len(shape)]  # cat takes empty tensors of one axis
        axis %= len(shape)
        lengths = [tensor.shape[axis] for tensor in tensors]
        tensors = [t.narrow(axis, 0, 1).expand([n if i == axis else t.shape[i] for i in range(t.dim())])
                   if n and not varies(t, axis) else t for t, n in zip(tensors, lengths, strict=True)]  # fmt: skip
        joined = torch.cat(_once_apart(tensors, axis), axis)
        low = _lowest(joined, (axis,))
        is_one = torch.equal(low, joined.amax(axis, keepdim=True))
        return [(low if is_one else compressed(joined)).expand(shape)]

    def _keep(self, operation: Operation) -> list[Tensor | None]:
        """The first output has the units; others hold statistics."""
        first, *others = operation.outputs
        return [_expanded(self._first(operation), first.shape), *(_nobody(v.shape) for v in others)]

    def _merge(self, operation: Operation) -> list[Tensor | None]:
        operands = self._operands(operation)
        if operation.name == "glu":
            operands = list(operands[0].chunk(2, operation.argument("dim")))
        if operation.name in PRODUCTS_OF_ENTRIES:
            operands = self._without_common_factors(operands)
        result = operands[0]
        for other in operands[1:]:
            result = self._merged(operation, result, other)
        return [_expanded(result, v.shape) for v in operation.outputs]

    def _without_common_factors(self, operands: list[Tensor]) -> list[Tensor]:
        """The operands of a product, but for one unit that multiplies many alike: as a norm, it makes no new units."""
        return [x for x in operands if not self._is_one(x)] or operands

    def _is_one(self, numbers: Tensor) -> bool:
        """Whether there is one unit, or nobody, in a tensor."""
        (small,) = once(numbers)
        return small.numel() <= 1 or len(self.numbers.classes(small).unique()) == 1

    def _merged(self, operation: Operation, a: Tensor, b: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = once(a.expand(shape), b.expand(shape))
        return compressed(self.numbers.merge(self._place[operation], operation.described, a, b)).expand(shape)

    def _reduce(self, operation: Operation) -> list[Tensor | None]:
        numbers = self._first(operation)
        axes = operation.argument("dim")
        if axes is None or axes == []:
            axes = range(numbers.dim())
        axes = tuple({axis % max(1, numbers.dim()) for axis in ((axes,) if isinstance(axes, int) else axes)})
        joined = self._join(operation, numbers, axes) if numbers.dim() else numbers
        return [joined if v.shape == joined.shape else joined.reshape(v.shape) for v in operation.outputs]

    def _along(self, operation: Operation) -> list[Tensor | None]:
        numbers = self._first(operation)
        axes = operation.argument("dim")
        for axis in (axes,) if isinstance(axes, int) else axes:
            if varies(numbers, axis):
                raise CannotFollowError("different units meet along an axis")
            numbers = numbers.narrow(axis, 0, min(1, numbers.shape[axis]))
        return [numbers.expand(v.shape) if v.is_activity else _nobody(v.shape) for v in operation.outputs]

    def _window(self, operation: Operation) -> list[Tensor | None]:
        """What pools and interpolates takes a feature map for one unit at many places, as convolutions do."""
        numbers = self._first(operation)
        match = re.search(r"([123])d", operation.name)
        space = int(match[1]) if match else numbers.dim() - 2
        axes = tuple(range(numbers.dim() - space, numbers.dim()))
        flat = once(numbers)[0].flatten(axes[0])
        rows = self.numbers.classes(flat.flatten(0, -2) if flat.dim() > 1 else flat[None])
        if not self.numbers.may_be_one(rows):
            raise CannotFollowError("different units lie next to each other")
        self._united |= self.numbers.unite(rows)
        low = _lowest(numbers, axes)
        return [low.expand(v.shape) if v.is_activity else _nobody(v.shape) for v in operation.outputs]

    def _write(self, operation: Operation) -> list[Tensor | None]:
        target, source = self._of(operation.operands[0]), self._of(_source_of_write(operation))
        if operation.name == "copy":
            return [source.expand(target.shape)]
        return [self._written(operation, target, source)]

    def _written(self, operation: Operation, target: Tensor, source: Tensor) -> Tensor:
        axes = _written_axes(operation)
        is_known = not any(v.depends is Depends.INPUTS for v in operation.operands if not v.is_activity)
        if (
            is_known
            and axes is not None
            and not operation.name.endswith(("add", "reduce"))
            and not operation.argument("accumulate")
        ):
            wrote = _executed(operation, target.contiguous().clone(), source)
            if wrote is not None:
                return compressed(wrote)
        if axes is None or any(varies(source, axis) for axis in axes[1] if axis < source.dim()):
            raise CannotFollowError("its inputs choose where units go")
        for axis in sorted((a for a in axes[1] if a < source.dim()), reverse=True):
            source = source.select(axis, 0) if source.shape[axis] else source.new_zeros(())
        for axis in axes[0]:
            if source.dim() < target.dim():
                source = source.unsqueeze(axis)
        return self._merged(operation, target, source.expand(target.shape))

    def _mix(self, operation: Operation) -> list[Tensor | None]:
        """The rows of the second operand, weighted by the first, join."""
        if operation.kind is Kind.ATTENTION:
            numbers = self._of(operation.argument("value"))
        else:
            value = [v for v in operation.operands if v.is_activity][-1]
            if value.depends is not Depends.INPUTS:
                raise CannotFollowError("it multiplies units by constants")
            numbers = self._of(value)
        if operation.outputs[0].shape[-1:] != numbers.shape[-1:] or numbers.dim() < 2:
            raise CannotFollowError("it multiplies activities")
        joined = self._join(operation, numbers, (numbers.dim() - 2,))
        first, *others = operation.outputs
        return [_expanded(joined, first.shape), *(_nobody(v.shape) for v in others)]

    def _gates(self, operation: Operation) -> list[Tensor | None]:
        """A fused step of a recurrent layer: gates lie next to each other, and all of them join the state."""
        given, hidden, state, *_ = self._operands(operation)
        count = 4 if "lstm" in operation.name else 3
        result = state
        for numbers in (given, hidden):
            for part in numbers.chunk(count, -1):
                result = self._merged(operation, result, part)
        return [_expanded(result, v.shape) for v in operation.outputs]

    def _convolved(self, operation: Operation) -> list[Tensor | None]:
        """A convolution by a constant, one kernel for each channel, keeps units, as blurring does."""
        given = operation.operands[0]
        groups = operation.argument("groups")
        if groups != given.shape[1] or operation.outputs[0].shape[1] != groups:
            raise CannotFollowError("it convolves by what is no parameter")
        return self._window(operation)

    def _join(self, operation: Operation, numbers: Tensor, axes: tuple[int, ...]) -> Tensor:
        """What values along axes have become together, each of size 1."""
        (small,) = once(numbers)
        kept = [axis for axis in range(small.dim()) if axis not in axes]
        columns = small.permute(*kept, *axes).reshape(*[small.shape[a] for a in kept], -1)
        if columns.numel() and columns.shape[-1] > 1:
            columns = self.numbers.classes(columns)
            low = torch.where(columns == NOBODY, torch.iinfo(torch.int64).max, columns).amin(-1)
            low = torch.where(low == torch.iinfo(torch.int64).max, NOBODY, low)
            high = columns.amax(-1)
            if torch.equal(low, high):
                result = low
            else:
                different = torch.unique(columns.flatten(0, -2), dim=1) if columns.dim() > 1 else columns.unique()[None]
                if different.shape[-1] > FEW:
                    result = self._pooled(operation, columns, low)
                else:
                    result = different[:, 0]
                    for other in different.unbind(-1)[1:]:
                        result = self.numbers.merge(self._place[operation], operation.described, result, other)
                    result = result.view(columns.shape[:-1])
        else:
            result = columns.squeeze(-1) if columns.shape[-1] == 1 else columns.new_zeros(columns.shape[:-1])
        shape = [1 if axis in axes else small.shape[axis] for axis in range(small.dim())]
        full = [1 if axis in axes else numbers.shape[axis] for axis in range(numbers.dim())]
        return result.reshape(shape).expand(full)

    def _pooled(self, operation: Operation, columns: Tensor, like: Tensor) -> Tensor:
        """The pool of many units is a unit of its own: one for each different pool."""
        different, inverse = torch.unique(columns.flatten(0, -2), dim=0, return_inverse=True)
        owner = self.numbers.owner()
        origins = {self.numbers.populations[i].origin for i in owner[different.unique()].unique().tolist()}
        origin = "input" if origins <= {"input", "constant"} else "merged"
        maker = ("pool", different.numpy().tobytes(), origin)
        return self.numbers.base(maker, operation.described, origin, len(different))[inverse].view(like.shape)

    # --- weights -------------------------------------------------------------------------------------------------

    def _read_columns(self, read: Read) -> Tensor:
        """The units that a use multiplies by each of its columns, shape (positions, units), without repetitions."""
        if read.source is None:
            return torch.zeros(
                math.prod(n for n, r in zip(read.lengths, read.roles, strict=True) if r[0]), 1, dtype=torch.int64
            )
        numbers = self._of(read.source)
        if read.source.depends is not Depends.INPUTS:
            numbers = _nobody(read.source.shape)
        axes = [axis % numbers.dim() for axis in read.source_axes]
        (small,) = once(numbers.movedim(axes, list(range(len(axes)))))
        shape = [numbers.shape[axis] for axis in axes]
        rest = small.shape[len(axes) :]
        columns = small.expand(*shape, *rest).reshape(math.prod(shape), math.prod(rest))
        if columns.shape[1] > 1:
            columns = self.numbers.settled(columns)
            low, high = columns.amin(1, keepdim=True), columns.amax(1, keepdim=True)
            columns = low if torch.equal(low, high) else columns
            if 1 < columns.shape[1] <= MANY:
                columns = torch.unique(columns, dim=1)
        return columns

    def _postsynaptic(self, operation: Operation, reads: Sequence[Read], value: Value, index: int) -> Tensor:
        """The units that an operator on weights returns."""
        read = reads[0]
        if value is not read.output:
            return _nobody(value.shape) if not value.is_activity else self._unknown(operation, value, index)
        return _placed(self.units_of(read), [axis % len(value.shape) for axis in read.output_axes], value.shape)

    def units_of(self, read: Read) -> Tensor:
        """The numbers of the postsynaptic units of a use, in order."""
        name, index = self._of_read.get(read, (", ".join(read.names), 0))
        axes = self.orientations[name][index].axes if read in self._of_read else None
        if axes is None:  # each of its uses has units of its own
            count = math.prod(n for n, role in zip(read.lengths, read.roles, strict=True) if role[1])
            return self.numbers.base(("use", self._place[read.operation]), name, "weight", count)
        numbers = self.numbers.base(("weight", name, index), name, "weight", axes.units)
        return numbers[read.postsynaptic_positions(axes)]

    # --- reading -------------------------------------------------------------------------------------------------

    def judged(self, name: str) -> Orientation:
        """The uses of a weight that decide on its signs: those that read units, if others read tokens or inputs."""
        return next(iter(self._deciding(name)), self.orientations[name][0])

    def is_judged_by(self, read: Read) -> bool:
        """Whether a use is one of those that decide on its weight's signs."""
        return read not in self._of_read or read in self.judged(self._of_read[read][0]).reads

    def _deciding(self, name: str) -> list[Orientation]:
        many = self.orientations[name]
        if len(many) == 1:
            return many
        return [o for o in many if o.axes is None or not self._is_free(self._rows(o)).all()]

    def _is_free(self, rows: Tensor | None) -> Tensor:
        """For each row, whether it holds inputs and constants only."""
        if rows is None:
            return torch.ones(1, dtype=torch.bool)
        return ~self._is_neural[self.numbers.classes(rows)].any(1)

    @property
    def _is_neural(self) -> Tensor:
        """By number: whether a unit of the network is in its class."""
        if len(self._neural) != len(self.numbers):
            inputs = [i for i, p in enumerate(self.numbers.populations) if p.origin in ("input", "constant")]
            neural = ~torch.isin(self.numbers.owner(), torch.tensor(inputs))
            classes = self.numbers.classes(torch.arange(len(self.numbers)))
            of_class = torch.zeros(len(self.numbers), dtype=torch.bool)
            of_class[classes[neural]] = True
            self._neural = of_class[classes]
        return self._neural

    def _reading(self, name: str) -> Reading:
        orientation = self.judged(name)
        rows = self._rows(orientation)
        remark = self._why_not_judged(name, orientation, rows)
        first = orientation.reads[0]
        signed = next(
            (
                s
                for r in orientation.reads
                if r.source is not None and (s := self._activity.read(r.operation, r.source))
            ),
            "",
        )
        axes = orientation.axes
        count = axes.presynaptic_units if axes is not None else len(self._columns[first])
        sources = rows[rows != NOBODY].unique() if rows is not None else torch.zeros(0, dtype=torch.int64)
        if first.source is None and not remark:
            numbers = self.numbers.base((name, "tokens"), f"tokens of {name}", "input", count)
        elif remark or rows is None:
            numbers = self.numbers.base((name, "positions"), f"positions of {name}", "shared", count)
        else:
            numbers = rows.amax(1)
            own = (
                self.numbers.base((name, "constants"), f"constants read by {name}", "constant", count)
                if bool((numbers == NOBODY).any())
                else numbers
            )
            numbers = torch.where(numbers == NOBODY, own, numbers)
        is_free = torch.ones(count, dtype=torch.bool) if first.source is None else ~self._is_neural[numbers]
        returns = self._returns(name, orientation, rows)
        return Reading(numbers, self.numbers.classes(numbers), signed, remark, sources, is_free & (not remark), returns)

    def _returns(self, name: str, orientation: Orientation, rows: Tensor | None) -> Tensor:
        """Where a weight reads its own postsynaptic units again."""
        if orientation.axes is None:
            return torch.zeros(0, dtype=torch.int64)
        index = self.orientations[name].index(orientation)
        own = self.numbers.base(("weight", name, index), name, "weight", orientation.axes.units)
        found = torch.full((len(own),), -1)
        if rows is None:
            return found
        for column in rows.unbind(1):
            for part in self.numbers.parts_of(column):
                is_own = (part >= own[0]) & (part <= own[-1]) if len(own) else part < 0
                found[part[is_own] - own[0]] = is_own.nonzero().flatten()
        return found

    def _why_not_judged(self, name: str, orientation: Orientation, rows: Tensor | None) -> str:
        first = orientation.reads[0]
        deciding = self._deciding(name)
        remark = next((r.form.remark for o in deciding for r in o.reads if r.form.remark), "")
        if len(deciding) > 1:
            kinds = ", ".join(dict.fromkeys(f"{o.reads[0].operation.called} ({o.axes})" for o in deciding))
            return f"units read it along several of its axes, so all its entries would need one sign: {kinds}"
        if orientation.axes is None:
            return f"which of its axes run over units is lost on the way to {first.operation.called}"
        if any(read.others for read in orientation.reads):
            return f"{first.operation.called} multiplies several activities, so no unit acts with the sign of a weight"
        if remark:
            return remark
        if rows is None:
            return ""
        if self._mixes_positions(rows):
            return "reads different units by the same synapses"
        owner = self.numbers.owner()
        origins = {self.numbers.populations[i].origin for i in owner[rows].unique().tolist()}
        if "foreign" in origins:
            return "reads a tensor that no operator of the run made, such as one from numpy or another thread"
        if len(rows) > 1 and len(self.numbers.classes(rows.amax(1)).unique()) == 1 and len(rows.amax(1).unique()) > 1:
            return "what it reads is read by other weights along other axes, so that all its units would need one sign"
        state = self._carried_state(rows)
        if state:
            return (
                f"it reads input {state}, which looks like a state that is carried from call to call; "
                "give example_inputs a function that runs the model for several steps"
            )
        return ""

    def _carried_state(self, rows: Tensor) -> str:
        """The input that looks like a state, if a weight reads it and no unit of the network."""
        if not bool(self._is_free(rows).all()):
            return ""
        inputs = [v for v in self._recording.inputs if v.is_activity]
        shapes = [v.shape for v in self._recording.outputs if v.depends is Depends.INPUTS]
        read = set(self.numbers.owner()[rows].unique().tolist())
        for value in inputs[1:]:
            if value.shape in shapes and self.numbers.population_of(_maker(value)) in read:
                return value.name
        return ""


def _maker(value: Value) -> tuple[object, ...]:
    """What made the units of a tensor that is there before the run: an input of several calls is the same each time."""
    return (value.kind, value.name, value.shape) if value.kind == "input" else (value.kind, value.index)


def _in_place_of(value: Value | None, tensor: Tensor) -> Callable[[Value], Tensor | None]:
    return lambda other: tensor if other is value else None


def _makes_views(operation: Operation) -> bool:
    return bool(operation.outputs) and operation.outputs[0].view_of is not None and not operation.written


def _below(value: Value) -> Value:
    """The tensor whose memory a value shares."""
    while value.view_of is not None:
        value = value.view_of
    return value


def _nobody(shape: Sequence[int]) -> Tensor:
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def _is_nobody(numbers: Tensor) -> bool:
    """Whether numbers are those of nobody, as far as a glance tells."""
    return not any(numbers.stride()) and bool((numbers[(slice(0, 1),) * numbers.dim()] == NOBODY).all())


def _expanded(numbers: Tensor, shape: torch.Size) -> Tensor | None:
    """Numbers in another shape, if they broadcast to it."""
    try:
        return numbers.expand(shape)
    except RuntimeError:
        return None


def _lowest(numbers: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The lowest number along axes, apart from nobody's, each of size 1."""
    for axis in axes:
        if not varies(numbers, axis):
            numbers = numbers.narrow(axis, 0, min(1, numbers.shape[axis]))
    high = torch.iinfo(torch.int64).max
    low = torch.where(numbers == NOBODY, high, numbers).amin(axes, keepdim=True)
    return torch.where(low == high, NOBODY, low)


def _once_apart(tensors: list[Tensor], axis: int) -> tuple[Tensor, ...]:
    """Tensors to concatenate, with a length of 1 along the other axes on which all are expanded."""
    for other in range(tensors[0].dim()):
        if other != axis and not any(varies(tensor, other) for tensor in tensors):
            tensors = [tensor.narrow(other, 0, min(1, tensor.shape[other])) for tensor in tensors]
    return tuple(tensors)


def _placed(numbers: Tensor, axes: Sequence[int], shape: torch.Size) -> Tensor:
    """Numbers on some axes of a tensor, in the order of the numbers' axes, expanded along the others."""
    if not axes:
        return numbers.reshape([1] * len(shape)).expand(shape)
    sizes = [shape[axis] for axis in axes]
    order = sorted(range(len(axes)), key=axes.__getitem__)
    full = [length if axis in axes else 1 for axis, length in enumerate(shape)]
    return numbers.reshape(sizes).permute(order).reshape(full).expand(shape)


def _source_of_write(operation: Operation) -> Value:
    """The operand that is written."""
    for name in ("src", "source", "values", "value", "self"):
        found = operation.argument(name)
        if isinstance(found, Value) and found is not operation.operands[0]:
            return found
    return operation.operands[0]


def _written_axes(operation: Operation) -> tuple[list[int], list[int]] | None:
    """The axes of the target, and of the source, along which the place of an entry is chosen."""
    dim = operation.argument("dim")
    if isinstance(dim, int):
        axis = dim % max(1, len(operation.operands[0].shape))
        return [axis], [axis]
    if "index_put" in operation.name:
        indices = operation.argument("indices")
        if any(index is None for index in indices):
            return None
        width = sum(len(i.shape) if i.dtype is torch.bool else 1 for i in indices)
        given = max(1 if i.dtype is torch.bool else len(i.shape) for i in indices)
        rank = len(_source_of_write(operation).shape)
        rest = len(operation.operands[0].shape) - width
        return list(range(width)), list(range(max(0, rank - rest)))[:given]
    return None


def _executed(operation: Operation, target: Tensor, source: Tensor) -> Tensor | None:
    """What an operator that writes at known places makes of numbers."""
    written = _source_of_write(operation)
    try:
        return execute(
            operation, lambda v: source.contiguous() if v is written else target if v is operation.operands[0] else None
        )[0]
    except CannotFollowError:
        return None


_RULES: dict[Kind, Callable[[UnitAnalysis, Operation], list[Tensor | None]]] = {
    Kind.LAYOUT: UnitAnalysis._layout,
    Kind.CONCATENATE: UnitAnalysis._concatenate,
    Kind.KEEP: UnitAnalysis._keep,
    Kind.NORM: UnitAnalysis._keep,
    Kind.MERGE: UnitAnalysis._merge,
    Kind.REDUCE: UnitAnalysis._reduce,
    Kind.ALONG: UnitAnalysis._along,
    Kind.WINDOW: UnitAnalysis._window,
    Kind.WRITE: UnitAnalysis._write,
    Kind.PRODUCT: UnitAnalysis._mix,
    Kind.ATTENTION: UnitAnalysis._mix,
    Kind.GATES: UnitAnalysis._gates,
    Kind.CONVOLUTION: UnitAnalysis._convolved,
    Kind.EMBEDDING: lambda analysis, operation: [None] * len(operation.outputs),
    Kind.CONSTANT: lambda analysis, operation: [_nobody(v.shape) for v in operation.outputs],
    Kind.UNKNOWN: lambda analysis, operation: [None] * len(operation.outputs),
}
