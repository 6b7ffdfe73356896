"""Copies: what an optimizer keeps of the weights themselves, such as an average or one of higher precision."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from biofx.base.shards import local
from biofx.training.wrappers import CLOSE, memory_of

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Copies:
    """The copies of weights in the state of an optimizer.

    Args:
        weights: the stored parameters, each with the number Γ of synapses of its connections.
        optimizer: the optimizer that holds them. It keeps copies of what it sees: Γ times the synapses.
        keys: the keys of copies in its state. None: what is close to its weight when it is first looked at is a copy.
    """

    def __init__(
        self, weights: Mapping[nn.Parameter, int], optimizer: Optimizer, keys: Collection[str] | None = None
    ) -> None:
        self._weights = dict(weights)
        self._optimizer = optimizer
        self._keys = keys
        self._is_copy: dict[tuple[nn.Parameter, str], bool] = {}

    @property
    def keys(self) -> frozenset[str]:
        """The keys of the copies that were found."""
        return frozenset(key for (_, key), is_copy in self._is_copy.items() if is_copy)

    def found(self, *, in_step: bool = False) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
        """Each copy, with its weight and its key in the state.

        Args:
            in_step: whether the weights are what the optimizer sees.
        """
        for weight, shares in self._weights.items():
            seen = local(weight).detach() * (1 if in_step else shares)
            for key, memory in ((key, local(value)) for key, value in memory_of(self._optimizer, weight).items()):
                is_alike = isinstance(memory, Tensor) and memory.shape == seen.shape and memory.is_floating_point()
                if is_alike and (weight, key) not in self._is_copy:
                    self._is_copy[weight, key] = _is_close(memory, seen) if self._keys is None else key in self._keys
                if is_alike and self._is_copy[weight, key]:
                    yield weight, key, memory

    @contextmanager
    def following(self) -> Iterator[None]:
        """Move copies as far as the block moves their weights, except for what it changes in them itself."""
        before = [(weight, copy, copy.clone(), local(weight).detach().clone()) for weight, _, copy in self.found()]
        try:
            yield
        finally:
            for weight, copy, old_copy, old in before:
                distance = (local(weight).detach().to(copy) - old.to(copy)) * self._weights[weight]
                copy.copy_(torch.where(copy == old_copy, copy + distance, copy))


def _is_close(memory: Tensor, weight: Tensor) -> bool:
    size = torch.linalg.vector_norm(weight.float())
    return bool(torch.linalg.vector_norm(memory.float() - weight.float()) < CLOSE * size)
