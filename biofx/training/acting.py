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
from biofx.training.update import Update
from biofx.training.wrappers import inside

STEPS = 40
TOLERANCE = 0.05  # of the slope of displacement on gain


class Acting(enum.Enum):
    """On what gains act."""

    UPDATE = "update"
    COPIES = "update, and on the copies of weights in the optimizer's state"
    GRADIENT = "gradient"


def acting_with(optimizer: Optimizer) -> Acting | None:
    """Where gains have to act for a weight to move by gain times the distance that it would have moved without.

    Args:
        optimizer: the optimizer; it is not changed.

    Returns:
        Where; None if nothing could be tried, because another optimizer of its class could not be made or used.

    Raises:
        LifecycleError: none of them is right.
    """
    optimizer = next(inside(optimizer), optimizer)  # such as that of a shard
    if type(optimizer).__module__.startswith("torch.optim"):
        return Acting.UPDATE
    slopes = {}
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = _displacement(optimizer, None)
            if not plain.any():
                return None
            for acting in Acting:
                slopes[acting] = _slope(_displacement(optimizer, acting), plain)
                if abs(slopes[acting] - 1) < TOLERANCE:
                    return acting
    except Exception:  # noqa: BLE001 - the class is anybody's code
        return None
    raise LifecycleError(
        f"attach: {type(optimizer).__name__} undoes gains, as it keeps copies of the weights: in {STEPS} steps on a "
        f"small weight the slope of displacement on gain was {slopes[Acting.UPDATE]:.2f} with gains on its update, and "
        f"{slopes[Acting.GRADIENT]:.2f} with gains on the gradient; use an optimizer that keeps no copy, "
        "or one in a wrapper that keeps it (ScheduleFreeWrapper, Lookahead)"
    )


def _displacement(optimizer: Optimizer, acting: Acting | None) -> Tensor:
    """How far a small weight moves with random gradients that are the same at every call; None: without gains."""
    torch.manual_seed(0)  # some optimizers draw numbers
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
    update = Update([synapses], one, with_copies=acting is Acting.COPIES)
    for _ in range(STEPS):
        weight.grad = 1 + 0.1 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
        if acting is Acting.GRADIENT:
            weight.grad *= gain
        update.begin()
        one.step()
        update.end([acting in (Acting.UPDATE, Acting.COPIES)])
    return weight.detach() - start


def _options(optimizer: Optimizer) -> dict[str, Any]:
    """The defaults of an optimizer that its constructor takes; some keep more in them."""
    parameters = inspect.signature(type(optimizer)).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    return copy.deepcopy({k: v for k, v in optimizer.defaults.items() if takes_all or k in parameters})


def _gain() -> Tensor:
    return torch.linspace(0.7, 1.3, 256, dtype=torch.float64).view(16, 16)


def _slope(moved: Tensor, plain: Tensor) -> float:
    """The slope of displacement, relative to that without gains, on gain; by least squares, since some hardly move."""
    gain = _gain() - _gain().mean()
    terms = torch.stack([plain.flatten(), (plain * gain).flatten()], 1)
    level, slope = map(float, torch.linalg.lstsq(terms, moved.flatten().unsqueeze(1)).solution.flatten())
    return float(_gain().mean()) * slope / level
