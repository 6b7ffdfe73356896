"""Axes: which axes of a weight run over presynaptic units, and which over postsynaptic ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """A factor of an axis of a weight: an axis whose units are divided into groups has two, others have one.

    Attributes:
        axis: the axis of the weight.
        size: how many steps it has; the sizes of an axis's factors multiply to its length.
        presynaptic: whether another step is another presynaptic unit.
        postsynaptic: whether another step is another postsynaptic unit. Groups of units are both.
    """

    axis: int
    size: int
    presynaptic: bool = False
    postsynaptic: bool = False

    @property
    def is_group(self) -> bool:
        """Whether it divides the units on both sides, so that those of different steps are not connected."""
        return self.presynaptic and self.postsynaptic


@dataclass(frozen=True)
class Axes:
    """The axes of a weight, without that of its synapses.

    Units are numbered in the order of the weight's axes.

    Attributes:
        shape: shape of the weight.
        factors: the factors of its axes, in order.
    """

    shape: tuple[int, ...]
    factors: tuple[Factor, ...]

    @property
    def presynaptic(self) -> tuple[int, ...]:
        """The axes that run over presynaptic units (within a group, if an axis has groups and is postsynaptic)."""
        return self._named([f.axis for f in self.factors if f.presynaptic and not f.postsynaptic], "presynaptic")

    @property
    def postsynaptic(self) -> tuple[int, ...]:
        """The axes that run over postsynaptic units (within a group, if an axis has groups and is presynaptic)."""
        return self._named([f.axis for f in self.factors if f.postsynaptic and not f.presynaptic], "postsynaptic")

    def _named(self, own: list[int], side: str) -> tuple[int, ...]:
        return tuple(dict.fromkeys(own)) or tuple(dict.fromkeys(f.axis for f in self.factors if getattr(f, side)))

    @cached_property
    def units(self) -> int:
        """Number of postsynaptic units."""
        return math.prod(f.size for f in self.factors if f.postsynaptic)

    @cached_property
    def presynaptic_units(self) -> int:
        """Number of presynaptic units."""
        return math.prod(f.size for f in self.factors if f.presynaptic)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the postsynaptic units, shape (units,), on the axes of the weight, to be broadcast against it."""
        return self._spread(values, *self._spread_postsynaptic)

    def spread_presynaptic(self, values: Tensor) -> Tensor:
        """Values of the presynaptic units, shape (presynaptic_units,), on the axes of the weight, to be broadcast."""
        return self._spread(values, *self._spread_presynaptic)

    def incoming(self, values: Tensor) -> Tensor:
        """Values on the weight, by the postsynaptic unit: shape (units, incoming connections of each)."""
        return self._gather(values, [f.postsynaptic for f in self.factors], self.units)

    def outgoing(self, values: Tensor) -> Tensor:
        """Values on the weight, by the presynaptic unit: shape (presynaptic_units, outgoing connections of each)."""
        return self._gather(values, [f.presynaptic for f in self.factors], self.presynaptic_units)

    def from_incoming(self, rows: Tensor) -> Tensor:
        """Values on the weight, from those of `incoming`."""
        return self._ungather(rows, [f.postsynaptic for f in self.factors])

    def from_outgoing(self, connections: Tensor) -> Tensor:
        """Values on the weight, from those of `outgoing`."""
        return self._ungather(connections, [f.presynaptic for f in self.factors])

    def with_presynaptic(self, units: int) -> Axes:
        """The axes of a weight with another number of presynaptic units, in as many groups."""
        factor = next(f for f in self.factors if f.presynaptic and not f.postsynaptic)
        others = math.prod(f.size for f in self.factors if f.presynaptic and f is not factor)
        resized = [replace(f, size=units // others) if f is factor else f for f in self.factors]
        shape = [math.prod(f.size for f in resized if f.axis == axis) for axis in range(len(self.shape))]
        return Axes(tuple(shape), tuple(resized))

    @cached_property
    def _spread_postsynaptic(self) -> tuple[tuple[int, ...], ...]:
        return self._shapes([f.postsynaptic for f in self.factors])

    @cached_property
    def _spread_presynaptic(self) -> tuple[tuple[int, ...], ...]:
        return self._shapes([f.presynaptic for f in self.factors])

    def _shapes(self, chosen: Sequence[bool]) -> tuple[tuple[int, ...], ...]:
        """The shapes of a value for each unit: on the factors of its own, on all factors of their axes, on the axes."""
        touched = {f.axis for f, has in zip(self.factors, chosen, strict=True) if has}
        return (
            tuple(f.size if has else 1 for f, has in zip(self.factors, chosen, strict=True)),
            tuple(f.size if f.axis in touched else 1 for f in self.factors),
            tuple(length if axis in touched else 1 for axis, length in enumerate(self.shape)),
        )

    def _spread(self, values: Tensor, own: Sequence[int], expanded: Sequence[int], shape: Sequence[int]) -> Tensor:
        return values.reshape(shape) if own == expanded else values.reshape(own).expand(expanded).reshape(shape)

    def _gather(self, values: Tensor, chosen: Sequence[bool], units: int) -> Tensor:
        order = _first(chosen)
        split = _shaped(values, tuple(f.size for f in self.factors))
        split = split if order == sorted(order) else split.permute(order)
        return _shaped(split, (units, math.prod(self.shape) // units if units else 0))

    def _ungather(self, rows: Tensor, chosen: Sequence[bool]) -> Tensor:
        order = _first(chosen)
        back = [order.index(i) for i in range(len(order))]
        return rows.reshape([self.factors[i].size for i in order]).permute(back).reshape(self.shape)

    def agree(self, other: Axes) -> bool:
        """Whether two uses of a weight see the same units on its axes."""
        return self is other or self._merged == other._merged

    @cached_property
    def _merged(self) -> list[Factor]:
        """The factors with neighbours of one kind as one, and without those of size 1."""
        kinds = groupby((f for f in self.factors if f.size != 1), lambda f: replace(f, size=0))
        return [replace(kind, size=math.prod(f.size for f in run)) for kind, run in kinds]

    def __str__(self) -> str:
        pre, post = (", ".join(map(str, axes)) or "none" for axes in (self.presynaptic, self.postsynaptic))
        groups = [f"axis {f.axis} in {f.size} groups" for f in self.factors if f.is_group and f.size > 1]
        return ", ".join([f"presynaptic axis {pre}", f"postsynaptic axis {post}", *groups])


def _shaped(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values if values.shape == shape else values.reshape(shape)


def _first(chosen: Sequence[bool]) -> list[int]:
    """The positions that are chosen, and then the others."""
    return sorted(range(len(chosen)), key=lambda i: not chosen[i])


Role = tuple[bool, bool]
"""Whether an axis runs over presynaptic and over postsynaptic units."""

PRE: Role = (True, False)
POST: Role = (False, True)
GROUP: Role = (True, True)
NEITHER: Role = (False, False)
