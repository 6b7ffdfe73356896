"""Forgotten attachments: a warning if an optimizer trains a model whose rules need `biofx.attach` without it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from biofx.model.gradient_hooks import is_hook
from biofx.model.provenance import is_transformed, record_of
from biofx.model.stale_gradients import StaleGradients
from biofx.model.synapses import Synapses, synapses_in

_models: WeakSet[nn.Module] = WeakSet()
_handles: list[Any] = []  # of the hook on all optimizers, since any of them may train a model
_checked: WeakSet[Optimizer] = WeakSet()  # since a model or an attachment changed last
_told: WeakKeyDictionary[nn.Module, WeakSet[Optimizer]] = WeakKeyDictionary()  # of which optimizers, by model
_stale: WeakKeyDictionary[nn.Module, StaleGradients] = WeakKeyDictionary()  # see `note_stale_gradients`


def note_stale_gradients(bio: nn.Module, synapses: Mapping[str, Synapses]) -> None:
    """Remember gradients that were computed while an optimizer was attached to these synapses, without their hooks."""
    _stale.setdefault(bio, StaleGradients()).note(synapses, watch=False)  # a hook would show when the model is pickled


def _warn_of_stale_gradients(bio: nn.Module, optimizer: Optimizer, synapses: Mapping[str, Synapses]) -> None:
    """Warn if the optimizer has just used gradients that were computed while another, or it, was attached."""
    name = _stale.pop(bio, StaleGradients()).first(synapses)
    if name is not None:
        warnings.warn(
            f"{name}: its gradient was computed while an optimizer was attached, so this step of "
            f"{type(optimizer).__name__} had no gains, and moved split weights further; call zero_grad() after "
            "detach, and backward() again",
            UserWarning,
            stacklevel=3,
        )


def warn_if_unattached(bio: nn.Module) -> None:
    """Warn once at a step of each optimizer that trains a model, if it is not attached and rules need that.

    The model is captured, and need not be transformed yet.
    """
    if not _handles:
        _handles.append(register_optimizer_step_post_hook(_check_models))
    _models.add(bio)
    _checked.clear()


def _check_models(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _checked:
        return
    _checked.add(optimizer)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for bio in [*_models]:
        told = _told.setdefault(bio, WeakSet())
        if not is_transformed(bio) or optimizer in told:
            continue
        record = record_of(bio)
        own = (each.holding for each in record.attachments if each.acts_for(optimizer))
        acted_on = {name for sites, learning in own for name in (*sites, *learning)}
        found = synapses_in(bio).items()
        weights = {name: s for name, s in found if id(s.stored) in trained and name not in acted_on}
        if not weights or record.by_hand:
            continue
        _warn_of_stale_gradients(bio, optimizer, weights)
        idle = [run.pass_.name for run in record.passes if run.pass_.acts_at_step and run.weights & weights.keys()]
        hooks = [link for s in weights.values() for link in s.links if is_hook(link.target)]
        # Plain SGD is linear in the gradient, so hooks that scale gradients have their full effect without `attach`.
        is_linear = type(optimizer) is SGD and not any(group["weight_decay"] for group in optimizer.param_groups)
        if hooks and (not is_linear or record.attached & weights.keys()):  # another optimizer switched hooks off
            idle += [name for link in hooks for name in link.origin.passes]
        if idle:
            told.add(optimizer)
            names = ", ".join(dict.fromkeys(idle))
            warnings.warn(
                f"{type(optimizer).__name__} trains a model of biofx without its rules ({names}), which act around the "
                "steps of an attached optimizer. Call biofx.attach(bio, optimizer) before training",
                UserWarning,
                stacklevel=2,
            )
