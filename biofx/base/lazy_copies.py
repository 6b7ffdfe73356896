"""Lazy copies: copies of tensors that take no memory until one of the two is written to.

A run without side effects saves all parameters and buffers, but few forwards write to them. A lazy copy shares the
memory of its tensor; the first of the two that is written to moves to memory of its own. PyTorch has such copies
(copy-on-write), but no public interface for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from biofx.base.torch_internals import copy_on_write, is_copy_on_write, uses_of_memory


def lazy_copy(tensor: Tensor) -> Tensor:
    """A copy of a tensor that shares its memory until one of the two is written to, or a clone if it cannot be shared.

    Memory that another object such as a NumPy array may use as well must not move, so such a tensor is cloned.
    """
    if _is_alone(tensor):
        try:
            return copy_on_write(tensor)
        except RuntimeError:  # the memory comes from a file or another process
            pass
    return tensor.clone()


def is_untouched(tensor: Tensor) -> bool:
    """Whether a tensor has certainly not been written to since it was copied lazily."""
    return is_plain(tensor) and is_copy_on_write(tensor)


def settle(tensor: Tensor) -> None:
    """Make a tensor an ordinary one again; its memory does not move if its lazy copies are gone."""
    if is_untouched(tensor):
        tensor.data_ptr()


def _is_alone(tensor: Tensor) -> bool:
    """Whether a tensor is known to be the only one on its memory."""
    # The count of a tensor that nobody else uses depends on the version of PyTorch, so it is taken from one.
    return is_plain(tensor) and uses_of_memory(tensor) == uses_of_memory(torch.empty(0))


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a strided `torch.Tensor` with values, not a subclass."""
    if type(tensor.data) is not Tensor or tensor.layout is not torch.strided:
        return False
    return not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)
