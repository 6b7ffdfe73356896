"""Blocks: the tensors of all weights in parts that stay in the cache of a CPU while several operations go over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

CPU, OTHER = 1 << 18, 1 << 26  # entries in a block; every operation on a GPU is a kernel that has to be launched


def blocks(*tensors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Parts of tensors, for multi-tensor operations: large ones are cut, small ones are put together.

    Args:
        tensors: lists of the same length. At one place, all have one shape, or one entry, which every part gets.

    Yields:
        For each list, the parts that belong together.

    Example:
        >>> import torch
        >>> from biofx.training.blocks import blocks
        >>> weights, means = [torch.zeros(2, 3), torch.zeros(4)], [torch.tensor(1.0), torch.tensor(2.0)]
        >>> [[tuple(part.shape) for part in parts] for parts in next(blocks(weights, means))]
        [[(2, 3), (4,)], [(), ()]]
    """
    found: list[tuple[Tensor, ...]] = []
    count = 0
    for group in zip(*tensors, strict=True):
        whole = [x for x in group if x.dim()]
        size = OTHER if any(x.device.type != "cpu" for x in whole) else CPU
        for parts in _cut(group, whole, size):
            found.append(parts)
            count += max(part.numel() for part in parts)
            if count >= size:
                yield tuple(map(list, zip(*found, strict=True)))
                found, count = [], 0
    if found:
        yield tuple(map(list, zip(*found, strict=True)))


def _cut(group: tuple[Tensor, ...], whole: list[Tensor], size: int) -> Iterator[tuple[Tensor, ...]]:
    """The parts of the tensors of one weight."""
    is_dense = all(x.stride() == whole[0].stride() and x.shape == whole[0].shape and _is_dense(x) for x in whole)
    if not whole or not is_dense:
        yield group
        return
    count = whole[0].numel()
    if count <= size:
        yield group
        return
    flat = [x.as_strided((count,), (1,)) if x.dim() else x for x in group]
    for start in range(0, count, size):
        yield tuple(x[start : start + size] if x.dim() else x for x in flat)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the entries lie side by side in memory, in whatever order of axes."""
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
