"""Watched tensors: whether anybody has written into a tensor with which a trace computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from biofx.capture.variable_keys import can_be_compared


class WatchedTensor(NamedTuple):
    """A tensor that is watched for writes.

    Attributes:
        tensor: the tensor.
        version: how often PyTorch had counted a write when the watch began.
        values: a copy of its values, if they can be compared without a wait.
    """

    tensor: Tensor
    version: int
    values: Tensor | None

    @classmethod
    def now(cls, tensor: Tensor) -> WatchedTensor:
        """Watch a tensor."""
        return cls(tensor, tensor._version, tensor.detach().clone() if _is_at_hand(tensor) else None)

    def in_copy(self) -> WatchedTensor:
        """Watch on from the present version: after copying, the tensor is the copy, which counts its own writes."""
        return self._replace(version=self.tensor._version)

    def is_written(self) -> bool:
        """Whether it was written to since; writes through `data` or NumPy do not raise the version."""
        if self.tensor._version != self.version:
            return True
        if self.values is None:
            return False
        return not _is_at_hand(self.tensor) or not torch.equal(self.values, self.tensor.detach())


def watch(tensors: Iterable[Tensor], but: Iterable[Tensor]) -> list[WatchedTensor]:
    """Watch tensors, except for some, and for inference tensors, which do not count writes."""
    left_out = set(map(id, but))
    found = {id(x): x for x in tensors if id(x) not in left_out and not x.is_inference()}
    return [WatchedTensor.now(x) for x in found.values()]


def _is_at_hand(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be compared quickly, and without waiting for a device."""
    return tensor.device.type == "cpu" and can_be_compared(tensor)
