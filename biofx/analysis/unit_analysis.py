"""Unit analysis: sends the numbers of units through a recording."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biofx.analysis.layouts import CannotFollowError, moved, once, rearranged
from biofx.analysis.numbers import MOST, NOBODY, UnitNumbers, different_columns
from biofx.analysis.rules import Rules, nobody
from biofx.recording.catalog import Kind
from biofx.recording.operations import Depends, Operation, Recording, Value

if TYPE_CHECKING:
    from biofx.analysis.forms import Forms
    from biofx.analysis.reads import WeightRead
    from biofx.weights.axes import Axes

PASSES = 8  # times that numbers are sent through a recording, at most: if classes still change, the last pass counts


@dataclass(eq=False)
class Orientation:
    """The uses of a weight that agree on its axes.

    Attributes:
        axes: the axes, or None if they are unknown.
        reads: the uses.
    """

    axes: Axes | None
    reads: list[WeightRead] = field(default_factory=list)


class UnitAnalysis:
    """Sends numbers through a recording, again as long as weights find that units are of one class.

    While they travel, numbers are tensors of int64 in the shape of the activation, expanded along axes on which they
    do not differ. Only tensors whose units reach a weight are followed.

    Args:
        recording: the run.
        forms: the parameters in it, and what reads them.

    Attributes:
        numbers: all numbers that were given.
        orientations: the uses of each weight, by its name.
        columns: the units that each use multiplies by each of its columns, shape (positions, units).
    """

    def __init__(self, recording: Recording, forms: Forms) -> None:
        self.numbers = UnitNumbers()
        self._recording = recording
        self._forms = forms
        self._held: dict[Value, Tensor] = {}  # numbers of tensors that are not views
        # Numbers of all outputs of an operator that makes views, with the tensor below and its version.
        self._views: dict[Operation, tuple[Tensor, int, list[Tensor]]] = {}
        self._reads = {read.operation: read for read in (*forms.reads, *forms.computed)}
        self._rows: dict[Orientation, Tensor | None] = {}  # of this pass
        self.orientations = self._oriented()
        self._of_read = {read: o for many in self.orientations.values() for o in many for read in o.reads}
        self.columns: dict[WeightRead, Tensor] = {}
        self._rules = Rules(self.numbers, self._of)
        self._of_network = self._touched_by_weights()
        self._wanted = self._leading_to_weights()
        for _ in range(PASSES):
            before = self.numbers.representative
            self._run()
            for many in self.orientations.values():
                for orientation in many:
                    self._unite(self.rows(orientation))
            if self.numbers.representative is before:  # `unite` puts a new tensor there if it unites anything
                break

    # --- what is followed ----------------------------------------------------------------------------------------

    def _oriented(self) -> dict[str, list[Orientation]]:
        found: dict[str, list[Orientation]] = {}
        for read in self._forms.reads:
            axes = read.axes()
            known = found.setdefault(read.parameter.name, [])
            same = next((o for o in known if axes is not None and o.axes is not None and o.axes.agree(axes)), None)
            if same is None:
                known.append(same := Orientation(axes))
            same.reads.append(read)
        return found

    def _leading_to_weights(self) -> set[Value]:
        """The tensors whose units are carried to a weight, or returned by one; those below views stand for them."""
        wanted = {_below(v) for read in self._reads.values() for v in (read.source, read.output) if v is not None}
        for operation in reversed(self._recording.operations):
            if any(_below(v) in wanted for v in (*operation.outputs, *operation.written)):
                weighing = operation.operands[-2:] if operation.kind is Kind.PRODUCT else ()
                wanted.update(map(_below, (*self.carried(operation), *weighing)))
        return wanted

    def carried(self, operation: Operation) -> list[Value]:
        """The operands whose units an operator takes up."""
        masks = self._masks(operation)
        if masks:
            return masks
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

    def is_of_network(self, value: Value) -> bool:
        """Whether a tensor depends on a weight, as far as that can be known."""
        return _below(value) in self._of_network

    def _masks(self, operation: Operation) -> list[Value]:
        """The comparisons of activity by which alone an operator selects constants, as spikes do."""
        if operation.kind is Kind.CONSTANT or any(
            v.is_activity and v.depends is Depends.INPUTS and v not in operation.written for v in operation.operands
        ):
            return []
        return [v for v in operation.operands if v.dtype is torch.bool and self.is_of_network(v)]

    def is_read(self, operation: Operation) -> bool:
        """Whether an operator multiplies activity by a weight."""
        return operation in self._reads

    # --- one pass ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._held.clear()
        self._views.clear()
        self._rows.clear()
        for operation in self._recording.operations:
            read = self._reads.get(operation)
            if read is not None:
                self.columns[read] = columns = self._read_columns(read)
                self._unite(columns)
            if not any(_below(v) in self._wanted for v in (*operation.outputs, *operation.written)):
                continue
            if not _makes_views(operation):  # whose numbers are taken from the tensor below when they are asked for
                found = self._after(operation, read)
                for output, numbers in zip(operation.outputs, found, strict=True):
                    self._hold(operation, output, numbers)
                for place, value in enumerate(operation.written, len(operation.outputs)):
                    if value not in operation.outputs:  # as of operators on lists, which return nothing
                        is_like = bool(found) and value.shape == operation.outputs[0].shape
                        self._hold(operation, value, found[0] if is_like else self._unknown(operation, value, place))

    def _unite(self, rows: Tensor | None) -> None:
        """Make one class of what each position of a weight reads, unless it mixes positions."""
        if rows is not None and rows.shape[1] > 1 and not self.numbers.mix_positions(rows):
            self.numbers.unite(rows)

    def rows(self, orientation: Orientation) -> Tensor | None:
        """The units that each presynaptic position of a weight reads, over all uses; None if none are known."""
        if orientation not in self._rows:
            self._rows[orientation] = self._joined_rows(orientation)
        return self._rows[orientation]

    def _joined_rows(self, orientation: Orientation) -> Tensor | None:
        axes = orientation.axes
        if axes is None or any(read.source is None or read.others for read in orientation.reads):
            return None
        rows: dict[bytes, Tensor] = {}
        for read in orientation.reads:
            columns = self.columns[read]
            placed = torch.zeros(axes.presynaptic_units, columns.shape[1], dtype=torch.int64)
            placed[read.presynaptic_positions(axes)] = columns
            rows.setdefault(placed.numpy().tobytes(), placed)
        return torch.cat(list(rows.values()), 1)

    # --- unit numbers of tensors ---------------------------------------------------------------------------------

    def _of(self, value: Value) -> Tensor:
        """The unit numbers of a tensor now; those of a view are taken from the tensor below it."""
        if value.view_of is None:
            if value not in self._held:
                self._held[value] = self._source(value)
            return self._held[value]
        operation, below = value.producer, self._of(value.view_of)
        assert operation is not None
        known = self._views.get(operation)
        if known is None or known[0] is not below or known[1] != below._version:
            try:
                found = rearranged(operation, below)
            except CannotFollowError:
                found = [self._unknown(operation, v, i) for i, v in enumerate(operation.outputs)]
            self._views[operation] = known = below, below._version, found
        return known[2][operation.outputs.index(value)]

    def _source(self, value: Value) -> Tensor:
        """The numbers of a tensor that no operator of the run made."""
        if not value.is_activity or value.kind not in ("input", "unknown"):
            return nobody(value.shape)
        name, origin = f"input {value.name}", "input"
        if value.kind == "unknown":
            name, origin = "a tensor that no operator made", "foreign"
        return self.numbers.numbers_for(maker_of(value), name, origin, value.shape.numel()).view(value.shape)

    def _unknown(self, operation: Operation, value: Value, index: int) -> Tensor:
        """A unit for each entry of what an operator makes that cannot be followed."""
        if not value.is_activity or value.shape.numel() > MOST:
            return nobody(value.shape)
        origin = "input" if self._is_made_of_inputs(operation) else "unknown"
        maker = (operation, index, origin)
        return self.numbers.numbers_for(maker, operation.described, origin, value.shape.numel()).view(value.shape)

    def _is_made_of_inputs(self, operation: Operation) -> bool:
        """Whether an operator receives no unit of the network, except for the places from which it takes entries."""
        taken = self.carried(operation) if operation.kind is Kind.LAYOUT else operation.operands
        return operation not in self._reads and not any(map(self.is_of_network, taken))

    def _touched_by_weights(self) -> set[Value]:
        """The tensors that depend on a weight, or on one that no operator made, which may do so."""
        used = {_below(v) for operation in self._recording.operations for v in operation.operands}
        touched = {value for value in used if value.kind == "unknown" and value.is_activity}
        for operation in self._recording.operations:
            if operation in self._reads or any(_below(v) in touched for v in operation.operands):
                touched.update(map(_below, (*operation.outputs, *operation.written)))
        return touched

    def _hold(self, operation: Operation, value: Value, numbers: Tensor) -> None:
        """Note the numbers of what an operator returns or changes; a write into a view changes what is below it."""
        if value.view_of is None:
            self._held[value] = numbers
            return
        views = [value]
        while views[-1].view_of is not None:
            views.append(views[-1].view_of)
        root = views.pop()
        memory = self._of(root)
        # Numbers that are a view may belong to others as well, so they are written into a copy.
        if memory.storage_offset() or not memory.is_contiguous() or memory._base is not None:
            memory = memory.contiguous().clone()
            self._held[root] = memory
        target = memory
        for view in reversed(views):
            made = view.producer
            assert made is not None
            try:
                target = moved(made, target)[made.outputs.index(view)]
            except CannotFollowError:
                self._held[root] = self._unknown(operation, root, len(operation.outputs))
                return
        if target.untyped_storage().data_ptr() != memory.untyped_storage().data_ptr():  # numbers lie in another order
            self._held[root] = self._unknown(operation, root, len(operation.outputs))
            return
        target.copy_(numbers)

    # --- operators -----------------------------------------------------------------------------------------------

    def _after(self, operation: Operation, read: WeightRead | None) -> list[Tensor]:
        """The unit numbers of what an operator returns."""
        outputs = operation.outputs
        if read is not None:
            return [self._postsynaptic(read, v, i) for i, v in enumerate(outputs)]
        if operation.kind is Kind.CONSTANT or self._is_constant(operation):
            return [nobody(v.shape) for v in outputs]
        masks = self._masks(operation)
        if masks:
            return [self._spikes(operation, v, i, masks) for i, v in enumerate(outputs)]
        if not any(v.is_activity for v in operation.operands):
            return [self._of_integers(operation, v, i) for i, v in enumerate(outputs)]
        return [
            self._unknown(operation, v, i) if x is None or x.shape != v.shape else x
            for i, (v, x) in enumerate(zip(outputs, self._rules(operation), strict=True))
        ]

    def _is_constant(self, operation: Operation) -> bool:
        """Whether an operator receives neither units nor inputs, or only empty tensors."""
        if not any(v.shape.numel() for v in operation.operands if v.is_activity):
            return any(v.is_activity for v in operation.operands)
        if operation.depends is Depends.INPUTS:
            return False
        return all(_is_nobody(self._of(v)) for v in operation.operands if v.is_activity)

    def _spikes(self, operation: Operation, value: Value, index: int, masks: list[Value]) -> Tensor:
        """The units whose activity was compared, in what is made of the comparisons."""
        numbers = self._of(masks[0])
        for mask in masks[1:]:
            numbers = self._rules.merged(operation, numbers, self._of(mask))
        return numbers if numbers.shape == value.shape else self._unknown(operation, value, index)

    def _of_integers(self, operation: Operation, value: Value, index: int) -> Tensor:
        """Activity that is made of integers is an input; masks are nobody's."""
        given = [v for v in operation.operands if v.depends is Depends.INPUTS]
        if all(v.dtype is torch.bool for v in given) or not value.is_activity:
            return nobody(value.shape)
        return self._unknown(operation, value, index)

    # --- weights -------------------------------------------------------------------------------------------------

    def _read_columns(self, read: WeightRead) -> Tensor:
        """The units that a use multiplies by each of its columns, shape (positions, units), without repetitions."""
        if read.source is None:
            return torch.zeros(read.count(0), 1, dtype=torch.int64)
        numbers = self._of(read.source)
        if read.source.depends is not Depends.INPUTS:
            numbers = nobody(read.source.shape)
        axes = [axis % numbers.dim() for axis in read.source_axes]
        (small,) = once(numbers.movedim(axes, list(range(len(axes)))))
        shape = [numbers.shape[axis] for axis in axes]
        rest = small.shape[len(axes) :]
        columns = small.expand(*shape, *rest).reshape(math.prod(shape), math.prod(rest))
        if columns.shape[1] > 1:
            columns = self.numbers.settled(columns)
            low, high = columns.amin(1, keepdim=True), columns.amax(1, keepdim=True)
            columns = low if torch.equal(low, high) else columns
            columns = different_columns(columns)
        return columns

    def _postsynaptic(self, read: WeightRead, value: Value, index: int) -> Tensor:
        """The units that an operator on weights returns."""
        if value is not read.output:
            return nobody(value.shape) if not value.is_activity else self._unknown(read.operation, value, index)
        return read.placed(self._units_of(read))

    def _units_of(self, read: WeightRead) -> Tensor:
        """The numbers of the postsynaptic units of a use, in order; the same in each pass."""
        orientation = self._of_read.get(read)
        if orientation is None or orientation.axes is None:  # each of its uses has units of its own
            name = read.parameter.name if orientation is not None else ", ".join(read.names)
            return self.numbers.numbers_for(("use", read.operation), name, "weight", read.count(1))
        own = self.own(read.parameter.name, orientation)
        return own[read.postsynaptic_positions(orientation.axes)]

    def own(self, name: str, orientation: Orientation) -> Tensor:
        """The numbers of the postsynaptic units that a weight has by the uses that agree on its axes."""
        assert orientation.axes is not None
        return self.numbers.numbers_for(orientation, name, "weight", orientation.axes.units)


def maker_of(value: Value) -> tuple[object, ...]:
    """What made the units of a tensor that is there before the run: an input of several calls is the same each time."""
    return (value.kind, value.name, value.shape) if value.kind == "input" else (value.kind, value.index)


def _makes_views(operation: Operation) -> bool:
    return bool(operation.outputs) and operation.outputs[0].view_of is not None and not operation.written


def _below(value: Value) -> Value:
    """The tensor whose memory a value shares."""
    while value.view_of is not None:
        value = value.view_of
    return value


def _is_nobody(numbers: Tensor) -> bool:
    """Whether numbers are those of nobody, as far as a quick test shows."""
    return not any(numbers.stride()) and bool((numbers[(slice(0, 1),) * numbers.dim()] == NOBODY).all())
