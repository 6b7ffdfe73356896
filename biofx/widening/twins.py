"""Twins: how an axis becomes wider when units are doubled.

A unit becomes two adjacent ones, its twins: x₀, x₀', x₁, x₁', …. So groups of channels stay groups, halves stay halves,
and a mean over units stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Twins:
    """How an axis becomes wider.

    Attributes:
        axis: the axis.
        source: the old position that each new one is a copy of, int64: of shape (new size,), or with all axes of the
            value if it is not the same everywhere, as between the two views of a channel shuffle.
        sign: +1 for the first twin of a unit, −1 for the second, and 0 for what is not doubled, float64.
    """

    axis: int
    source: Tensor
    sign: Tensor

    @property
    def size(self) -> int:
        """The axis's old size."""
        return int(self.source.max()) + 1 if self.source.numel() else 0

    @property
    def is_uniform(self) -> bool:
        """Whether it is the same everywhere."""
        return self.source.dim() == 1

    def widen(self, old: Tensor) -> Tensor:
        """A tensor with the axis made wider."""
        source = self.source.to(old.device)
        if self.is_uniform:
            return old.index_select(self.axis, source)
        return torch.take_along_dim(old, source, self.axis)

    def on(self, axis: int) -> Twins:
        """The same for another axis, if it is the same everywhere."""
        return Twins(axis, self.source, self.sign)

    def are_in_order(self) -> bool:
        """Whether there is nothing but twins, and what is left without the second ones is the old axis."""
        axis = 0 if self.is_uniform else self.axis
        source, sign = (x.movedim(axis, -1) for x in (self.source, self.sign))
        places = torch.arange(self.size)
        for other in (-1, 1):
            kept = sign != other
            if bool((kept.sum(-1) != self.size).any()):
                return False
            found = source[kept].view(-1, self.size)
            if bool(((found if other == -1 else found.sort(-1).values) != places).any()):
                return False
        return True


def adjacent(units: int, each: int = 1) -> Twins:
    """All units doubled, each with a number of adjacent positions."""
    source = torch.arange(units * each).view(units, 1, each).expand(-1, 2, -1).flatten()
    return Twins(0, source, torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(each).repeat(units))


def alike(a: Twins | None, b: Twins | None) -> bool:
    """Whether both make an axis wider in the same way, or neither does."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.source, b.source) and torch.equal(a.sign, b.sign)


def refitted(twins: Twins, positions: int) -> Twins | None:
    """The twins of a feature map that was flattened, for another number of positions of each unit."""
    units = len(torch.unique_consecutive(twins.sign)) // 2
    if not units or twins.size % units or positions % units or not alike(twins, adjacent(units, twins.size // units)):
        return None
    return adjacent(units, positions // units)


def named(shape: torch.Size, start: int, device: torch.device) -> Tensor:
    """A name for each entry of a tensor: multiples of 3, from `start` on; see `followed`."""
    return 3 * torch.arange(start, start + shape.numel(), dtype=torch.float64, device=device).view(shape)


def named_twins(names: Tensor, twins: Twins) -> Tensor:
    """The names of a tensor that became wider: those of the old entries, plus 1 for first twins and 2 for second."""
    twin = (twins.sign % 3).to(names.device)
    if twins.is_uniform:
        twin = twin.view(-1, *[1] * (names.dim() - 1 - twins.axis))
    return twins.widen(names) + twin


def followed(old: Tensor, new: Tensor) -> Twins | None:
    """How a tensor became wider, by the names of its entries: multiples of three, plus 1 or 2 for twins."""
    axes = resized_axes(old, new)
    if len(axes) != 1 or not old.numel():
        return None
    shape = new.movedim(axes[0], -1).shape
    old, new = (x.movedim(axes[0], -1).reshape(-1, x.shape[axes[0]]) for x in (old, new))
    twin = new % 3
    first, second = ((twin == number).any(0, keepdim=True) for number in (1, 2))
    if not bool((first & second).any()):
        largest = [x.amax(0, keepdim=True) for x in (old, new - twin)]  # what was padded has no name
        source = _located(largest[0], largest[1], first + 2.0 * second)
        if source is not None and torch.equal(old[:, source[0]], new - twin):
            return Twins(axes[0], source[0].cpu(), (first.double() - second.double())[0].cpu())
    source = _located(old, new - twin, twin)
    if source is None:
        return None
    sign = (twin == 1).double() - (twin == 2).double()
    source, sign = (x.view(shape).movedim(-1, axes[0]).cpu() for x in (source, sign))
    for axis in range(len(shape)):
        once = [x.narrow(axis, 0, 1) for x in (source, sign)]
        if axis != axes[0] and bool((source == once[0]).all()) and bool((sign == once[1]).all()):
            source, sign = once
    return Twins(axes[0], source, sign)


def _located(old: Tensor, new: Tensor, twin: Tensor) -> Tensor | None:
    """Where each name in a row of `new` is in that of `old`: the nth one of the same twins is the nth one."""
    by_old, by_new = old.argsort(dim=1, stable=True), (new + twin).argsort(dim=1, stable=True)
    names, twins = new.gather(1, by_new), (new + twin).gather(1, by_new)
    rank = torch.arange(names.shape[1], device=names.device) - torch.searchsorted(twins, twins)
    sorted_old = old.gather(1, by_old)
    index = (torch.searchsorted(sorted_old, names) + rank).clamp(max=old.shape[1] - 1)
    if not torch.equal(sorted_old.gather(1, index), names):
        return None
    return torch.zeros_like(by_new).scatter(1, by_new, by_old.gather(1, index))


def resized_axes(old: Tensor, new: Tensor) -> list[int]:
    """The axes of which the size differs."""
    return [i for i, sizes in enumerate(zip(old.shape, new.shape, strict=False)) if sizes[0] != sizes[1]]
