"""Rules: what operators do to the numbers of units.

While they travel, numbers are tensors of int64 in the shape of the activation, expanded along axes on which they do not
differ. Layout operators are executed on them; every other kind of operator has a rule here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from biofx.analysis.layouts import CannotFollowError, compressed, execute, once, varies
from biofx.analysis.numbers import NOBODY, UnitNumbers
from biofx.recording.catalog import PRODUCTS_OF_ENTRIES, Kind
from biofx.recording.operations import Depends, Operation, Value

FEW = 16  # different units that merge one by one where values along an axis are joined


def nobody(shape: Sequence[int]) -> Tensor:
    """The numbers of a tensor that holds no units."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


class Rules:
    """The numbers of what operators return, from those of their operands.

    Args:
        numbers: where new units get their numbers; units that turn out to be one are united there.
        of: the numbers of an operand.
    """

    def __init__(self, numbers: UnitNumbers, of: Callable[[Value], Tensor]) -> None:
        self._numbers = numbers
        self._of = of

    def __call__(self, operation: Operation) -> list[Tensor | None]:
        """The numbers of each tensor that an operator returns; None where they are unknown."""
        try:
            return _RULES[operation.kind](self, operation)
        except CannotFollowError:
            return [None] * len(operation.outputs)

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
        joined = torch.cat(once(*tensors, keep=axis), axis)
        low = _lowest(joined, (axis,))
        is_one = torch.equal(low, joined.amax(axis, keepdim=True))
        return [(low if is_one else compressed(joined)).expand(shape)]

    def _keep(self, operation: Operation) -> list[Tensor | None]:
        """The first output has the units; others hold statistics."""
        first, *others = operation.outputs
        return [_expanded(self._first(operation), first.shape), *(nobody(v.shape) for v in others)]

    def _merge(self, operation: Operation) -> list[Tensor | None]:
        operands = self._operands(operation)
        if operation.name == "glu":
            operands = list(operands[0].chunk(2, operation.argument("dim")))
        if operation.name in PRODUCTS_OF_ENTRIES:
            operands = self._without_common_factors(operands)
        result = operands[0]
        for other in operands[1:]:
            result = self.merged(operation, result, other)
        return [_expanded(result, v.shape) for v in operation.outputs]

    def _without_common_factors(self, operands: list[Tensor]) -> list[Tensor]:
        """The operands of a product, without common factors: a unit that multiplies all others makes no new units."""
        return [x for x in operands if not self._is_one(x)] or operands

    def _is_one(self, numbers: Tensor) -> bool:
        """Whether there is one unit, or nobody, in a tensor."""
        (small,) = once(numbers)
        return small.numel() <= 1 or len(self._numbers.classes(small).unique()) == 1

    def merged(self, operation: Operation, a: Tensor, b: Tensor) -> Tensor:
        """The numbers of entries that an operator makes of two others each."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = once(a.expand(shape), b.expand(shape))
        return compressed(self._numbers.merge(operation, operation.described, a, b)).expand(shape)

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
        return [numbers.expand(v.shape) if v.is_activity else nobody(v.shape) for v in operation.outputs]

    def _window(self, operation: Operation) -> list[Tensor | None]:
        """Pooling and interpolation read a feature map as one unit at many places, as convolutions do."""
        numbers = self._first(operation)
        match = re.search(r"([123])d", operation.name)
        space = int(match[1]) if match else numbers.dim() - 2
        axes = tuple(range(numbers.dim() - space, numbers.dim()))
        flat = once(numbers)[0].flatten(axes[0])
        rows = self._numbers.classes(flat.flatten(0, -2) if flat.dim() > 1 else flat[None])
        if not self._numbers.may_be_one(rows):
            raise CannotFollowError("different units lie next to each other")
        self._numbers.unite(rows)  # of an input, whose pixels had numbers of their own: wherever they are read
        low = _lowest(numbers, axes)
        return [low.expand(v.shape) if v.is_activity else nobody(v.shape) for v in operation.outputs]

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
            and not (operation.argument("accumulate") or operation.argument("reduce"))
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
        return self.merged(operation, target, source.expand(target.shape))

    def _mix(self, operation: Operation) -> list[Tensor | None]:
        """The rows of the second operand, weighted by the first, join; inputs merge with units that weight them."""
        first, *others = operation.outputs
        weighing = None
        if operation.kind is Kind.ATTENTION:
            numbers = self._of(operation.argument("value"))
            if numbers.dim() > 3 and numbers.shape[-3] < first.shape[-3]:  # several heads of queries share values
                numbers = numbers.repeat_interleave(first.shape[-3] // numbers.shape[-3], -3)
        else:
            weights, value = [v for v in operation.operands if v.is_activity][-2:]
            if value.depends is not Depends.INPUTS:
                raise CannotFollowError("it multiplies units by constants")
            numbers, weighing = self._of(value), compressed(self._of(weights))
        if first.shape[-1:] != numbers.shape[-1:] or numbers.dim() < 2:
            raise CannotFollowError("it multiplies activities")
        joined = self._join(operation, numbers, (numbers.dim() - 2,))
        if weighing is not None and self._are_inputs(numbers) and not self._are_inputs(weighing):
            if varies(weighing, weighing.dim() - 1):
                raise CannotFollowError("inputs weight different units")
            if not self._is_one(weighing):
                joined = self.merged(operation, weighing.narrow(-1, 0, min(1, weighing.shape[-1])), joined)
        return [_expanded(joined, first.shape), *(nobody(v.shape) for v in others)]

    def _are_inputs(self, numbers: Tensor) -> bool:
        """Whether there is no unit of the network among some numbers."""
        owners = self._numbers.owner()[once(numbers)[0].unique()].unique()
        return {self._numbers.populations[i].origin for i in owners.tolist()} <= {"input", "constant"}

    def _gates(self, operation: Operation) -> list[Tensor | None]:
        """A fused step of a recurrent layer: gates lie next to each other, and all of them join the state."""
        given, hidden, state, *_ = self._operands(operation)
        count = 4 if "lstm" in operation.name else 3
        result = state
        for numbers in (given, hidden):
            for part in numbers.chunk(count, -1):
                result = self.merged(operation, result, part)
        return [_expanded(result, v.shape) for v in operation.outputs]

    def _convolved(self, operation: Operation) -> list[Tensor | None]:
        """A convolution by a constant, one kernel for each channel, keeps units, as blurring does."""
        given = operation.operands[0]
        groups = operation.argument("groups")
        if groups != given.shape[1] or operation.outputs[0].shape[1] != groups:
            raise CannotFollowError("it convolves by what is no parameter")
        return self._window(operation)

    def _join(self, operation: Operation, numbers: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Merge the units along some axes, which keep size 1."""
        (small,) = once(numbers)
        kept = [axis for axis in range(small.dim()) if axis not in axes]
        size, length = (math.prod(small.shape[a] for a in some) for some in (kept, axes))  # each may be 0
        columns = small.permute(*kept, *axes).reshape(size, length)
        if columns.shape[-1] > 1:
            columns = self._numbers.classes(columns)
        result = _lowest(columns, (1,)) if columns.numel() else columns.new_zeros(len(columns), 1)
        if columns.numel() and not torch.equal(result, columns.amax(1, keepdim=True)):
            different = torch.unique(columns, dim=1)
            if different.shape[1] > FEW:  # sets of all subsets would be as many as 2ⁿ
                result = self._pooled(operation, columns)
            else:
                result = different[:, 0]
                for other in different.unbind(1)[1:]:
                    result = self._numbers.merge(operation, operation.described, result, other)
        shape = [1 if axis in axes else small.shape[axis] for axis in range(small.dim())]
        full = [1 if axis in axes else numbers.shape[axis] for axis in range(numbers.dim())]
        return result.reshape(shape).expand(full)

    def _pooled(self, operation: Operation, columns: Tensor) -> Tensor:
        """The pool of many units is a unit of its own: one for each different pool."""
        different, inverse = torch.unique(columns, dim=0, return_inverse=True)
        origin = "input" if self._are_inputs(different) else "merged"
        maker = ("pool", different.numpy().tobytes(), origin)
        return self._numbers.numbers_for(maker, operation.described, origin, len(different))[inverse]


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
    """The numbers after an operator wrote into known places."""
    written = _source_of_write(operation)
    try:
        return execute(
            operation, lambda v: source.contiguous() if v is written else target if v is operation.operands[0] else None
        )[0]
    except CannotFollowError:
        return None


_RULES: dict[Kind, Callable[[Rules, Operation], list[Tensor | None]]] = {
    Kind.LAYOUT: Rules._layout,
    Kind.CONCATENATE: Rules._concatenate,
    Kind.KEEP: Rules._keep,
    Kind.NORM: Rules._keep,
    Kind.MERGE: Rules._merge,
    Kind.REDUCE: Rules._reduce,
    Kind.ALONG: Rules._along,
    Kind.WINDOW: Rules._window,
    Kind.WRITE: Rules._write,
    Kind.PRODUCT: Rules._mix,
    Kind.ATTENTION: Rules._mix,
    Kind.GATES: Rules._gates,
    Kind.CONVOLUTION: Rules._convolved,
    Kind.EMBEDDING: lambda rules, operation: [None] * len(operation.outputs),
    Kind.CONSTANT: lambda rules, operation: [nobody(v.shape) for v in operation.outputs],
    Kind.UNKNOWN: lambda rules, operation: [None] * len(operation.outputs),
}
