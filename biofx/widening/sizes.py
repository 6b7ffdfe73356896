"""Sizes: what of a module, or of the arguments of a call, counts units."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from biofx.widening.twins import Twins

SIZES = ("num_features", "num_channels", "num_parameters", "normalized_shape")  # of modules with a parameter per unit


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module itself."""
    return {key: t for key, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}


def unit_axis(tensor: Tensor, twins: Twins, which: int = -1) -> int | None:
    """The last axis that has the old size, or the first one."""
    axes = [axis for axis, size in enumerate(tensor.shape) if size == twins.size]
    return axes[which] if axes else None


def wider_sizes(module: nn.Module, twins: Twins) -> dict[str, Any]:
    """The new number of units of a module with a parameter for each."""
    new, present = len(twins.source), {name: vars(module)[name] for name in SIZES if name in vars(module)}
    return {
        name: tuple(new if x == twins.size else x for x in size) if isinstance(size, tuple) else new
        for name, size in present.items()
        if size == twins.size or isinstance(size, tuple)
    }


def scalings(argument: Any, factor: Fraction) -> Iterator[Any]:
    """An argument with one integer in it scaled, or all those beside each other."""
    if isinstance(argument, int) and not isinstance(argument, bool):
        if argument and (argument * factor).denominator == 1:
            yield int(argument * factor)
    elif isinstance(argument, slice):
        for start, stop in scalings((argument.start, argument.stop), factor):
            yield slice(start, stop, argument.step)
    elif isinstance(argument, tuple | list):
        for index, item in enumerate(argument):
            for scaled in scalings(item, factor):
                yield type(argument)([*argument[:index], scaled, *argument[index + 1 :]])
        every = [next(scalings(item, factor), item) if isinstance(item, int) else item for item in argument]
        if every != list(argument):
            yield type(argument)(every)
    elif isinstance(argument, dict):
        for key, item in argument.items():
            for scaled in scalings(item, factor):
                yield argument | {key: scaled}
