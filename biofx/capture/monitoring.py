"""Monitoring: what a forward does during a trace without making a node."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import nn

from biofx.base.isolation import Snapshot, unchanged

CONTEXTS: tuple[type, ...] = (
    torch.no_grad,
    torch.enable_grad,
    torch.set_grad_enabled,
    torch.inference_mode,
    torch.autocast,
)


class ForwardMonitor(Protocol):
    """Is notified of what a forward does."""

    def note_mode_read(self, module: nn.Module) -> None:
        """Forward read `module.training`."""

    def enter_context(self, context: Any) -> None:
        """Forward entered one of `CONTEXTS`."""

    def exit_context(self, context: Any) -> None:
        """Forward left the context."""


@contextmanager
def monitored(model: nn.Module, monitor: ForwardMonitor) -> Iterator[Snapshot]:
    """Notify a monitor of what the model's forward does in the block, and restore the model afterwards.

    Yields:
        A snapshot of the model before the block.
    """
    with unchanged(model) as before, torch.set_grad_enabled(torch.is_grad_enabled()), ExitStack() as stack:
        for cls, name, value in _notifying(monitor):
            stack.enter_context(patch.object(cls, name, value, create=True))
        yield before


def _notifying(monitor: ForwardMonitor) -> Iterator[tuple[type, str, Any]]:
    """What replaces `nn.Module.training` and the methods of contexts, and notifies a monitor."""
    tracing = threading.get_ident()  # other threads may run models at the same time

    def read(module: nn.Module) -> bool:
        if threading.get_ident() == tracing:
            monitor.note_mode_read(module)
        return bool(vars(module)["training"])

    def write(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    def noted(note: Callable[[Any], None], method: Callable[..., Any]) -> Callable[..., Any]:
        def call(context: Any, *args: Any) -> Any:
            if threading.get_ident() == tracing:
                note(context)
            return method(context, *args)

        return call

    # `training` is an attribute of instances, but a property of their class takes precedence.
    yield nn.Module, "training", property(read, write)
    for cls in CONTEXTS:
        yield cls, "__enter__", noted(monitor.enter_context, vars(cls)["__enter__"])
        yield cls, "__exit__", noted(monitor.exit_context, vars(cls)["__exit__"])
