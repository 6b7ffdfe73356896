"""Where gains act: on the update, on the update and the optimizer's copies of the weights, or on the gradient.

An optimizer that keeps a copy of the weights, such as an average or one of higher precision, undoes what gains do to
the weights. Its state does not show which way is right, so a small weight is trained with each.
"""

from __future__ import annotations

import copy
import enum
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.base.errors import LifecycleError
from biofx.model.slots import Inserted, Slot
from biofx.model.synapses import Link, State, Synapses
from biofx.training.copies import Copies
from biofx.training.update import Update
from biofx.training.wrappers import wrapped_optimizers

STEPS = 40
TOLERANCE = 0.05  # of the slope of displacement on gain


class GainTarget(enum.Enum):
    """On what gains act."""

    UPDATE = "update"
    COPIES = "update, and on the copies of weights in the optimizer's state"
    GRADIENT = "gradient"


def gain_target_for(optimizer: Optimizer) -> GainTarget | None:
    """Where gains have to act for a weight to move by gain times the distance that it would have moved without.

    Args:
        optimizer: the optimizer; it is not changed.

    Returns:
        Where; None if nothing could be tried, because another optimizer of its class could not be made or used.

    Raises:
        LifecycleError: none of them is right.
    """
    optimizer = next(wrapped_optimizers(optimizer), optimizer)  # such as that of a shard
    if type(optimizer).__module__.startswith("torch.optim"):
        return GainTarget.UPDATE
    slopes = {}
    try:
        plain, _ = _trial(optimizer, None)
        if not plain.any():
            return None
        for target in GainTarget:
            slopes[target] = _slope(_trial(optimizer, target)[0], plain)
            if abs(slopes[target] - 1) < TOLERANCE:
                return target
    except Exception:  # noqa: BLE001 - the class is anybody's code
        return None
    raise LifecycleError(
        f"attach: {type(optimizer).__name__} undoes gains, as it keeps copies of the weights: in {STEPS} steps on a "
        f"small weight the slope of displacement on gain was {slopes[GainTarget.UPDATE]:.2f} with gains on its update "
        f"and {slopes[GainTarget.GRADIENT]:.2f} with gains on the gradient; use an optimizer that keeps no copy, or "
        "one in a wrapper that keeps it (ScheduleFreeWrapper, Lookahead)"
    )


def keys_of_copies(optimizer: Optimizer) -> frozenset[str]:
    """The keys in the state of an optimizer under which a trial found copies of the weight."""
    return _trial(next(wrapped_optimizers(optimizer), optimizer), None)[1]


def undoes_writes(optimizer: Optimizer, target: GainTarget) -> bool:
    """Whether an optimizer undoes what a rule does to a weight after a step, although its copies follow."""
    optimizer = next(wrapped_optimizers(optimizer), optimizer)
    (written, _), (plain, _) = (_trial(optimizer, target, write) for write in (1.0, 0.0))
    return not 0.5 < float((written - plain).mean()) < 1.5


def _trial(optimizer: Optimizer, target: GainTarget | None, write: float = 0.0) -> tuple[Tensor, frozenset[str]]:
    """How far a small weight moves with random gradients that are the same at every call, and the keys of its copies.

    Args:
        optimizer: an optimizer of the class.
        target: on what gains act; None: without gains.
        write: what is added to the weight after half of the steps.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)  # some optimizers draw numbers
        return _trained(optimizer, target, write)


def _trained(optimizer: Optimizer, target: GainTarget | None, write: float) -> tuple[Tensor, frozenset[str]]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(16, 16, generator=generator, dtype=torch.float64)  # some hardly move at first
    synapses = Synapses("weight", nn.Parameter(start.clone()))
    gain = _gain()
    synapses.keep("gain", gain, "trial")
    synapses.insert(Link(torch.ops.biofx.scale_grad, (State("gain"),), Inserted(("trial",), "weight", Slot.HOOK)))
    weight = synapses.stored
    one = type(optimizer)([weight], **_options(optimizer))
    if callable(train := getattr(one, "train", None)):
        train()  # schedule-free optimizers refuse to step before
    copies = Copies({weight: 1}, one)
    update = Update([synapses], copies=copies if target is GainTarget.COPIES else None)
    for step in range(STEPS):
        weight.grad = 1 + 0.1 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
        if target is GainTarget.GRADIENT:
            weight.grad *= gain
        update.begin()
        one.step()
        update.end([target in (GainTarget.UPDATE, GainTarget.COPIES)])
        with torch.no_grad(), copies.following():
            weight.add_(write if step == STEPS // 2 else 0)
    return weight.detach() - start, copies.keys


def _options(optimizer: Optimizer) -> dict[str, Any]:
    """The defaults of an optimizer that its constructor takes; some keep more in them."""
    parameters = inspect.signature(type(optimizer)).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    options = copy.deepcopy({k: v for k, v in optimizer.defaults.items() if takes_all or k in parameters})
    return options | ({"lr": 0.01} if options.get("lr") == 0 else {})  # a warm-up begins at 0


def _gain() -> Tensor:
    return torch.linspace(0.7, 1.3, 256, dtype=torch.float64).view(16, 16)


def _slope(moved: Tensor, plain: Tensor) -> float:
    """The slope of displacement, relative to that without gains, on gain; by least squares, since some hardly move."""
    gain = _gain() - _gain().mean()
    terms = torch.stack([plain.flatten(), (plain * gain).flatten()], 1)
    level, slope = map(float, torch.linalg.lstsq(terms, moved.flatten().unsqueeze(1)).solution.flatten())
    return float(_gain().mean()) * slope / level
