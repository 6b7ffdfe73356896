"""What runs in a thread: the outermost forward computes a weight once, though a loop may ask for it at each step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Running(threading.local):  # threads that call one model do not disturb each other
    """What runs in this thread.

    Attributes:
        computed: the weights that the outermost forward has computed, each with what it depends on; None if none runs.
        given: weights that somebody else computes.
    """

    computed: dict[nn.Module, tuple[Any, Tensor]] | None = None
    given: Mapping[nn.Module, Tensor] | None = None


_running = _Running()


def is_open() -> bool:
    """Whether a forward runs."""
    return _running.computed is not None


@contextmanager
def forward() -> Iterator[None]:
    """Compute each weight once in the block, if no forward runs around it."""
    if _running.computed is not None:
        yield
        return
    _running.computed = {}
    try:
        yield
    finally:
        _running.computed = None


def once(synapses: nn.Module, stored: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """What a weight is, computed anew if something has changed that it depends on.

    Under transforms and modes, and where what is saved for the backward pass is watched, as by activation
    checkpointing, it always is.
    """
    if _running.computed is None or is_transformed() or torch._C._autograd._top_saved_tensors_default_hooks(True):
        return compute()
    version = None if stored.is_inference() else stored._version
    key = (id(stored), version, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    known = _running.computed.get(synapses)
    if known is None or known[0] != key:
        known = _running.computed[synapses] = key, compute()
    return known[1]


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or a mode of the dispatcher sees the operators that run."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def given(synapses: nn.Module) -> Tensor | None:
    """A weight that somebody else computes, or None."""
    return None if _running.given is None else _running.given.get(synapses)


@contextmanager
def weights(values: Mapping[Any, Tensor]) -> Iterator[None]:
    """Let weights be these while the block runs, by their synapses."""
    before, _running.given = _running.given, values
    try:
        yield
    finally:
        _running.given = before
