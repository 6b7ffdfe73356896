"""Spine turnover: small synapses are replaced by new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from biofx.base import noise
from biofx.base.options import check_choice, check_integer, check_number
from biofx.model.slots import Slot
from biofx.rewrite.registry import Moment, Pass, option, register
from biofx.training.blocks import batches, blocks, wide, wide_dtype
from biofx.training.ranks import largest, summed
from biofx.training.statistics import Statistic, magnitudes, over_entries

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.editor import Editor
    from biofx.training.plastic_weight import PlasticWeight

EQUAL = 1e-5  # the variance, relative to the mean square, that may come from rounding


@register
@dataclass(frozen=True)
class Rejuvenate(Pass):
    r"""Replace small synapses at random, after the optimizer's step.

    | rule | a synapse is replaced | new synapse |
    |---|---|---|
    | `"exponential"` | with probability P = exp(−dre·\|w\|/σ(w)) | ± lognormal, mean and deviation of \|w\| |
    | `"threshold"` (the paper) | where \|N(0, M/dre)\| > \|w\| | U(−M, M), M = max\|w\| |

    with w the weight of a synapse (each of several on its own), and σ(w) its standard deviation over the site. The sign
    of a new synapse is its unit's under Dale's principle, and random otherwise; its gain is that of the place. Only
    replaced entries change, and the optimizer forgets what it remembers of them (momentum, Adam's moments), because
    that belongs to another synapse. Under the exponential rule, a site whose weights are all equal is left alone (a
    standard deviation below 0.3 % of the root mean square may be rounding, and counts as 0).
    `<weight>_synapses.replaced` counts all replacements.

    *Under Dale's principle* a weight of 0 is the absence of a synapse, so there is nothing to replace. After turnover,
    the excitatory and the inhibitory synapses of every postsynaptic unit are scaled, old ones as well, to the totals
    that they had: otherwise turnover would fill up what is sparse, and activity explode. A synapse that grows from 0 is
    small, and so is replaced soon. Balanced weights start with nine tenths of 0, and turn over much more at the same
    `dre`: in one run (a small convolutional network on digits, AdamW, dre=100, every=10), a synapse was replaced twice
    in 400 steps, and 0.1 times without signs; the test accuracy was 89% with turnover and 96% without.

    Adam corrects its moments for the steps of the weight as a whole, so a new synapse moves by several learning rates
    at first.

    In the reference package new weights are always positive, and about 1e-15 when the mean weight is not; every weight
    is clamped to [−1, 1]; NaN is replaced by new weights; the optimizer's state is kept.

    Args:
        dre: how much larger than the spread of weights a synapse must be to be safe, above 0: a higher value replaces
            less. Default as in the reference package; the paper's threshold rule has 14.
        every: steps between two turnovers.
        rule: `"exponential"` or `"threshold"`.

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
    preserves_function: ClassVar[bool] = True  # at insertion: turnover begins with the first step
    moment: ClassVar[Moment] = Moment.TURNOVER
    works_on_shards: ClassVar[bool] = True

    dre: float = option(8.0, check_number, above=0)
    every: int = option(1, check_integer, at_least=1)
    rule: str = option("exponential", check_choice, choices=("exponential", "threshold"))

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Count replacements; the weight itself changes at the steps."""
        edit.keep("replaced", torch.zeros((), dtype=torch.int64))

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Replace synapses, every so many steps."""
        due, rule = [weight for weight in weights if weight.step % self.every == 0], RULES[self.rule]
        if not due:
            return
        statistics = rule.statistics(due)
        counts: list[list[Tensor]] = [[] for _ in due]  # of each weight, a number for each block
        for batch in batches([weight.site.raw for weight in due]):  # the same on all ranks
            own = [due[index] for index in batch]
            numbers = rule.numbers([statistics[index] for index in batch], [weight.size for weight in own], self.dre)
            _turn_over(rule, own, [counts[index] for index in batch], *numbers)
        found = [each[0] if len(each) == 1 else torch.stack(each).sum() for each in counts]
        torch._foreach_add_([weight.state("replaced") for weight in due], summed(due, found))


@dataclass(frozen=True)
class Rule:
    """A rule of turnover, for many weights at once: a synapse is replaced where X·scale > |w|, for a random X.

    Attributes:
        statistics: what `numbers` are computed from.
        numbers: the scale of each weight, and what else new synapses depend on, from statistics and sizes of weights.
        random: X, from pairs of noise.
        renewed: new synapses, from the second of each pair, other normal noise, and these numbers.
    """

    statistics: Statistic
    numbers: Callable[[list[Tensor], list[int], float], tuple[list[Tensor], ...]]
    random: Callable[[list[Tensor], list[Tensor]], list[Tensor]]
    renewed: Callable[..., list[Tensor]]


def _turn_over(
    rule: Rule, weights: list[PlasticWeight], counts: list[list[Tensor]], scales: list[Tensor], *numbers: list[Tensor]
) -> None:
    """Replace synapses of weights on one device and of one dtype, and count them."""
    values, signs = [weight.value for weight in weights], [weight.sign for weight in weights]
    scales = [*map(_without_absent, weights, values, scales)]
    # Under Dale's principle the totals of the old weights are needed, so the new ones are stored at the end.
    targets = [w.raw if sign is None else v.clone() for w, v, sign in zip(weights, values, signs, strict=True)]
    which, new = ([weight.counter(purpose) for weight in weights] for purpose in ("which", "new"))
    is_asked = [sign is not None or bool(w.memories) for w, sign in zip(weights, signs, strict=True)]
    # A value stands for a mask that is not needed.
    masks = [torch.empty_like(v, dtype=torch.bool) if a else v for v, a in zip(values, is_asked, strict=True)]
    for block in blocks(values, masks, targets, scales, *numbers):
        own, parts, *others = block.parts
        likes = [wide(x) for x in own]
        pairs = noise.pairs(likes, [which[place.index].at(place.start) for place in block.places])
        normal = noise.normal(likes, [new[place.index].at(place.start) for place in block.places])
        chosen = turn_over_(rule, pairs, normal, own, *others)
        for place, number in zip(block.places, _counts(chosen), strict=True):
            counts[place.index].append(number)
        for place, mask, is_new in zip(block.places, parts, chosen, strict=True):
            if is_asked[place.index]:
                mask.copy_(is_new)
    _give_signs(weights, values, targets, masks)
    for index, weight in enumerate(weights):
        if is_asked[index]:
            weight.forget(masks[index])


def turn_over_(
    rule: Rule,
    pairs: tuple[list[Tensor], list[Tensor]],
    normal: list[Tensor],
    weights: list[Tensor],
    targets: list[Tensor],
    scales: list[Tensor],
    *numbers: list[Tensor],
) -> list[Tensor]:
    """Replace synapses of weights, or of parts of them.

    Args:
        rule: the rule.
        pairs: pairs of noise.
        normal: standard normal noise, which is overwritten.
        weights: the synapses.
        targets: where new ones are put.
        scales: the scale of each weight, or of each of its synapses.
        numbers: the other numbers of the rule.

    Returns:
        1 for the synapses that are replaced, 0 for others.
    """
    # Arithmetic instead of comparisons and `where`, which cost several times as much on a CPU.
    chosen = rule.random(*pairs)
    torch._foreach_mul_(chosen, scales)
    torch._foreach_sub_(chosen, torch._foreach_abs(weights))
    torch._foreach_sign_(chosen)
    torch._foreach_clamp_min_(chosen, 0)
    new = rule.renewed(pairs[1], normal, *numbers)
    dtype = targets[0].dtype
    torch._foreach_lerp_(targets, [x.to(dtype) for x in new], [x.to(dtype) for x in chosen])  # exact for 0 and 1
    return chosen


def _counts(chosen: list[Tensor]) -> Sequence[Tensor]:
    """The numbers of replacements."""
    # The norm of zeros and ones is the root of their number: to the unit, up to four million at once.
    return torch.stack(torch._foreach_norm(chosen, 2)).square().round().to(torch.int64).unbind()


def _without_absent(weight: PlasticWeight, value: Tensor, scale: Tensor) -> Tensor:
    """The scale of every synapse; 0 where there is none."""
    if weight.sign is None and weight.site.padding is None:
        return scale
    present = wide(torch.ones_like(value) if weight.sign is None else (value != 0).to(value.dtype))
    return weight.without_padding(present) * scale


def _give_signs(weights: list[PlasticWeight], old: list[Tensor], new: list[Tensor], masks: list[Tensor]) -> None:
    """Give new synapses the signs of their units, and units the totals of excitation and inhibition that they had."""
    signed = [(index, sign) for index, weight in enumerate(weights) if (sign := weight.sign) is not None]
    for index, sign in signed:
        new[index] = torch.where(masks[index] & (sign != 0), new[index].abs() * sign, new[index])
    own = [weights[index] for index, _ in signed]
    totals = [_totals(weights[index], (old[index], new[index]), sign) for index, sign in signed]
    for weight, (index, sign), total in zip(own, signed, summed(own, totals), strict=True):
        ratios = torch.where(total[1] > 0, total[0] / total[1], 1).to(old[index].dtype)
        factor = torch.ones_like(old[index])
        for ratio, has_sign in zip(ratios, (sign > 0, sign < 0), strict=True):
            factor = torch.where(has_sign, weight.part(weight.site.spread(ratio)), factor)
        weight.assign(new[index] * factor)


def _totals(weight: PlasticWeight, values: Sequence[Tensor], sign: Tensor) -> Tensor:
    """The excitation and inhibition of every postsynaptic unit under several values of a weight, in this part of it."""
    masks = sign > 0, sign < 0
    parts = torch._foreach_mul([value for value in values for _ in masks], [mask for _ in values for mask in masks])
    torch._foreach_abs_(parts)
    return torch.stack(weight.by_unit(parts)).view(len(values), 2, -1)


def lognormal_statistics(parts: list[Tensor]) -> Sequence[Tensor]:
    """Of each part of a weight the sums of w, of |w| and of w²."""
    dtype = wide_dtype(parts[0].dtype)
    norms = torch._foreach_norm(parts, 2, dtype=dtype)
    rows = *(part.sum(dtype=dtype) for part in parts), *magnitudes(parts), *torch._foreach_mul(norms, norms)
    return torch.stack(rows).view(3, -1).unbind(1)


def lognormal_numbers(sums: list[Tensor], counts: list[int], dre: float) -> tuple[list[Tensor], ...]:
    """For each weight σ(w)/dre, and mean and standard deviation of ln|w| if |w| were lognormal.

    The lognormal variable has the mean and the standard deviation of |w|.
    """
    mean, size, square = torch.stack(torch._foreach_div(sums, [float(count) for count in counts])).unbind(1)
    root = square.sqrt()
    variance = (root - mean) * (root + mean)  # E[w²] − E[w]², with less cancellation
    variance = torch.where(variance > EQUAL * square, variance, 0)
    half = (root / size).nan_to_num(nan=1.0).clamp_min(1).log()  # of the variance of ln|w|; 0 for a weight of zeros
    columns = variance.sqrt() / dre, size.log() - half, (2 * half).sqrt()
    return tuple(list(column.unbind()) for column in columns)


def exponential(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Exponential numbers of mean 1: X·σ/dre > |w| has probability exp(−dre·|w|/σ)."""
    squares = list(torch._foreach_mul(first, first))
    torch._foreach_addcmul_(squares, second, second)
    return squares


def lognormal(
    second: list[Tensor], normal: list[Tensor], centers: list[Tensor], deviations: list[Tensor]
) -> list[Tensor]:
    """New synapses ± lognormal; the sign of one of a pair is independent of the sum of their squares."""
    torch._foreach_mul_(normal, deviations)
    torch._foreach_add_(normal, centers)
    torch._foreach_exp_(normal)
    torch._foreach_mul_(normal, torch._foreach_sign(second))
    return normal


def uniform_statistics(parts: list[Tensor]) -> Sequence[Tensor]:
    """Of each part of a weight max|w|."""
    lowest, highest = zip(*(torch.aminmax(x if x.numel() else x.new_zeros(1)) for x in parts), strict=True)
    return wide(torch.maximum(-torch.stack(lowest), torch.stack(highest))).unbind()


def uniform_numbers(largest: list[Tensor], counts: list[int], dre: float) -> tuple[list[Tensor], ...]:
    """For each weight √2·M/dre and M, with M = max|w|."""
    return list(torch._foreach_mul(largest, 2**0.5 / dre)), largest


def half_normal(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Magnitudes of normal numbers of variance ½."""
    return list(torch._foreach_abs(first))


def uniform(second: list[Tensor], normal: list[Tensor], largest: list[Tensor]) -> list[Tensor]:
    """New synapses U(−M, M): erf(z/√2) is U(−1, 1) for a standard normal z."""
    torch._foreach_mul_(normal, 0.5**0.5)
    torch._foreach_erf_(normal)
    torch._foreach_mul_(normal, largest)
    return normal


RULES = {
    "exponential": Rule(over_entries(lognormal_statistics), lognormal_numbers, exponential, lognormal),
    "threshold": Rule(
        Statistic(uniform_statistics, lambda found: found.amax(0), largest), uniform_numbers, half_normal, uniform
    ),
}
