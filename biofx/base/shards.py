"""Shards: the part of a tensor that this process holds, if it is a DTensor, as `fully_shard` makes them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from biofx.base.errors import ArgumentError
from biofx.base.noise import Counter, Rows


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that this process holds.

    Attributes:
        shape: shape of the whole.
        axis: the axis that is cut; None if the part is the whole.
        start: the first index of the part on this axis.
        length: the number of its indices.
        groups: the process groups over which the parts are distributed.
    """

    shape: torch.Size
    axis: int | None = None
    start: int = 0
    length: int = 0
    groups: tuple[Any, ...] = ()

    def part(self, values: Tensor) -> Tensor:
        """The part, as a view, of values that broadcast to the whole."""
        if self.axis is None:
            return values
        own = self.axis - len(self.shape)  # from the last axis, as for broadcasting
        is_cut = values.dim() >= -own and values.shape[own] == self.shape[self.axis]
        return values.narrow(own, self.start, self.length) if is_cut else values

    def index(self, axis: int, index: int) -> int | None:
        """An index of the whole on an axis, counted in the part; None if that is elsewhere."""
        if self.axis is None or axis % len(self.shape) != self.axis:
            return index
        return index - self.start if self.start <= index < self.start + self.length else None

    def counter(self, counter: Counter) -> Counter:
        """What the noise of the part follows from, given that of the whole."""
        if self.axis is None:
            return counter
        inner = math.prod(self.shape[self.axis + 1 :])
        if self.axis == 0:
            return counter.at(self.start * inner)
        return replace(counter, rows=Rows(self.start * inner, self.length * inner, self.shape[self.axis] * inner))


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import; without, nobody has made one
    return module is not None and isinstance(tensor, module.DTensor)


def shard_of(name: str, tensor: Any) -> Shard:
    """The part of a tensor that this process holds.

    Args:
        name: the tensor's name.
        tensor: a tensor, or a DTensor.

    Raises:
        ArgumentError: it is cut along several axes, or in a way that rules do not follow.
    """
    if not is_sharded(tensor):
        return Shard(tensor.shape)
    mesh = tensor.device_mesh
    cuts = [(which, placement) for which, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if any(type(placement).__name__ != "Shard" for _, placement in cuts) or len({p.dim for _, p in cuts}) > 1:
        raise ArgumentError(
            f"attach: {name} is placed as {tensor.placements} on {mesh}, and rules act on tensors that are cut along "
            "one axis; use fully_shard on a mesh of one dimension, or of (replicas, shards)"
        )
    if not cuts:
        return Shard(tensor.shape)
    axis = cuts[0][1].dim
    start, length = _place(tensor, axis)
    return Shard(tensor.shape, axis, start, length, tuple(mesh.get_group(which) for which, _ in cuts))


def _place(tensor: Any, axis: int) -> tuple[int, int]:
    """Where the part of a DTensor that this process holds begins on an axis, and how long it is there."""
    mesh, start, length = tensor.device_mesh, 0, tensor.shape[axis]
    for which, placement in enumerate(tensor.placements):
        if placement.is_shard(axis):
            size = -(-length // mesh.size(which))
            offset = min(size * mesh.get_local_rank(which), length)
            start, length = start + offset, min(size, length - offset)
    return start, length


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor: what is written into it reaches the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def part_along(tensor: Any, axis: int) -> tuple[Tensor, slice]:
    """What this process holds of an activity that is a DTensor, and which indices of an axis these are.

    A partial sum, which no process holds whole, is reduced first; all ranks wait for each other.

    Args:
        tensor: the activity.
        axis: an axis of it.
    """
    from torch.distributed.tensor import Replicate

    known = [p if p.is_replicate() or type(p).__name__ == "Shard" else Replicate() for p in tensor.placements]
    tensor = tensor if known == [*tensor.placements] else tensor.redistribute(placements=known)
    start, length = _place(tensor, axis % tensor.dim())
    return tensor.to_local(), slice(start, start + length)


def gradient_of(parameter: Tensor) -> Tensor:
    """What this process holds of a gradient, which tensor parallelism may leave cut otherwise than its parameter."""
    gradient: Any = parameter.grad
    if is_sharded(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local(gradient)


def cut_like(tensor: Any, part: Tensor) -> Tensor:
    """The tensor of which this process holds a part, cut as another one of its shape."""
    if not is_sharded(tensor):
        return part
    return type(tensor).from_local(  # type: ignore[no-any-return]
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def placed_like(values: Sequence[Any], tensor: Any) -> list[Any]:
    """Values as operators take them together with a tensor.

    With a DTensor, each whole tensor becomes one that is replicated on its mesh. With a whole tensor, each that is cut
    becomes whole, and all ranks wait for each other.
    """
    if not is_sharded(tensor):
        return [value.full_tensor() if is_sharded(value) else value for value in values]
    from torch.distributed.tensor import Replicate

    mesh = tensor.device_mesh
    return [
        type(tensor).from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        if isinstance(value, Tensor) and not is_sharded(value)
        else value
        for value in values
    ]
