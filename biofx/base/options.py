"""Checks of a pass's options, for its `__post_init__`: wrong options fail when the pass is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from biofx.base.errors import ArgumentError
from biofx.base.randomness import fixed_defaults


def _refuse(owner: object, option: str, must: str, value: Any) -> ArgumentError:
    return ArgumentError(f"passes.{type(owner).__name__}: {option} must be {must}, got {value!r}")


def check_integer(owner: object, option: str, *, at_least: int) -> None:
    """Refuse anything but an integer that is large enough."""
    value = getattr(owner, option)
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:
        raise _refuse(owner, option, f"an integer ≥ {at_least}", value)


def check_number(
    owner: object,
    option: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Refuse anything but a finite number within the bounds."""
    value = getattr(owner, option)
    bounds = [f"> {above:g}"] if above is not None else []
    bounds += [f"≥ {at_least:g}"] if at_least is not None else []
    bounds += [f"≤ {at_most:g}"] if at_most is not None else []
    bounds += [f"< {below:g}"] if below is not None else []
    fits = (
        isinstance(value, float | int)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    )
    if not fits:
        raise _refuse(owner, option, f"a number {' and '.join(bounds)}".strip(), value)


def check_choice(owner: object, option: str, choices: Collection[str]) -> None:
    """Refuse anything but one of the choices."""
    value = getattr(owner, option)
    if value not in choices:
        raise _refuse(owner, option, f"one of {', '.join(choices)}", value)


def check_flag(owner: object, option: str) -> None:
    """Refuse anything but True and False."""
    value = getattr(owner, option)
    if not isinstance(value, bool):
        raise _refuse(owner, option, "True or False", value)


def check_activation(owner: object, option: str) -> None:
    """Refuse anything but None, a function or module, or the name of an activation in `torch.nn.functional` or `torch`.

    A name is tested: its function has to return a tensor of the shape and dtype of its argument, and the same values
    each time.
    """
    value = getattr(owner, option)
    if not (value is None or callable(value) or (isinstance(value, str) and _is_activation(_find_function(value)))):
        raise _refuse(owner, option, 'None, a function, or a name in torch.nn.functional such as "relu"', value)


def activation_function(name: str) -> Callable[..., Any]:
    """The function that an activation's name stands for."""
    function = _find_function(name)
    assert function is not None
    return function


def _find_function(name: str) -> Callable[..., Any] | None:
    found = getattr(F, name, None) or getattr(torch, name, None)
    return found if callable(found) and not isinstance(found, type) else None


def _is_activation(function: Callable[..., Any] | None) -> bool:
    if function is None:
        return False
    with fixed_defaults(), torch.random.fork_rng(devices=[]), torch.no_grad():
        x = torch.linspace(-2, 2, 96).view(32, 3)  # large enough that a random function does not repeat itself
        try:
            once, again = function(x.clone()), function(x.clone())
        except Exception:  # noqa: BLE001 - a function may raise anything for an argument that it was not made for
            return False
        fits = isinstance(once, Tensor) and (once.shape, once.dtype) == (x.shape, x.dtype)
        return fits and torch.allclose(once, again, rtol=0, atol=0, equal_nan=True)
