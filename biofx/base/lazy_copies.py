"""Lazy copies of tensors: they take memory only when somebody writes.

A trial has to put everything back, but few forwards write into parameters or buffers. So a copy shares the memory of
its tensor until one of the two is written to; that one then moves to memory of its own. PyTorch has such copies
(copy-on-write), but no public name for them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lazy_copy(tensor: Tensor) -> Tensor:
    """A copy of a tensor that shares its memory until one of both is written to; else a clone.

    A tensor whose memory somebody else may look at directly, such as NumPy, is cloned: it must not move.
    """
    if _is_alone(tensor):
        try:
            return tensor._lazy_clone()
        except RuntimeError:  # its memory is not PyTorch's own, but comes from a file or another process
            pass
    return tensor.clone()


def is_untouched(tensor: Tensor) -> bool:
    """Whether a tensor certainly has the numbers that it had when it was copied lazily."""
    return _is_plain(tensor) and bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]


def settle(tensor: Tensor) -> None:
    """Make a tensor an ordinary one again. If its lazy copies are gone, its memory does not move."""
    if is_untouched(tensor):
        tensor.data_ptr()


def _is_alone(tensor: Tensor) -> bool:
    """Whether a tensor is known to be the only one on its memory."""
    return _is_plain(tensor) and _uses(tensor) == _uses(torch.empty(0))


def _uses(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor of PyTorch's own with numbers that lie in memory in strides."""
    if type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
        return False
    return not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)
