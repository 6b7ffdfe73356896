"""Stabilization: a synapse that hardly learns any more, or learns too wildly, becomes less plastic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from biofx.base.gains import coded, decoded
from biofx.base.options import check_integer, check_number
from biofx.model.slots import Slot
from biofx.rewrite.registry import Moment, Pass, option, register
from biofx.training.blocks import batches
from biofx.training.compiling import over_blocks
from biofx.training.statistics import mean_magnitudes

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.editor import Editor
    from biofx.training.plastic_weight import PlasticWeight


@register
@dataclass(frozen=True)
class Crystallize(Pass):
    r"""Dampen the gain of synapses whose gradient is very small for their size, or larger than a typical weight.

    $$c \leftarrow \max(d\,c,\ \mathrm{floor}) \quad\text{where}\quad |g| < \theta\,|w| \ \text{ or }\
    |g| > \overline{|w|}$$

    with c the gain, g the gradient as the optimizer sees it, w the synapse under its sign constraint, $\overline{|w|}$
    the mean magnitude over the site, θ `threshold` and d `dampening`. It acts before the optimizer's step
    (`biofx.attach`), so already on that step. The gain is the one of `FuzzyLearningRates`, or a neutral one if there is
    none.

    A gain that another rule has set below the floor stays where it is, and so does one in 8 bits that would move by
    less than half a level: one below (1/(256·(1−√d)))², which is 3e-4 for d = 0.6 and 6e-3 for d = 0.9. With
    `L1Regularization`, even a silent synapse has a gradient of its strength λ, so the first criterion needs θ·|w| > λ.

    The reference package compares |g|/|w| and so divides 0 by 0 for a silent synapse, and has no floor: its gains go
    to 0 for ever.

    Args:
        threshold: θ, at least 0. Default as in the reference package.
        dampening: d, in [0, 1]. Default as in the reference package.
        floor: smallest gain that dampening leaves, at least 0.
        every: steps between two crystallizations.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(1, 1), [passes.Crystallize(dampening=0.5)])
        >>> optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
        >>> attachment = biofx.attach(bio, optimizer)
        >>> for _ in range(2):
        ...     (1000 * bio(torch.ones(1))).sum().backward()  # a gradient far larger than the weight
        ...     optimizer.step()
        >>> bio.weight_synapses.gain
        tensor([[0.2500]])

    References:
        Hofmann, Becker, Tetzlaff & Mäder, Concept transfer of synaptic diversity from biological to artificial neural
        networks, Nature Communications 16, 2025, doi 10.1038/s41467-025-60078-9.
    """

    name: ClassVar[str] = "crystallize"
    slot: ClassVar[Slot] = Slot.HOOK
    preserves_function: ClassVar[bool] = True  # only gains change
    moment: ClassVar[Moment] = Moment.GAIN
    works_on_shards: ClassVar[bool] = True

    threshold: float = option(4.5e-5, check_number, at_least=0)
    dampening: float = option(0.6, check_number, at_least=0, at_most=1)
    floor: float = option(1e-3, check_number, at_least=0)
    every: int = option(1, check_integer, at_least=1)

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Give the weight a gain."""
        edit.gain()

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Dampen gains, every so many steps."""
        due = [weight for weight in weights if weight.step % self.every == 0]
        options = {"threshold": self.threshold, "dampening": self.dampening, "floor": self.floor}
        means = mean_magnitudes(due)
        for batch in batches([weight.raw for weight in due]):
            own = [due[index] for index in batch]
            values, gradients = [weight.value for weight in own], [weight.gradient for weight in own]
            sizes = [means[index].to(value.dtype) for index, value in zip(batch, values, strict=True)]
            gains = [weight.state("gain") for weight in own]
            over_blocks(dampened, dampen_, gains, values, gradients, sizes, compiled=own[0].compiled, **options)


def dampened(
    gain: Tensor, weight: Tensor, gradient: Tensor, mean: Tensor, *, threshold: float, dampening: float, floor: float
) -> Tensor:
    """The stored gain of synapses after crystallization, for the mean magnitude of their weight."""
    settles = (gradient.abs() < threshold * weight.abs()) | (gradient.abs() > mean)
    present = decoded(gain)
    dampened_gain = torch.minimum(present, (dampening * present).clamp(min=floor))
    return coded(torch.where(settles, dampened_gain, present), gain.dtype)


def dampen_(
    gains: list[Tensor],
    weights: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    *,
    threshold: float,
    dampening: float,
    floor: float,
) -> None:
    """The same for many weights, in place."""
    # Arithmetic instead of comparisons and `where`, which cost ten times as much on a CPU.
    silent, wild = torch._foreach_abs(weights), torch._foreach_abs(gradients)
    torch._foreach_mul_(silent, threshold)
    torch._foreach_sub_(silent, wild)  # above 0 where |g| < θ·|w|
    torch._foreach_sub_(wild, means)  # above 0 where |g| is larger than a typical weight
    torch._foreach_maximum_(silent, wild)
    torch._foreach_sign_(silent)
    torch._foreach_clamp_min_(silent, 0)  # 1 where it settles, else 0
    values = [decoded(gain) for gain in gains]
    lowest = torch._foreach_clamp_max(values, floor)  # a gain below the floor stays
    torch._foreach_mul_(silent, dampening - 1)
    torch._foreach_add_(silent, 1)
    torch._foreach_mul_(values, silent)
    torch._foreach_maximum_(values, lowest)
    for gain, value in zip(gains, values, strict=True):
        if value is not gain:  # it is stored in 8 bits
            gain.copy_(coded(value, gain.dtype))
