r"""Spine turnover: small synapses are replaced by new ones.

$$P(\text{replaced}) = e^{-\mathrm{dre}\,|w| / \sigma(w)}$$
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from biofx.editor import Editor
from biofx.model.slots import Slot
from biofx.options import check_choice, check_integer, check_number
from biofx.plastic_weight import PlasticWeight
from biofx.registry import Moment, Pass, register
from biofx.weights.sites import WeightSite


@register
@dataclass(frozen=True)
class Rejuvenate(Pass):
    r"""Replace small synapses at random, after the optimizer's step.

    | rule | a synapse is replaced | new synapse |
    |---|---|---|
    | `"exponential"` | with probability P = exp(−dre·\|w\|/σ(w)) | ± lognormal, mean and deviation of \|w\| |
    | `"threshold"` (the paper) | where \|N(0, M/dre)\| > \|w\| | U(−M, M), M = max\|w\| |

    with w the weight of a synapse (each of several on its own), and σ(w) its standard deviation over the site. The
    sign of a new synapse is its unit's under Dale's principle, and random otherwise; its gain is that of the place.
    Only replaced entries change, and the optimizer forgets what it remembers of them (momentum, Adam's moments), since
    that was about another synapse. Under the exponential rule, a site whose weights are all equal is left as it is.
    `<weight>_replaced` counts all replacements.

    *Under Dale's principle* a weight of 0 is the absence of a synapse, so there is nothing to replace. After turnover,
    the excitatory and the inhibitory synapses of every postsynaptic unit are scaled, old ones as well, to the totals
    that they had: otherwise turnover would fill up what is sparse, and activity explode.

    Adam corrects its moments for the steps of the weight as a whole, so a new synapse moves by several learning rates
    at first.

    In the reference package new weights are always positive, and about 1e-15 when the mean weight is not; every weight
    is clamped to [−1, 1]; NaN is replaced by new weights; the optimizer's state is kept.

    Args:
        dre: how much larger than the spread of weights a synapse must be to be safe, above 0: a higher value replaces
            less. Default as in the reference package; the paper's threshold rule has 14.
        every: steps between two turnovers.
        rule: `"exponential"` or `"threshold"`.

    Raises:
        ArgumentError: an option out of its range.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(100, 100), [passes.Rejuvenate(dre=8.0)])
        >>> optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
        >>> attachment = biofx.attach(bio, optimizer)
        >>> before = bio.weight.detach().clone()
        >>> bio(torch.randn(1, 100)).sum().backward()
        >>> optimizer.step()
        >>> int((bio.weight != before).sum()) == int(bio.weight_synapses.replaced) > 0
        True

    References:
        Hofmann, Becker, Tetzlaff & Mäder, Concept transfer of synaptic diversity from biological to artificial neural
        networks, Nature Communications 16, 2025, doi 10.1038/s41467-025-60078-9.
    """

    name: ClassVar[str] = "rejuvenate"
    slot: ClassVar[Slot] = Slot.HOOK
    moment: ClassVar[Moment] = Moment.TURNOVER

    dre: float = 8.0
    every: int = 1
    rule: str = "exponential"

    def __post_init__(self) -> None:
        check_number(self, "dre", above=0)
        check_integer(self, "every", at_least=1)
        check_choice(self, "rule", RULES)

    @property
    def preserves_function(self) -> bool:
        """True at insertion: turnover begins with the first step."""
        return True

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Count replacements; the weight itself changes at the steps."""
        edit.keep("replaced", torch.zeros((), dtype=torch.int64))

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Replace synapses, every so many steps."""
        choose, draw = RULES[self.rule]
        for weight in weights:
            if weight.step % self.every:
                continue
            generator = weight.generator()
            value, sign = weight.value, weight.site.sign
            mask = choose(value, self.dre, generator)
            if sign is not None:
                mask &= value != 0
            mask = weight.without_padding(mask)
            new = draw(value, int(mask.sum()), generator).to(value.device, value.dtype)
            if sign is not None:
                signs = sign.expand_as(value)[mask]
                new = torch.where(signs == 0, new, new.abs() * signs)
            old = value if sign is None else value.clone()
            weight.replace(mask, new)
            if sign is not None:
                weight.assign(with_totals_of(weight.site, old, weight.value, sign))
            weight.state("replaced").add_(len(new))


def with_totals_of(site: WeightSite, old: Tensor, new: Tensor, sign: Tensor) -> Tensor:
    """New weights, scaled so that excitation and inhibition of every unit have the totals that they had."""
    factor = torch.ones_like(new)
    for own in (sign > 0, sign < 0):
        totals = []
        for weight in (old, new):
            part = (weight * own).abs()
            totals.append(site.incoming(part.sum(0) if site.is_split else part).sum(1))
        ratio = torch.where(totals[1] > 0, totals[0] / totals[1], 1).to(new.dtype)
        factor = torch.where(own, site.spread(ratio), factor)
    return new * factor


def turnover_probability(weight: Tensor, dre: float) -> Tensor:
    """P = exp(−dre·|w|/σ(w)), elementwise; 0 if all weights are equal."""
    spread = weight.std(correction=0)
    probability = weight.abs().mul_(-dre).div_(spread).exp_()
    return probability if spread > 0 else torch.zeros_like(weight)


def choose_exponentially(weight: Tensor, dre: float, generator: torch.Generator) -> Tensor:
    """Mask of the synapses to replace, each with its turnover probability."""
    uniform = torch.rand(weight.shape, generator=generator).to(weight.device)
    return uniform < turnover_probability(weight.float(), dre)


def draw_lognormal(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """New weights of either sign, with a lognormal magnitude of the mean and standard deviation of |w|."""
    magnitude = weight.float().abs()
    mean, deviation = float(magnitude.mean()), float(magnitude.std(correction=0))
    variance = math.log1p((deviation / mean) ** 2) if mean > 0 else 0.0
    size = torch.exp(math.sqrt(variance) * torch.randn(count, generator=generator) - variance / 2) * mean
    return size * (2.0 * torch.randint(2, (count,), generator=generator) - 1)


def choose_by_threshold(weight: Tensor, dre: float, generator: torch.Generator) -> Tensor:
    """Mask of the synapses that are smaller than a normal variable of standard deviation M/dre."""
    magnitude = weight.float().abs()
    threshold = torch.randn(weight.shape, generator=generator).to(weight.device).abs() * (magnitude.max() / dre)
    return threshold > magnitude


def draw_uniform(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """New weights, U(−M, M)."""
    return (2 * torch.rand(count, generator=generator) - 1) * float(weight.abs().max())


RULES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "exponential": (choose_exponentially, draw_lognormal),
    "threshold": (choose_by_threshold, draw_uniform),
}
