"""Statistics of weights, over all their parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biofx.training.blocks import batches, wide
from biofx.training.ranks import summed

if TYPE_CHECKING:
    from biofx.training.plastic_weight import PlasticWeight

Statistic = Callable[[list[Tensor]], Sequence[Tensor]]


def of_parts(weights: Sequence[PlasticWeight], statistic: Statistic) -> list[Tensor]:
    """A statistic of the part of each weight that this process holds.

    Args:
        weights: the weights.
        statistic: a small tensor for each of some tensors of one dtype.
    """
    found: dict[int, Tensor] = {}
    for batch in batches([weight.raw for weight in weights]):
        found |= zip(batch, statistic([weights[index].value for index in batch]), strict=True)
    return [found[index] for index in range(len(weights))]


def mean_magnitudes(weights: Sequence[PlasticWeight]) -> list[Tensor]:
    """The mean of |w| for each weight, in single precision at least."""
    sums = summed(weights, of_parts(weights, _magnitudes))
    return list(torch._foreach_div(sums, [float(weight.size) for weight in weights])) if sums else []


def _magnitudes(values: list[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_norm(values, 1, dtype=wide(values[0][:0]).dtype)
