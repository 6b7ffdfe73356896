"""Blocks: the tensors of all weights in parts that stay in the cache of a CPU while several operations go over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CPU, OTHER = 1 << 18, 1 << 24  # entries in a block; every operation on a GPU is a kernel that has to be launched


@dataclass(frozen=True)
class Place:
    """Where a part comes from.

    Attributes:
        index: the place of its tensor in the list.
        start: the index of its first entry, in the order of indices.
    """

    index: int
    start: int


@dataclass(frozen=True)
class Block:
    """Parts of tensors.

    Attributes:
        parts: for each list of tensors, the parts that belong together.
        places: where they come from.
    """

    parts: tuple[list[Tensor], ...]
    places: list[Place]


def blocks(*tensors: Sequence[Tensor], cpu: int = CPU) -> Iterator[Block]:
    """Parts of tensors, for multi-tensor operations: large ones are cut, small ones are put together.

    Args:
        tensors: lists of the same length. At one place, all broadcast to the shape of the first.
        cpu: the number of entries in a block on a CPU.

    Example:
        >>> import torch
        >>> from biofx.training.blocks import blocks
        >>> weights, means = [torch.zeros(2, 3), torch.zeros(4)], [torch.tensor(1.0), torch.tensor(2.0)]
        >>> [[tuple(part.shape) for part in parts] for parts in next(blocks(weights, means)).parts]
        [[(2, 3), (4,)], [(), ()]]
    """
    if tensors[0] and sum(x.numel() for x in tensors[0]) <= _size(tensors[0][0], cpu):  # one block, and no loop
        yield Block(tuple(map(list, tensors)), [Place(index, 0) for index in range(len(tensors[0]))])
        return
    found: list[tuple[Tensor, ...]] = []
    places: list[Place] = []
    count = 0
    for index, group in enumerate(zip(*tensors, strict=True)):
        size = _size(group[0], cpu)
        for start, parts in _cut(group, size):
            if found and count + parts[0].numel() > size:
                yield Block(tuple(map(list, zip(*found, strict=True))), places)
                found, places, count = [], [], 0
            found.append(parts)
            places.append(Place(index, start))
            count += parts[0].numel()
    if found:
        yield Block(tuple(map(list, zip(*found, strict=True))), places)


def batches(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of tensors of one device and dtype, no more entries together than a block has, or one tensor.

    A rule that needs something as large as a weight makes it for one batch after the other.

    Args:
        tensors: the tensors.
    """
    if len({(x.device, x.dtype) for x in tensors}) == 1 and sum(x.numel() for x in tensors) <= _size(tensors[0], CPU):
        yield [*range(len(tensors))]
        return
    found: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    counts: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for index, tensor in enumerate(tensors):
        kind = tensor.device, tensor.dtype
        if kind in found and counts[kind] + tensor.numel() > _size(tensor, CPU):
            counts[kind] = 0
            yield found.pop(kind)
        found.setdefault(kind, []).append(index)
        counts[kind] += tensor.numel()
    yield from found.values()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Single precision for a dtype that has less; otherwise the dtype itself."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """A tensor in single precision if it has less; otherwise the tensor itself."""
    return tensor if tensor.dtype.itemsize >= 4 else tensor.float()


def _size(tensor: Tensor, cpu: int) -> int:
    """The number of entries in a block."""
    return cpu if tensor.device.type == "cpu" else OTHER


def _cut(
    group: tuple[Tensor, ...], size: int, start: int = 0, axis: int = 0
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """The parts of the tensors of one weight, along its first axes, and the index of the first entry of each."""
    first = group[0]
    if first.numel() <= size:
        yield start, group
        return
    length, own = first.shape[axis], axis - first.dim()  # counted from the last axis, as for broadcasting
    inner = first.numel() // length
    step = max(size // inner, 1)
    is_cut = [x.dim() >= -own and x.shape[own] == length for x in group]
    for at in range(0, length, step):
        here = min(step, length - at)
        parts = tuple(x.narrow(own, at, here) if cut else x for x, cut in zip(group, is_cut, strict=True))
        yield from _cut(parts, size, start + at * inner, axis + 1)


def lines(group: Sequence[Tensor]) -> list[Tensor] | None:
    """Views of the tensors of one weight as vectors; their numbers are shared. None where there is no such view.

    Args:
        group: the tensors.
    """
    whole = [x for x in group if x.dim()]
    is_alike = all((x.stride(), x.shape) == (whole[0].stride(), whole[0].shape) for x in whole)
    if not whole or not is_alike or not _is_dense(whole[0]):
        return None
    return [x.as_strided((x.numel(),), (1,)) if x.dim() else x for x in group]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the entries lie side by side in memory."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
