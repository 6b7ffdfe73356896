"""Shards: the part of a tensor that this process holds, if it is a DTensor, as `fully_shard` makes them."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from biofx.base.errors import ArgumentError
from biofx.base.noise import Counter, Rows

_WHOLE = frozenset((Tensor, nn.Parameter))


@dataclass(frozen=True)
class Cut:
    """The indices of one axis that this process holds.

    Attributes:
        axis: the axis.
        start: the first index.
        length: the number of indices.
    """

    axis: int
    start: int
    length: int


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that this process holds.

    Attributes:
        shape: shape of the whole.
        cuts: the axes that are cut, in their order; empty if the part is the whole.
        groups: the process groups over which the parts are distributed.
    """

    shape: torch.Size
    cuts: tuple[Cut, ...] = ()
    groups: tuple[Any, ...] = ()

    def part(self, values: Tensor) -> Tensor:
        """The part, as a view, of values that broadcast to the whole."""
        for cut in self.cuts:
            own = cut.axis - len(self.shape)  # from the last axis, as for broadcasting
            if values.dim() >= -own and values.shape[own] == self.shape[cut.axis]:
                values = values.narrow(own, cut.start, cut.length)
        return values

    def index(self, axis: int, index: int) -> int | None:
        """An index of the whole on an axis, counted in the part; None if another process holds it."""
        for cut in self.cuts:
            if cut.axis == axis % len(self.shape):
                return index - cut.start if cut.start <= index < cut.start + cut.length else None
        return index

    def counter(self, counter: Counter) -> Counter:
        """The counter of the part, from that of the whole."""
        shape, rows = [*self.shape], list[Rows]()
        if not self.cuts:
            return counter
        if all(cut.axis == 0 for cut in self.cuts):  # entries lie side by side
            return counter.at(self.cuts[0].start * math.prod(shape[1:]))
        for cut in self.cuts:  # the rows of the first cut lie in the whole, those of the second in what that leaves
            inner = math.prod(shape[cut.axis + 1 :])
            rows.append(Rows(cut.start * inner, cut.length * inner, shape[cut.axis] * inner))
            shape[cut.axis] = cut.length
        return replace(counter, rows=tuple(rows))


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
        ArgumentError: it is cut in a way that rules do not support.
    """
    if not is_sharded(tensor):
        return Shard(tensor.shape)
    mesh, placed = tensor.device_mesh, tensor.placements
    over = {axis: which for axis in range(tensor.dim()) if (which := _cut_by(tensor, axis))}
    cuts = tuple(Cut(axis, *_place(tensor, axis)) for axis in over)
    shape = [*tensor.shape]
    for cut in cuts:
        shape[cut.axis] = cut.length
    if not all(_is_followed(tensor, which) for which in range(mesh.ndim)) or [*local(tensor).shape] != shape:
        raise ArgumentError(
            f"attach: {name} is placed as {placed} on {mesh}, and rules act on tensors that are replicated or cut into "
            "blocks; use fully_shard, biofx.parallelize, or fully_shard after biofx.parallelize"
        )
    return Shard(tensor.shape, cuts, tuple(mesh.get_group(which) for which in sorted(itertools.chain(*over.values()))))


def _is_followed(tensor: Any, which: int) -> bool:
    """Whether parts that a dimension of the mesh makes lie side by side in what other dimensions leave."""
    placement = tensor.placements[which]
    if not _is_strided(placement):
        return placement.is_replicate() or type(placement).__name__ == "Shard"
    # A strided shard: tensor parallelism cut the axis, and `fully_shard` cut each part again.
    behind = [each for each in _cut_by(tensor, placement.dim) if each > which]
    return placement.split_factor == math.prod(map(tensor.device_mesh.size, behind))  # type: ignore[no-any-return]


def _is_strided(placement: Any) -> bool:
    return type(placement).__name__ == "_StridedShard"


def _cut_by(tensor: Any, axis: int) -> list[int]:
    """The dimensions of the mesh over which an axis of a DTensor is cut."""
    return [which for which, placement in enumerate(tensor.placements) if getattr(placement, "dim", None) == axis]


def _place(tensor: Any, axis: int) -> tuple[int, int]:
    """The start and the length, on an axis, of the part of a DTensor that this process holds."""
    mesh, start, length = tensor.device_mesh, 0, tensor.shape[axis]
    own = _cut_by(tensor, axis)
    strided = [which for which in own if _is_strided(tensor.placements[which])]  # cut after those behind them
    for which in [*(each for each in own if each not in strided), *reversed(strided)]:
        size = -(-length // mesh.size(which))
        offset = min(size * mesh.get_local_rank(which), length)
        start, length = start + offset, min(size, length - offset)
    return start, length


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor. Writes into it reach the tensor."""
    if type(tensor) in _WHOLE or not is_sharded(tensor):  # steps ask often, and almost always of these
        return tensor  # type: ignore[no-any-return]
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[no-any-return]


def part_along(tensor: Any, axis: int) -> tuple[Tensor, slice]:
    """This process's part of an activity that is a DTensor, and the indices of an axis that it covers.

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


def extremes(values: Tensor) -> tuple[float, float]:
    """The lowest and the highest of some values, over all parts of a DTensor."""
    values = values.detach()
    # One read of the values; PyTorch 2.9 cannot do that with a DTensor.
    lowest, highest = (values.min(), values.max()) if is_sharded(values) else values.aminmax()
    return float(lowest), float(highest)


def gradient_of(parameter: Tensor) -> Tensor:
    """This process's part of a gradient, cut like its parameter; tensor parallelism may cut the two differently."""
    gradient: Any = parameter.grad
    if type(gradient) is not Tensor and is_sharded(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local(gradient)


def is_placed_like(tensor: Any, other: Any) -> bool:
    """Whether a tensor is cut like another one of its shape."""
    if not is_sharded(tensor) or not is_sharded(other):
        return is_sharded(tensor) is is_sharded(other)
    placed: bool = (tensor.device_mesh, tensor.placements) == (other.device_mesh, other.placements)
    return placed


def cut_like(tensor: Any, part: Tensor) -> Tensor:
    """The tensor of which this process holds a part, cut like another one of its shape."""
    if not is_sharded(tensor):
        return part
    return type(tensor).from_local(  # type: ignore[no-any-return]
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def placed_like(values: Sequence[Any], tensor: Any) -> list[Any]:
    """Values as operators take them together with a tensor.

    Each that is cut over other ranks than the tensor becomes whole, and all ranks wait for each other: those of a
    weight that `fully_shard` made whole for a forward pass. With a DTensor, what is whole is then replicated on its
    mesh.
    """
    mesh = tensor.device_mesh if is_sharded(tensor) else None
    values = [value.full_tensor() if is_sharded(value) and value.device_mesh != mesh else value for value in values]
    if mesh is None:
        return values
    from torch.distributed.tensor import Replicate

    return [
        type(tensor).from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        if isinstance(value, Tensor) and not is_sharded(value)
        else value
        for value in values
    ]
