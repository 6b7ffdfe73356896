"""Observers: operators that read an activation and add a sum for each unit to a buffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from biofx.base.errors import ArgumentError
from biofx.base.shards import local, part_along
from biofx.base.torch_internals import below_autograd, below_transform, runs_backward
from biofx.model.definitions import LIBRARY, NAMESPACE, name_of, new_name, show, written_name

Observation = Callable[[Tensor, tuple[int, ...]], Tensor]

LOOKS: dict[str, Observation] = {}  # what observers compute, by the operator's name
_OBSERVERS: list[str] = []  # the full names of those that do not support DTensors yet


def observer(name: str) -> Callable[[Observation], Observation]:
    r"""Define `torch.ops.biofx.<name>(activity, state, unit_axis, training)`, which adds statistics to a buffer.

    The buffer `state` has shape (2, 2, units) and starts at 0. After calls $k = 1, 2, \ldots$

    $$\mathrm{state}_0 + \mathrm{state}_1 = \Bigl(\sum_k \mathrm{look}(z_k),\ \sum_k n_k\Bigr)$$

    where $n_k$ is the number of positions of the activity $z_k$: all elements of batch, time and space. Sums are
    compensated (Kahan): $\mathrm{state}_1$ holds the rounding errors of $\mathrm{state}_0$. So any number of summands
    of the same sign add up to about a unit in the last place, and integers exactly, up to 2⁴⁸ in float32.

    An activity whose sums are not finite is left out.

    The operator does nothing in evaluation mode and during a backward pass. There, activation checkpointing computes
    activations again, which must not count twice.

    Args:
        name: the operator's name.

    Returns:
        A decorator for `look(activity, positions)`. It gets the activity in the layout of the operator's output, and
        returns a sum over the dimensions `positions`: one number for each unit, shape (units,), in float32 or wider.
        `positions` is never empty. The decorator returns the function unchanged. It may be defined again, as a gradient
        hook may.

    Raises:
        ArgumentError: the name is that of an observer that was written elsewhere. The operator raises it if `look`
            returns another shape.

    Example:
        >>> import torch
        >>> from biofx import operators
        >>> @operators.observer("sum_squares")
        ... def sum_squares(activity, positions):
        ...     return activity.square().sum(positions)
        >>> state = torch.zeros(2, 2, 3)
        >>> torch.ops.biofx.sum_squares(torch.full((5, 3, 4), 0.5), state, 1, True)
        >>> state.sum(0)
        tensor([[ 5.,  5.,  5.],
                [20., 20., 20.]])
    """
    written = name

    def define(look: Observation) -> Observation:
        name = new_name("observer", written, look)

        def kernel(activity: Tensor, state: Tensor, unit_axis: int, training: bool) -> None:
            if training and not runs_backward():
                with below_autograd():  # no gradients, and no tangents in the state
                    axis = _from_behind(unit_axis, activity)
                    activity = activity[None]  # so that `positions` is never empty: `sum(())` adds up everything
                    positions = tuple(d for d in range(-activity.dim(), 0) if d != axis)
                    sums = look(activity, positions)
                    _check_shape(written, sums, state)
                    _add(state, sums, math.prod(activity.shape[d] for d in positions))

        LIBRARY.define(f"{name}(Tensor activity, Tensor(a!) state, int unit_axis, bool training) -> ()")
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *_: None, lib=LIBRARY)
        operator = getattr(torch.ops.biofx, name)
        _OBSERVERS.append(f"{NAMESPACE}::{name}")
        LOOKS[name] = look

        def below_transform(activity: Tensor, state: Tensor, unit_axis: int, training: bool) -> None:
            axis = _from_behind(unit_axis, activity)
            for seen_activity, seen_state in _for_each_model(activity, state):
                operator(seen_activity, seen_state, axis, training)

        # Observers have no gradients, so every transform of torch.func just passes on the tensors that it wraps.
        LIBRARY.impl(name, below_transform, "FuncTorchDynamicLayerFrontMode")
        show(name)
        return look

    return define


@torch.no_grad()
def check_observer(target: Any, like: Tensor, units: int, unit_axis: int) -> None:
    """Refuse what is no observer, and an observer that returns no sum, judged by one trial.

    Its activity has the dtype and the device of `like`, and units on an axis that is counted from the end.

    Raises:
        ArgumentError: the observer is refused.
    """
    name = name_of(target)
    if name not in LOOKS:
        raise ArgumentError(f"{target!r} is no observer; give torch.ops.biofx.<name> (help(operators.observer))")
    shape = 2, 3, units, *[2] * (-unit_axis - 1)
    activity = torch.arange(math.prod(shape), device=like.device).view(shape).cos().mul(2).to(like.dtype)

    def seen(activity: Tensor) -> Tensor:
        state = like.new_zeros((2, 2, units), dtype=torch.promote_types(like.dtype, torch.float32))
        target(activity, state, unit_axis, True)
        return state.sum(0)[0]

    if not torch.allclose(seen(torch.cat((activity, activity))), 2 * seen(activity), rtol=1e-2, atol=1e-3):
        raise ArgumentError(
            f"the observer biofx.{written_name(name)} returns no sum over positions: it does not return twice as much "
            "if all are there twice; biofx computes the mean itself, so return a sum, such as activity.sum(positions)"
        )


def observe_shards() -> None:
    """Register observers for DTensors. Each process observes its part; the mean over processes is that of the whole."""
    from torch.distributed.tensor import DTensor  # slow to import

    while _OBSERVERS:
        torch.library.register_torch_dispatch(_OBSERVERS.pop(), DTensor, _look_at_part)


def _look_at_part(cls: Any, operator: Any, types: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    activity, state, unit_axis, training = args
    if training:
        part, units = part_along(activity, unit_axis)
        operator(part, local(state)[..., units], unit_axis, training)


def _check_shape(observer: str, sums: Tensor, state: Tensor) -> None:
    if sums.shape != state.shape[-1:]:
        raise ArgumentError(
            f"the observer biofx.{observer} returns a tensor of shape {tuple(sums.shape)}; it has to return a sum for "
            f"each unit, shape {tuple(state.shape[-1:])}, such as activity.sum(positions)"
        )


def _from_behind(axis: int, activity: Tensor) -> int:
    """Return an axis as a negative number, which stays valid if dimensions are added in front."""
    return axis if axis < 0 else axis - activity.dim()


def _add(state: Tensor, sums: Tensor, positions: int) -> None:
    """Add to the totals of an observer's state, and keep the rounding errors in its rest."""
    total, rest = state.unbind()
    seen = torch.stack((sums, torch.full_like(sums, positions)))
    # A batch that is not finite ends in a step that is refused; what rules remember must not keep it. If one sum is not
    # finite, all become NaN, and then 0; to ask whether they are finite takes more operators.
    seen += (sums * 0).sum()
    rest += seen.nan_to_num_(0.0)
    before = total.clone()
    total += rest
    rest -= total - before


def _for_each_model(activity: Tensor, state: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Unwrap the innermost transform of torch.func: yield each state with the activity that belongs to it."""
    with below_transform(activity, state) as ((activity, of_activity), (state, of_state)):
        if of_state is None:  # one model on many samples
            yield activity if of_activity is None else activity.movedim(of_activity, 0), state
            return
        for model in range(state.shape[of_state]):  # many models, each with a state of its own
            own = activity if of_activity is None else activity.select(of_activity, model)
            yield own, state.select(of_state, model)
