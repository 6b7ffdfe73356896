"""Watching: what a forward does while it is traced, beside what becomes a node."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from biofx.base.isolation import Snapshot, unchanged

BLOCKS: tuple[type, ...] = (
    torch.no_grad,
    torch.enable_grad,
    torch.set_grad_enabled,
    torch.inference_mode,
    torch.autocast,
)


class Watcher(Protocol):
    """What is told what forward does while it is traced."""

    def note_read(self, module: nn.Module) -> None:
        """It has read `module.training`."""

    def enter_block(self, block: Any) -> None:
        """It has entered one of `BLOCKS`."""

    def exit_block(self, block: Any) -> None:
        """It has left the block."""


@contextmanager
def watched(model: nn.Module, watcher: Watcher) -> Iterator[Snapshot]:
    """Trace a model inside of the block: it stays as it is, and the watcher is told what its forward does.

    Yields:
        What the modules held before.
    """
    with unchanged(model) as before, torch.set_grad_enabled(torch.is_grad_enabled()), _watched_by(watcher):
        yield before


@contextmanager
def _watched_by(watcher: Watcher) -> Iterator[None]:
    """Tell a watcher when forward reads `training` or enters and leaves a block that a graph does not hold."""
    tracing = threading.get_ident()  # other threads may run models meanwhile

    def read(module: nn.Module) -> bool:
        if threading.get_ident() == tracing:
            watcher.note_read(module)
        return bool(vars(module)["training"])

    def write(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    def noted(note: Callable[[Any], None], method: Callable[..., Any]) -> Callable[..., Any]:
        def call(block: Any, *args: Any) -> Any:
            if threading.get_ident() == tracing:
                note(block)
            return method(block, *args)

        return call

    # A property of the class goes before the attribute of the instance.
    patches: dict[tuple[type, str], Any] = {(nn.Module, "training"): property(read, write)}
    for block in BLOCKS:
        patches[block, "__enter__"] = noted(watcher.enter_block, vars(block)["__enter__"])
        patches[block, "__exit__"] = noted(watcher.exit_block, vars(block)["__exit__"])
    originals = {(cls, name): vars(cls).get(name) for cls, name in patches}
    try:
        for (cls, name), value in patches.items():
            type.__setattr__(cls, name, value)
        yield
    finally:
        for (cls, name), value in originals.items():
            if value is None:
                type.__delattr__(cls, name)
            else:
                type.__setattr__(cls, name, value)
