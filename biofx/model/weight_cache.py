"""The weight cache: the outermost forward of a thread computes each weight once, even if a loop reads it many times."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from biofx.base.torch_internals import is_intercepted, saves_by_hooks


class _ThreadState(threading.local):  # two threads may call the same model at the same time
    """The weights of the present thread.

    Attributes:
        cache: the weights computed by the outermost forward, each with its key, and a list that is empty until a
            backward pass went through the computation; None if no forward runs.
        substitutes: tensors to use instead of weights, by synapses; None outside of `substituted`.
    """

    cache: dict[nn.Module, tuple[Any, Tensor, list[None]]] | None = None
    substitutes: Mapping[nn.Module, Tensor] | None = None


_thread = _ThreadState()


def is_active() -> bool:
    """Whether a forward runs, so that weights are cached."""
    return _thread.cache is not None


@contextmanager
def caching() -> Iterator[None]:
    """Compute each weight only once inside the block; an outer block keeps its cache."""
    if _thread.cache is not None:
        yield
        return
    _thread.cache = {}
    try:
        yield
    finally:
        _thread.cache = None


def cached(synapses: nn.Module, stored: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """Return a weight from the cache, or compute it if its stored tensor, what is frozen, or the gradient mode changed.

    Also if forward itself ran a backward pass through the computation, which freed what the next one would need.

    Three situations bypass the cache. Function transforms wrap tensors per level, and dispatch modes have to see every
    operator. Hooks on saved tensors, which activation checkpointing sets, expect the same operators in the
    recomputation as in the forward.
    """
    if _thread.cache is None or is_intercepted() or saves_by_hooks():
        return compute()
    version = None if stored.is_inference() else stored._version
    learned = tuple(p is not None and p.requires_grad for p in synapses._parameters.values())  # `parameters()` is slow
    key = (id(stored), version, learned, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    entry = _thread.cache.get(synapses)
    if entry is None or entry[0] != key or entry[2]:
        entry = _thread.cache[synapses] = key, compute(), list[None]()
        _note_backward(entry[1], entry[2])
    return entry[1]


def _note_backward(weight: Tensor, passed: list[None]) -> None:
    """Note in a list that a backward pass goes through the computation of a weight, and does not end at the weight."""
    node = Tensor.grad_fn.__get__(weight)  # type: ignore[union-attr]  # a weight tensor answers for the stored one
    if node is not None:
        node.register_hook(lambda *_: passed.append(None))


def substitute_for(synapses: nn.Module) -> Tensor | None:
    """Return the tensor that replaces a weight inside of `substituted`, or None."""
    return None if _thread.substitutes is None else _thread.substitutes.get(synapses)


@contextmanager
def substituted(values: Mapping[Any, Tensor]) -> Iterator[None]:
    """Use the given tensors instead of computed weights inside the block, by synapses."""
    before, _thread.substitutes = _thread.substitutes, values
    try:
        yield
    finally:
        _thread.substitutes = before
