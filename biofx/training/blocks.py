"""Blocks: the tensors of all weights in parts that stay in the cache of a CPU while several operations go over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

CPU, OTHER = 1 << 18, 1 << 24  # entries in a block; every operation on a GPU is a kernel that has to be launched


@dataclass(frozen=True)
class Place:
    """Where a part comes from.

    Attributes:
        index: the place of its tensor in the list.
        start: the index of its first entry, in the tensor's memory.
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


def blocks(*tensors: Sequence[Tensor], in_order: bool = False, cpu: int = CPU) -> Iterator[Block]:
    """Parts of tensors, for multi-tensor operations: large ones are cut, small ones are put together.

    Args:
        tensors: lists of the same length. At one place, all have one shape, or one entry, which every part gets.
        in_order: cut only tensors whose entries lie in memory in the order of their indices.
        cpu: the number of entries in a block on a CPU.

    Example:
        >>> import torch
        >>> from biofx.training.blocks import blocks
        >>> weights, means = [torch.zeros(2, 3), torch.zeros(4)], [torch.tensor(1.0), torch.tensor(2.0)]
        >>> [[tuple(part.shape) for part in parts] for parts in next(blocks(weights, means)).parts]
        [[(2, 3), (4,)], [(), ()]]
    """
    found: list[tuple[Tensor, ...]] = []
    places: list[Place] = []
    count = 0
    for index, group in enumerate(zip(*tensors, strict=True)):
        whole = [x for x in group if x.dim()]
        size = OTHER if any(x.device.type != "cpu" for x in whole) else cpu
        for start, parts in _cut(group, whole, size, in_order):
            found.append(parts)
            places.append(Place(index, start))
            count += max(part.numel() for part in parts)
            if count >= size:
                yield Block(tuple(map(list, zip(*found, strict=True))), places)
                found, places, count = [], [], 0
    if found:
        yield Block(tuple(map(list, zip(*found, strict=True))), places)


def wide(tensor: Tensor) -> Tensor:
    """A tensor in single precision, if it has less; else itself."""
    return tensor if tensor.element_size() >= 4 else tensor.float()


def _cut(
    group: tuple[Tensor, ...], whole: list[Tensor], size: int, in_order: bool
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """The parts of the tensors of one weight."""
    flat = lines(group, in_order) if whole and whole[0].numel() > size else None
    if flat is None:
        yield 0, group
        return
    for start in range(0, whole[0].numel(), size):
        yield start, tuple(x[start : start + size] if x.dim() else x for x in flat)


def lines(group: Sequence[Tensor], in_order: bool = False) -> list[Tensor] | None:
    """Views of the tensors of one weight as vectors; numbers stay as they are. None where there is no such view.

    Args:
        group: the tensors.
        in_order: ask for entries that lie in memory in the order of their indices.
    """
    whole = [x for x in group if x.dim()]
    is_alike = all((x.stride(), x.shape) == (whole[0].stride(), whole[0].shape) for x in whole)
    if not whole or not is_alike or not _is_dense(whole[0], in_order):
        return None
    return [x.as_strided((x.numel(),), (1,)) if x.dim() else x for x in group]


def _is_dense(tensor: Tensor, in_order: bool) -> bool:
    """Whether the entries lie side by side in memory."""
    if tensor.is_contiguous() or in_order:
        return tensor.is_contiguous()
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
