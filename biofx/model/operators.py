"""Dispatcher operators `torch.ops.biofx.*`: the targets of inserted nodes.

An inserted node calls an operator of the dispatcher, not a Python function. So it survives pickling and retracing,
`torch.compile(fullgraph=True)` accepts it, a training `torch.export` keeps it together with its gradient, and an
inference export decomposes hooks to nothing. There are two kinds. A *gradient hook* is a view of a weight in the
forward pass and changes the weight's gradient. An *observer* reads an activation and adds to a buffer.
"""

from __future__ import annotations

from typing import Any

from biofx.model.definitions import written_name
from biofx.model.gradient_hooks import HOOKS, gradient_hook
from biofx.model.observers import LOOKS, observer

__all__ = ["defined_by", "gradient_hook", "observer"]


def defined_by(function: Any) -> str | None:
    """The name of the operator that a Python function defines, as a rule or as an observer; None if it defines none."""
    functions = {name: hook.own_rule for name, hook in HOOKS.items()} | LOOKS
    return next((written_name(name) for name, own in functions.items() if own is function), None)
