"""Forgotten attachments: whoever trains a model with rules that act at the steps of an optimizer is told so, once."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from biofx.model.operators import is_hook
from biofx.model.provenance import is_transformed, record_of
from biofx.model.synapses import synapses_in

_models: WeakSet[nn.Module] = WeakSet()  # of which nobody was told yet


def watch(bio: nn.Module) -> None:
    """Warn once if an optimizer steps over weights of a model whose rules do nothing, as it was not attached.

    Args:
        bio: a transformed model.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_look))
    _models.add(bio)


_hooks: list[Any] = []  # of all optimizers, as nobody says which one a model is trained with


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _models:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for bio in [*_models]:
        if not is_transformed(bio):
            continue
        record = record_of(bio)
        weights = {name: s for name, s in synapses_in(bio).items() if id(s.stored) in held}
        if not weights:
            continue
        _models.discard(bio)
        if record.by_hand or record.attached & weights.keys():
            continue
        idle = [run.pass_.name for run in record.passes if run.pass_.acts_at_step and run.weights & weights.keys()]
        hooks = [link for s in weights.values() for link in s.links if is_hook(link.target)]
        is_linear = type(optimizer) is SGD and not any(group["weight_decay"] for group in optimizer.param_groups)
        if hooks and not is_linear:
            idle += [name for link in hooks for name in link.origin.passes]
        if idle:
            names = ", ".join(dict.fromkeys(idle))
            warnings.warn(
                f"{type(optimizer).__name__} trains a model of biofx without its rules: {names} act at the steps of an "
                "optimizer, as gains on gradients cancel where it normalises them. "
                "Call biofx.attach(bio, optimizer) before training",
                UserWarning,
                stacklevel=2,
            )
