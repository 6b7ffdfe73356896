"""Axis doubling: which positions of a tensor's axis are repeated when units are doubled.

A unit becomes two adjacent ones, its twins: x₀, x₀', x₁, x₁', …. So groups of channels stay groups, halves stay halves,
and a mean over units stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AxisDoubling:
    """How one axis becomes longer.

    Attributes:
        axis: the axis.
        source: the old position that each new position copies, int64. Its shape is (new size,), or that of the whole
            new tensor if the positions differ along other axes, as between the two views of a channel shuffle.
        sign: +1 for the first twin of a unit, −1 for the second, and 0 for what is not doubled, float64.
    """

    axis: int
    source: Tensor
    sign: Tensor

    @property
    def size(self) -> int:
        """The old size of the axis."""
        return int(self.source.max()) + 1 if self.source.numel() else 0

    @property
    def is_uniform(self) -> bool:
        """Whether the positions are the same along all other axes."""
        return self.source.dim() == 1

    def apply(self, old: Tensor) -> Tensor:
        """Double the units of a tensor."""
        source = self.source.to(old.device)
        if self.is_uniform:
            return old.index_select(self.axis, source)
        return torch.take_along_dim(old, source, self.axis)

    def on(self, axis: int) -> AxisDoubling:
        """The same doubling on another axis; only for a uniform one."""
        return AxisDoubling(axis, self.source, self.sign)

    def is_in_order(self) -> bool:
        """Whether first twins and undoubled positions form the old axis, and second twins complete it."""
        axis = 0 if self.is_uniform else self.axis
        source, sign = (x.movedim(axis, -1) for x in (self.source, self.sign))
        positions = torch.arange(self.size)
        for omitted in (-1, 1):
            kept = sign != omitted
            if bool((kept.sum(-1) != self.size).any()):
                return False
            found = source[kept].view(-1, self.size)
            if bool(((found if omitted == -1 else found.sort(-1).values) != positions).any()):
                return False
        return True


def adjacent_twins(units: int) -> AxisDoubling:
    """All units of an axis doubled."""
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(units)
    return AxisDoubling(0, torch.arange(units).repeat_interleave(2), sign)


def is_same_doubling(a: AxisDoubling | None, b: AxisDoubling | None) -> bool:
    """Whether both double the same positions, on whichever axes, or both double nothing."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.source, b.source) and torch.equal(a.sign, b.sign)


# Labels show where an operator moves entries: the operator is executed on labels in place of values. The label of an
# entry is a multiple of 3, so that it leaves room for +1 and +2 to mark the twins.


def labels(shape: torch.Size, start: int, device: torch.device) -> Tensor:
    """A different label for each entry of a tensor: 3·start, 3·(start + 1), …."""
    return 3 * torch.arange(start, start + shape.numel(), dtype=torch.float64, device=device).view(shape)


def doubled_labels(old: Tensor, doubling: AxisDoubling) -> Tensor:
    """The labels after doubling: those of the old entries, plus 1 for first twins and 2 for second ones."""
    twin = (doubling.sign % 3).to(old.device)
    if doubling.is_uniform:
        twin = twin.view(-1, *[1] * (old.dim() - 1 - doubling.axis))
    return doubling.apply(old) + twin


def doubling_from_labels(old: Tensor, new: Tensor) -> AxisDoubling | None:
    """The doubling that leads from an operator's result on labels to its result on doubled labels, if there is one."""
    axes = resized_axes(old, new)
    if len(axes) != 1 or not old.numel():
        return None
    shape = new.movedim(axes[0], -1).shape
    old, new = (x.movedim(axes[0], -1).reshape(-1, x.shape[axes[0]]) for x in (old, new))
    twin = new % 3
    first, second = ((twin == number).any(0, keepdim=True) for number in (1, 2))
    if not bool((first & second).any()):
        # The common case: every column holds one twin. The largest label of a column stands for the column, because
        # padding has the label 0.
        largest = [x.amax(0, keepdim=True) for x in (old, new - twin)]
        source = _source_positions(largest[0], largest[1], first + 2.0 * second)
        if source is not None and torch.equal(old[:, source[0]], new - twin):
            return AxisDoubling(axes[0], source[0].cpu(), (first.double() - second.double())[0].cpu())
    source = _source_positions(old, new - twin, twin)
    if source is None:
        return None
    sign = (twin == 1).double() - (twin == 2).double()
    source, sign = (x.view(shape).movedim(-1, axes[0]).cpu() for x in (source, sign))
    for axis in range(len(shape)):
        once = [x.narrow(axis, 0, 1) for x in (source, sign)]
        if axis != axes[0] and bool((source == once[0]).all()) and bool((sign == once[1]).all()):
            source, sign = once
    return AxisDoubling(axes[0], source, sign)


def _source_positions(old: Tensor, new: Tensor, twin: Tensor) -> Tensor | None:
    """The position in a row of `old` of each label in the same row of `new`.

    A label may occur several times. Its nth occurrence among first twins, and among second twins, has its nth position.
    """
    by_old, by_new = old.argsort(dim=1, stable=True), (new + twin).argsort(dim=1, stable=True)
    wanted, marked = new.gather(1, by_new), (new + twin).gather(1, by_new)
    occurrence = torch.arange(wanted.shape[1], device=wanted.device) - torch.searchsorted(marked, marked)
    sorted_old = old.gather(1, by_old)
    index = (torch.searchsorted(sorted_old, wanted) + occurrence).clamp(max=old.shape[1] - 1)
    if not torch.equal(sorted_old.gather(1, index), wanted):
        return None
    return torch.zeros_like(by_new).scatter(1, by_new, by_old.gather(1, index))


def resized_axes(old: Tensor, new: Tensor) -> list[int]:
    """The axes whose size differs."""
    return [i for i, sizes in enumerate(zip(old.shape, new.shape, strict=False)) if sizes[0] != sizes[1]]
