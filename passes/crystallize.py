r"""Stabilization: a synapse that hardly learns any more, or learns too wildly, becomes less plastic.

$$c \leftarrow \max(d\,c,\ \mathrm{floor}) \quad\text{where}\quad
|g| < \theta\,|w| \ \text{ or }\ |g| > \overline{|w|}$$
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from biofx.editor import Editor
from biofx.model.slots import Slot
from biofx.options import check_integer, check_number
from biofx.plastic_weight import PlasticWeight
from biofx.registry import Moment, Pass, register
from biofx.weights.sites import WeightSite


@register
@dataclass(frozen=True)
class Crystallize(Pass):
    r"""Dampen the gain of synapses whose gradient is very small for their size, or larger than a typical weight.

    $$c \leftarrow \max(d\,c,\ \mathrm{floor}) \quad\text{where}\quad |g| < \theta\,|w| \ \text{ or }\
    |g| > \overline{|w|}$$

    with c the gain, g the gradient as the optimizer sees it, w the stored weight, $\overline{|w|}$ its mean magnitude
    over the site, θ `threshold` and d `dampening`. It acts before the optimizer's step (`biofx.attach`), so already on
    that step. The gain is the one of `FuzzyLearningRates`, or a neutral one if there is none.

    A gain that another rule has set below the floor stays where it is. With `L1Regularization`, even a silent synapse
    has a gradient of its strength λ, so the first criterion needs θ·|w| > λ.

    The reference package compares |g|/|w| and so divides 0 by 0 for a silent synapse, and has no floor: its gains go
    to 0 for ever.

    Args:
        threshold: θ, at least 0. Default as in the reference package.
        dampening: d, in [0, 1]. Default as in the reference package.
        floor: smallest gain that dampening leaves, at least 0.
        every: steps between two crystallizations.

    Raises:
        ArgumentError: an option out of its range.

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
    moment: ClassVar[Moment] = Moment.GAIN

    threshold: float = 4.5e-5
    dampening: float = 0.6
    floor: float = 1e-3
    every: int = 1

    def __post_init__(self) -> None:
        check_number(self, "threshold", at_least=0)
        check_number(self, "dampening", at_least=0, at_most=1)
        check_number(self, "floor", at_least=0)
        check_integer(self, "every", at_least=1)

    @property
    def preserves_function(self) -> bool:
        """True: only gains change."""
        return True

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Give the weight a gain."""
        edit.gain()

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Dampen gains, every so many steps."""
        for weight in weights:
            if weight.step % self.every == 0:
                gain = weight.state("gain")
                gain.copy_(crystallize(gain, weight.value, weight.gradient, self.threshold, self.dampening, self.floor))


def crystallize(
    gain: Tensor, weight: Tensor, gradient: Tensor, threshold: float, dampening: float, floor: float
) -> Tensor:
    """The gains after one crystallization; all tensors have the shape of the stored weight."""
    # In place, since a new tensor of this size costs more than the arithmetic.
    magnitude, slope = weight.abs(), gradient.abs()
    settled = slope > magnitude.mean()
    settled |= slope < magnitude.mul_(threshold)
    dampened = (gain * dampening).clamp_(min=floor)
    return torch.where(settled, torch.minimum(gain, dampened, out=dampened), gain)
