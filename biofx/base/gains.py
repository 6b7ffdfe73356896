r"""Gains of synapses: drawn from a counter, so that they need not be stored, or stored in 8 bits.

*Drawn*: entry i of a weight has the gain $F^{-1}\bigl((k_i + \tfrac12) / 2^{14}\bigr)$, clamped, with F the cumulative
distribution function, and $k_i$ in 0 … 2¹⁴ − 1 a hash of seed, weight and i (`noise.levels`). So one table holds
all gains of a distribution, and a gain is one of 2¹⁴: the distribution function is off by at most 2⁻¹⁵.

*In 8 bits* (`torch.uint8`), k is the gain (k/128)²: exact for 0 and 1, at most 3.97, and rounded by at most √c/128, or
0.8% of a gain of 1. Levels are closer together near 0, because dampened gains become small.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from biofx.base import noise
from biofx.base.noise import LEVELS, Counter

CPU, OTHER = 1 << 18, 1 << 24  # entries that are drawn at once
CRYSTALLIZED = 0.5  # a synapse has crystallized when its gain is below half of the neutral one
LARGEST = (255 / 128) ** 2  # in 8 bits
POINTS = 1 << 17  # at which a density is integrated


def drawn(
    likes: Sequence[Tensor],
    counters: Sequence[Counter],
    distribution: str,
    nu: float,
    minimum: float,
    maximum: float,
    *,
    compiled: bool = False,
) -> list[Tensor]:
    """Gains that follow from counters, the same on every device; of the shape and dtype of each tensor, contiguous.

    Args:
        likes: the tensors, at least one, on one device.
        counters: the counter of each.
        distribution: a name in `QUANTILES`.
        nu: the spread.
        minimum: the lower clamp.
        maximum: the upper clamp.
        compiled: whether to compile what is computed; on a CPU, nothing is.
    """
    results = [torch.empty(like.shape, dtype=like.dtype, device=like.device) for like in likes]
    size = CPU if likes[0].device.type == "cpu" else OTHER
    whole = [(r.view(-1), counter) for r, counter in zip(results, counters, strict=True)]
    calls = [[each for each in whole if 0 < each[0].numel() <= size]]
    for flat, counter in whole:
        if flat.numel() > size:
            calls += [[(flat[start : start + size], counter.at(start))] for start in range(0, flat.numel(), size)]
    for call in filter(None, calls):
        parts, own = zip(*call, strict=True)
        for part, level in zip(parts, noise.levels(parts, own, compiled=compiled), strict=True):
            table = _table(distribution, nu, minimum, maximum, part.dtype, part.device)
            torch.index_select(table, 0, level, out=part)
    return results


@functools.lru_cache(maxsize=128)
def _table(
    distribution: str, nu: float, minimum: float, maximum: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The gain of every level."""
    with torch.inference_mode(mode=False):
        chances = (torch.arange(LEVELS, dtype=torch.float64, device="cpu") + 0.5) / LEVELS
        gains = QUANTILES[distribution](chances, nu).clamp(minimum, maximum)
        table: Tensor = coded(gains, dtype).to(device)
        return table


def decoded(gain: Tensor) -> Tensor:
    """The gain that a stored one stands for; the same tensor, unless it is stored in 8 bits."""
    return gain.float().div(128).square() if gain.dtype == torch.uint8 else gain


def coded(gain: Tensor, dtype: torch.dtype) -> Tensor:
    """Gains in the code of a dtype, rounded to the nearest."""
    if dtype is not torch.uint8:
        return gain.to(dtype)
    return gain.clamp(0, LARGEST).sqrt().mul(128).round().to(torch.uint8)


# --- Distributions of mean 1: their quantiles at given chances


def _ones(chances: Tensor, nu: float) -> Tensor:
    """1, always."""
    return torch.ones_like(chances)


def _uniform(chances: Tensor, nu: float) -> Tensor:
    """U(1−ν, 1+ν)."""
    return 1 + nu * (2 * chances - 1)


def _normal(chances: Tensor, nu: float) -> Tensor:
    """N(1, ν²)."""
    deviation: Tensor = torch.special.ndtri(chances)
    return 1 + nu * deviation


def _lognormal(chances: Tensor, nu: float) -> Tensor:
    """Exp N(−s²/2, s²) with s² = ln(1+ν²): mean 1, standard deviation ν."""
    variance = math.log1p(nu**2)
    return torch.exp(math.sqrt(variance) * torch.special.ndtri(chances) - variance / 2)


def _gamma(chances: Tensor, nu: float) -> Tensor:
    """Gamma with shape parameter a = 1/ν² and scale ν²: mean 1, standard deviation ν; by the density of ln x/a."""
    a = nu**-2
    lowest, highest = -12 / math.sqrt(a) - 20 / a, math.log1p(12 / math.sqrt(a) + 40 / a)
    return _inverse(chances, lambda y: a * (y - torch.expm1(y)), lowest, highest).exp()


def _beta(chances: Tensor, nu: float) -> Tensor:
    """1 + (2·B − 1)·ν with B ~ Beta(a, a), a = 1/ν; by the density of y = ln B/(1−B), where 2·B − 1 = tanh y/2."""
    softplus, highest = torch.nn.functional.softplus, 12 * math.sqrt(2 * nu) + 20 * nu
    return 1 + nu * torch.tanh(_inverse(chances, lambda y: -(softplus(y) + softplus(-y)) / nu, -highest, highest) / 2)


def _inverse(chances: Tensor, log_density: Callable[[Tensor], Tensor], lowest: float, highest: float) -> Tensor:
    """Invert the integral of a smooth density that is negligible beyond two bounds, whatever its scale."""
    y = torch.linspace(lowest, highest, POINTS, dtype=chances.dtype, device=chances.device)
    density = log_density(y)
    density = torch.exp(density - density.max())
    below = torch.cumsum((density[1:] + density[:-1]) / 2, 0)
    below = torch.cat((below.new_zeros(1), below / below[-1]))
    right = torch.searchsorted(below, chances).clamp(1, POINTS - 1)
    share = (chances - below[right - 1]) / (below[right] - below[right - 1])
    return torch.lerp(y[right - 1], y[right], share)


QUANTILES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "baseline": _ones,
    "uniform": _uniform,
    "normal": _normal,
    "lognormal": _lognormal,
    "gamma": _gamma,
    "beta": _beta,
}
