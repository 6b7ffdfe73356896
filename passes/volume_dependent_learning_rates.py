"""Volume-dependent plasticity: large synapses are stable, small ones are plastic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from biofx.base.noise import normal
from biofx.base.options import check_number
from biofx.model.gradient_hooks import gradient_hook
from biofx.model.slots import Slot
from biofx.model.synapses import State
from biofx.rewrite.registry import Pass, option, register

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.editor import Editor


@register
@dataclass(frozen=True)
class VolumeDependentLearningRates(Pass):
    r"""Scale the learning of every synapse by a noisy factor that falls with its size.

    $$g \leftarrow g \cdot |n|, \qquad n \sim \mathcal{N}\!\left(m, (v\,m)^2\right), \qquad
    m = \eta\, e^{-s\,|w| / (|w| + 1)}$$

    with g the gradient of the stored weight w, whose magnitude stands for the volume of the spine, η `base_lr`, s
    `stability`, and v `variability`. Without the noise, the factor is in (0, η]: with the defaults, learning is at
    least ten times slower.

    The noise n is drawn anew at every step of the optimizer (`biofx.attach` counts them in `<weight>_synapses.steps`).
    It is the same on every rank and for all micro-batches of a step, so it commutes with gradient accumulation. The
    node is `biofx.volume_grad`. Nothing is stored: the noise follows from seed, step and the weight's name.

    The reference package has the same formula, and applies it to `.grad` by hand.

    Args:
        base_lr: η, the factor of a synapse of size 0, above 0. Default as in the reference package.
        stability: s, how fast the factor falls with size, above 0. Default as in the reference package.
        variability: v, relative standard deviation of the noise, at least 0. Default as in the reference package.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(2, 1), [passes.VolumeDependentLearningRates(variability=0.0)])
        >>> with torch.no_grad():
        ...     _ = bio.weight.copy_(torch.tensor([[0.0, 3.0]]))
        >>> bio(torch.ones(2)).backward()
        >>> bio.weight.grad  # 0.1 · exp(−2 · 0) and 0.1 · exp(−2 · 3/4)
        tensor([[0.1000, 0.0223]])

    References:
        Hofmann, Becker, Tetzlaff & Mäder, Concept transfer of synaptic diversity from biological to artificial neural
        networks, Nature Communications 16, 2025, doi 10.1038/s41467-025-60078-9.
    """

    name: ClassVar[str] = "volume-dependent-learning-rates"
    slot: ClassVar[Slot] = Slot.HOOK
    preserves_function: ClassVar[bool] = True  # only gradients change

    base_lr: float = option(0.1, check_number, above=0)
    stability: float = option(2.0, check_number, above=0)
    variability: float = option(0.2, check_number, at_least=0)

    @property
    def acts_at_step(self) -> bool:
        """True: every step has its own noise."""
        return True

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Hook the factor to the gradient."""
        edit.count_steps()
        position = (State("seed"), State("steps"), site.name)
        edit.insert(torch.ops.biofx.volume_grad, *position, self.base_lr, self.stability, self.variability)


def volume_factor(weight: Tensor, noise: Tensor, base_lr: float, stability: float, variability: float) -> Tensor:
    """|n| with n = m·(1 + v·noise), for standard normal noise."""
    mean = base_lr * torch.exp(-stability * weight.abs() / (weight.abs() + 1))
    return (mean * (1 + variability * noise)).abs()


def volume_factors(
    weights: list[Tensor], noise: list[Tensor], base_lr: float, stability: float, variability: float
) -> Sequence[Tensor]:
    """The same for many weights, in few operations."""
    # exp(−s·a/(a+1)) = exp(s/(a+1))/exp(s); in place, because a new tensor costs more than the arithmetic.
    means = torch._foreach_abs(weights)
    torch._foreach_add_(means, 1)
    torch._foreach_reciprocal_(means)
    torch._foreach_mul_(means, stability)
    torch._foreach_exp_(means)
    torch._foreach_mul_(means, base_lr * math.exp(-stability))
    factors = torch._foreach_addcmul(means, means, noise, value=variability)
    torch._foreach_abs_(factors)
    return list(factors)


@gradient_hook(
    "volume_grad(Tensor(a) weight, Tensor seed, Tensor steps, str site,"
    " float base_lr, float stability, float variability) -> Tensor(a)",
    factors=volume_factors,
    draw=normal,
)
def volume_grad(
    gradient: Tensor, weight: Tensor, noise: Tensor, base_lr: float, stability: float, variability: float
) -> Tensor:
    """Volume-dependent factor on every synapse: g ← g·|n|."""
    return gradient * volume_factor(weight, noise, base_lr, stability, variability)
