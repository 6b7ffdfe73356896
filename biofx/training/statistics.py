"""Statistics of weights, over all their parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biofx.training.blocks import batches, blocks, wide_dtype
from biofx.training.ranks import summed

if TYPE_CHECKING:
    from biofx.training.plastic_weight import PlasticWeight

FEW = 1 << 13  # entries of a tensor


@dataclass(frozen=True)
class Statistic:
    """Numbers of a weight that follow from the same numbers of its parts.

    Attributes:
        of_parts: a small tensor for each of some parts of one dtype.
        join: that of the whole, from those of its parts, which are stacked along axis 0.
        over_ranks: those of whole weights, from those of the parts that this process holds.
    """

    of_parts: Callable[[list[Tensor]], Sequence[Tensor]]
    join: Callable[[Tensor], Tensor]
    over_ranks: Callable[[Sequence[PlasticWeight], Sequence[Tensor]], list[Tensor]]

    def __call__(self, weights: Sequence[PlasticWeight]) -> list[Tensor]:
        """A small tensor for each weight."""
        found: list[list[Tensor]] = [[] for _ in weights]
        for batch in batches([weight.raw for weight in weights]):
            for block in blocks([weights[index].value for index in batch]):
                for place, numbers in zip(block.places, self.of_parts(*block.parts), strict=True):
                    found[batch[place.index]].append(numbers)
        return self.over_ranks(weights, [x[0] if len(x) == 1 else self.join(torch.stack(x)) for x in found])


def over_entries(of_parts: Callable[[list[Tensor]], Sequence[Tensor]]) -> Statistic:
    """A statistic that is a sum over entries.

    Args:
        of_parts: the sums of some parts of one dtype, a small tensor for each.
    """
    return Statistic(of_parts, lambda sums: sums.sum(0), summed)


def magnitudes(parts: list[Tensor]) -> Sequence[Tensor]:
    """The sum of the magnitudes of each of some tensors, in single precision at least.

    On a CPU a norm adds one entry after the other. That takes six times as long as a sum, and of 40 million entries in
    single precision a tenth is lost. Small tensors are not worth a call for each of them.
    """
    dtype = wide_dtype(parts[0].dtype)
    if parts[0].is_cpu and sum(part.numel() for part in parts) > FEW * len(parts):
        return [part.sum(dtype=dtype) for part in torch._foreach_abs(parts)]
    return torch._foreach_norm(parts, 1, dtype=dtype)


def magnitudes_along(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The sums of magnitudes along some axes; as `magnitudes`."""
    dtype = wide_dtype(values.dtype)
    if values.is_cpu:
        return values.abs().sum(axes, dtype=dtype)
    sums: Tensor = torch.linalg.vector_norm(values, 1, axes, dtype=dtype)
    return sums


def mean_magnitudes(weights: Sequence[PlasticWeight]) -> list[Tensor]:
    """The mean of |w| for each weight, in single precision at least."""
    sums = over_entries(magnitudes)(weights)
    return list(torch._foreach_div(sums, [float(weight.size) for weight in weights])) if sums else []
