"""Sizes: the numbers in modules and in arguments of calls that count units."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from biofx.widening.axis_doubling import AxisDoubling

SIZES = ("num_features", "num_channels", "num_parameters", "normalized_shape")  # of modules with a parameter per unit


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a module itself registers."""
    return {key: t for key, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}


def unit_axis(tensor: Tensor, doubling: AxisDoubling, which: int = -1) -> int | None:
    """The axis of a parameter that has one entry per unit: the last one of that size, or with `which=0` the first."""
    axes = [axis for axis, size in enumerate(tensor.shape) if size == doubling.size]
    return axes[which] if axes else None


def doubled_sizes(module: nn.Module, doubling: AxisDoubling) -> dict[str, Any]:
    """The attributes that count the units of a module with a parameter per unit, after doubling."""
    new, present = len(doubling.source), {name: vars(module)[name] for name in SIZES if name in vars(module)}
    return {
        name: tuple(new if x == doubling.size else x for x in size) if isinstance(size, tuple) else new
        for name, size in present.items()
        if size == doubling.size or isinstance(size, tuple)
    }


def scaled_arguments(argument: Any, factor: Fraction) -> Iterator[Any]:
    """Copies of an argument in which integers are scaled: each integer alone, and all integers of one sequence."""
    if isinstance(argument, int) and not isinstance(argument, bool):
        if argument and (argument * factor).denominator == 1:
            yield int(argument * factor)
    elif isinstance(argument, slice):
        for start, stop in scaled_arguments((argument.start, argument.stop), factor):
            yield slice(start, stop, argument.step)
    elif isinstance(argument, tuple | list):
        for index, item in enumerate(argument):
            for scaled in scaled_arguments(item, factor):
                yield type(argument)([*argument[:index], scaled, *argument[index + 1 :]])
        every = [next(scaled_arguments(item, factor), item) if isinstance(item, int) else item for item in argument]
        if every != list(argument):
            yield type(argument)(every)
    elif isinstance(argument, dict):
        for key, item in argument.items():
            for scaled in scaled_arguments(item, factor):
                yield argument | {key: scaled}
