"""Synaptic diversity: every synapse learns at a rate of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from biofx.base import noise
from biofx.base.errors import ArgumentError
from biofx.base.gains import LARGEST, QUANTILES, coded, decoded
from biofx.base.options import check_choice, check_integer, check_number
from biofx.base.shards import extremes
from biofx.model.observers import observer
from biofx.model.slots import Slot
from biofx.rewrite.registry import Moment, Pass, option, register
from biofx.training.blocks import batches, blocks, wide
from biofx.training.statistics import mean_magnitudes
from biofx.weights.facts import Need

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.editor import Editor
    from biofx.training.plastic_weight import PlasticWeight

UNSTORED = "unstored"
WIDE = ("float64", "float32")  # those in which a gain can decay by a small share
DTYPES = (*WIDE, "float16", "bfloat16", "uint8", UNSTORED)
DYNAMIC = ("weight_adaptive", "temporal", "activity")
# What is drawn for each, by its name in `QUANTILES`.
DISTRIBUTIONS = {name: name for name in QUANTILES} | dict.fromkeys(("layer_adaptive", *DYNAMIC), "uniform")


@register
@dataclass(frozen=True)
class FuzzyLearningRates(Pass):
    r"""Draw a gain c for every synapse, once, and scale its learning by it.

    $$g \leftarrow c \cdot g, \qquad c \sim p_\nu \ \text{once for each synapse, clamped to}\ [c_{\min}, c_{\max}]$$

    with g the gradient of the stored weight (of each synapse, if it is split) and ν the spread: the half-width of
    bounded distributions, the standard deviation of unbounded ones. All have mean 1 before clamping.

    | distribution | gain |
    |---|---|
    | `baseline` | 1 |
    | `uniform` | U(1−ν, 1+ν) |
    | `normal` | N(1, ν²) |
    | `lognormal` | exp N(−s²/2, s²), s² = ln(1+ν²) |
    | `gamma` | Gamma with shape 1/ν² and scale ν²: mean 1, standard deviation ν |
    | `beta` | 1 + (2·Beta(1/ν, 1/ν) − 1)·ν |
    | `layer_adaptive` | U(1±ν_l), ν_l = ν·(1 − 0.5·l/(L−1)): ν for the first weights, ν/2 for the deepest |
    | `weight_adaptive` | U(1±ν_w), ν_w = ν·clamp(2 − \|w\|/mean\|w\|, 0.5, 1.5) |
    | `temporal` | starts as `uniform`; c ← 1 + (c−1)·decay at a refresh, and every tenth time + 0.1·U(±ν) |
    | `activity` | U(1±ν_i), ν_i = ν·(2 − a_i), with a_i the relative activity of postsynaptic unit i |

    For `layer_adaptive`, l is the depth of the weight in the graph: how many weights a signal passes before it, on the
    longest path; L−1 is the largest depth. For `activity`, a_i = clamp(1 + 0.1·(n_i/mean n − 1), 0.8, 1.2), where n_i
    counts how often an observer saw |z_i| > 0.01 in training mode, for the output z of the operator; before it has
    seen anything, a_i = 1. The gains of `weight_adaptive`, `temporal` and `activity` are refreshed after every `every`
    steps (`biofx.attach`); a gain that `Crystallize` has dampened below `minimum` is not.

    A gain follows from the seed, the weight's name and the place of the synapse, and is the same on every device: it is
    one of 2¹⁴ quantiles (`base/gains.py`). By default it is kept in the buffer `<weight>_synapses.gain` and applied by
    the node `biofx.scale_grad`. `dtype` says how:

    | dtype | bytes for each synapse | gains |
    |---|---|---|
    | None | as of the weight | to the precision of the weight; `temporal` in float32 at least |
    | `float64` … `bfloat16` | 8, 4, 2, 2 | rounded, `bfloat16` by up to 0.2% below 1 and 0.4% above |
    | `uint8` | 1 | one of 256, (k/128)²; rounded by up to 0.8% of √c, so of a gain of 1 |
    | `unstored` | 0 | to the precision of the weight, and the same as with None |

    Unstored gains are drawn again whenever they act, by the node `biofx.drawn_grad`: block by block at a step
    (`biofx.attach`), or for one weight after the other in the backward pass. `WeightSite.gain` draws them at each call.
    That takes time, so stored gains are faster on a CPU. A gain that changes has to be stored: with `unstored`, the
    last three distributions are refused, and so is `Crystallize` in the same pipeline.

    The reference package multiplies `.grad` by hand between `backward()` and `step()`. Its gamma gains have mean 2, and
    most of them sit at the clamp; its `layer_adaptive` gains are drawn before it knows the layer, so they are uniform;
    its lognormal takes ν as the logarithm's standard deviation.

    Args:
        nu: ν, the spread of the gains, above 0. Default 0.16, as in the reference package.
        distribution: one of the names above.
        minimum: c_min, the lower clamp, at least 0. Default 0.5, as in the reference package.
        maximum: c_max, the upper clamp, at least `minimum`. Default 2, as in the reference package.
        decay: for `temporal`: factor on c − 1 at every refresh, in [0, 1].
        every: for `temporal`, `weight_adaptive` and `activity`: steps between two refreshes.
        dtype: how gains are kept, by name, from the table above.

    Raises:
        ArgumentError: an option out of its range; `unstored` for gains that change; for `temporal`, a dtype whose gains
            would stay where they are, because one refresh moves them by less than half of its resolution; for
            `uint8`, a `maximum` above 3.97.
        PipelineError: at the transform: `unstored`, and `Crystallize` changes the gains.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> bio = biofx.transform(torch.nn.Linear(64, 32), [passes.FuzzyLearningRates(nu=0.16, distribution="gamma")])
        >>> gain = biofx.weight_sites(bio)["weight"].gain
        >>> round(float(gain.mean()), 1), round(float(gain.std()), 1)
        (1.0, 0.2)

    References:
        Hofmann, Becker, Tetzlaff & Mäder, Concept transfer of synaptic diversity from biological to artificial neural
        networks, Nature Communications 16, 2025, doi 10.1038/s41467-025-60078-9.
    """

    name: ClassVar[str] = "fuzzy-learning-rates"
    slot: ClassVar[Slot] = Slot.HOOK
    preserves_function: ClassVar[bool] = True  # only gradients change
    moment: ClassVar[Moment] = Moment.REFRESH
    converted: ClassVar[tuple[str, ...]] = ("dtype",)
    works_on_shards: ClassVar[bool] = True

    nu: float = option(0.16, check_number, above=0)
    distribution: str = option("uniform", check_choice, choices=DISTRIBUTIONS)
    minimum: float = option(0.5, check_number, at_least=0)
    maximum: float = option(2.0, check_number, at_least=0)
    decay: float = option(0.9995, check_number, at_least=0, at_most=1)
    every: int = option(100, check_integer, at_least=1)
    dtype: str | None = option(None, check_choice, choices=DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minimum > self.maximum:
            raise ArgumentError(
                "passes.FuzzyLearningRates: minimum must be ≤ maximum, "
                f"got minimum={self.minimum}, maximum={self.maximum}"
            )
        where = f"passes.FuzzyLearningRates: dtype={self.dtype!r}"
        if self.dtype == UNSTORED and self.distribution in DYNAMIC:
            raise ArgumentError(
                f"{where} is for gains that stay, and {self.distribution!r} changes them; "
                f"use {'float32' if self.distribution == 'temporal' else 'uint8'!r}"
            )
        if self.distribution == "temporal" and self.dtype not in (None, *WIDE):
            raise ArgumentError(f"{where} is too coarse for 'temporal' gains, which would not decay; use 'float32'")
        if self.dtype == "uint8" and self.maximum > LARGEST:
            raise ArgumentError(f"{where} holds gains up to {LARGEST:.2f}, got maximum={self.maximum}")

    @property
    def acts_at_step(self) -> bool:
        """True for distributions that change over time."""
        return self.distribution in DYNAMIC

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Draw the gains of a weight's synapses and hook them to its gradient."""
        unmet = site.unmet(Need.OUTPUT)
        if self.distribution == "activity" and unmet is not None:
            edit.leave(unmet)
            return
        nu = layer_adaptive_spread(self.nu, site.depth) if self.distribution == "layer_adaptive" else self.nu
        gains = DISTRIBUTIONS[self.distribution], nu, self.minimum, self.maximum
        if self.dtype == UNSTORED:
            edit.unstored_gain(*gains)
            return
        dtype = self._stored(site.raw.dtype)
        if self.distribution == "weight_adaptive":
            # U(0, 2), narrowed below to the spread of each synapse; float32 at least, because it is rounded afterwards.
            drawn = edit.drawn_gain("uniform", 1.0, 0.0, 2.0, dtype=torch.promote_types(site.raw.dtype, torch.float32))
            weight = wide(site.synaptic().detach())
            (spread,) = weight_adaptive_spread(self.nu, [weight], [weight.abs().mean()])
            drawn = drawn.sub_(1).mul_(spread).add_(1).clamp_(self.minimum, self.maximum)
            edit.gain(coded(drawn, dtype))
        else:
            edit.gain(edit.drawn_gain(*gains, dtype=dtype))
        if self.distribution == "activity":
            edit.observe(torch.ops.biofx.count_active, site, "active")

    def _stored(self, weight: torch.dtype) -> torch.dtype:
        """The dtype in which the gains of a weight are stored."""
        if self.dtype is not None:
            stored: torch.dtype = getattr(torch, self.dtype)
            return stored
        return torch.promote_types(weight, torch.float32) if self.distribution == "temporal" else weight

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Refresh dynamic gains, every so many steps; gains that are dampened below `minimum` stay."""
        due = [weight for weight in weights if weight.step % self.every == 0]
        drawn = [weight for weight in due if self.distribution != "temporal" or weight.step % (10 * self.every) == 0]
        for group, is_drawn in ((drawn, True), ([weight for weight in due if weight not in drawn], False)):
            means = mean_magnitudes(group) if self.distribution == "weight_adaptive" else []
            for batch in batches([weight.state("gain") for weight in group]):
                self._refresh([group[index] for index in batch], is_drawn, [means[index] for index in batch if means])

    def _refresh(self, weights: list[PlasticWeight], is_drawn: bool, means: list[Tensor]) -> None:
        """Refresh the gains of weights on one device and of one dtype, by noise or without."""
        gains, counters = [w.state("gain") for w in weights], [w.counter("gain") for w in weights]
        minimum = _rounded(self.minimum, gains[0])
        for block in blocks(gains, self._spreads(weights, gains, means)):
            stored, spread = block.parts
            present = [wide(decoded(x)) for x in stored]
            decay = self.decay if self.distribution == "temporal" else 0.0
            fresh = temporal_decay(present, decay)
            if is_drawn:
                drawn = noise.uniform(present, [counters[p.index].at(p.start) for p in block.places])
                torch._foreach_mul_(drawn, 2)
                torch._foreach_sub_(drawn, 1)
                torch._foreach_addcmul_(fresh, drawn, spread)
            torch._foreach_clamp_min_(fresh, self.minimum)
            torch._foreach_clamp_max_(fresh, self.maximum)
            torch._foreach_lerp_(fresh, present, below(present, minimum))  # exact for 0 and 1
            torch._foreach_copy_(stored, [coded(x, gains[0].dtype) for x in fresh])

    def _spreads(self, weights: list[PlasticWeight], gains: list[Tensor], means: list[Tensor]) -> list[Tensor]:
        """How far the gains of each weight are drawn around where they are."""
        if self.distribution == "temporal":
            return [gains[0].new_full((), 0.1 * self.nu)] * len(gains)
        if self.distribution == "weight_adaptive":
            return weight_adaptive_spread(self.nu, [wide(weight.value) for weight in weights], means)
        result = []
        for weight, gain in zip(weights, gains, strict=True):
            counts, _ = weight.state("active").sum(0)
            spread = weight.part(weight.site.spread(activity_spread(self.nu, counts)))
            result.append(wide(spread).expand_as(gain))
        return result

    def violations(self, site: WeightSite) -> Iterator[str]:
        """Gains outside of [minimum, maximum]."""
        if site.gain is None:
            yield "its gain is gone"
            return
        if site.gain.numel() == 0:
            return
        low, high = extremes(site.gain)
        stored = site.state("gain")
        lowest, highest = (
            float(_rounded(x, site.gain if stored is None else stored)) for x in (self.minimum, self.maximum)
        )
        if len(site.known_synapses.users.get("gain", ())) > 1:
            lowest = 0.0  # another rule dampens the same gain
        if low < lowest or high > highest:
            yield f"gain is in [{low:g}, {high:g}], outside of [{self.minimum:g}, {self.maximum:g}]"


def _rounded(bound: float, gain: Tensor) -> Tensor:
    """A bound, rounded to what a gain that is stored like another one can be."""
    return wide(decoded(coded(torch.tensor(bound, dtype=torch.float64, device=gain.device), gain.dtype)))


def layer_adaptive_spread(nu: float, depth: float) -> float:
    """ν_l = ν·(1 − 0.5·l/(L−1)), with depth = l/(L−1) in [0, 1]: ν at the first weight, ν/2 at the last."""
    return nu * (1 - 0.5 * depth)


def temporal_decay(gains: list[Tensor], decay: float) -> list[Tensor]:
    """The gains after one refresh: 1 + (c−1)·decay."""
    result = list(torch._foreach_sub(gains, 1))
    torch._foreach_mul_(result, decay)
    torch._foreach_add_(result, 1)
    return result


def below(gains: list[Tensor], bound: Tensor) -> list[Tensor]:
    """1 where gains are below a bound, else 0."""
    # Arithmetic instead of a comparison, which costs several times as much on a CPU.
    result = list(torch._foreach_neg(gains))
    torch._foreach_add_(result, [bound] * len(result))
    torch._foreach_sign_(result)
    torch._foreach_clamp_min_(result, 0)
    return result


def activity_spread(nu: float, active: Tensor) -> Tensor:
    """ν_i = ν·(2 − a_i), a_i = clamp(1 + 0.1·(n_i/mean n − 1), 0.8, 1.2), for counts n of shape (units,)."""
    relative = (active / active.mean()).nan_to_num(nan=1.0)  # nothing was active, or seen
    return nu * (2 - (1 + 0.1 * (relative - 1)).clamp(0.8, 1.2))


@observer("count_active")
def count_active(activity: Tensor, positions: tuple[int, ...]) -> Tensor:
    """The number of positions at which the magnitude of every unit is above 0.01."""
    # A comparison that fills a tensor of bool takes 5 times as long on a CPU as one in place.
    return activity.abs().gt_(0.01).sum(positions, dtype=torch.promote_types(activity.dtype, torch.float32))


def weight_adaptive_spread(nu: float, weights: list[Tensor], means: list[Tensor]) -> list[Tensor]:
    """ν_w = ν·clamp(2 − |w|/mean|w|, 0.5, 1.5), elementwise, for each weight; one of zeros counts as average."""
    mean = torch.stack(means)
    is_known = mean > 0
    slopes, tops = torch.where(is_known, -1 / mean, 0), torch.where(is_known, 2.0, 1.0).to(mean)
    spreads = list(torch._foreach_abs(weights))
    torch._foreach_mul_(spreads, slopes.unbind())
    torch._foreach_add_(spreads, tops.unbind())
    torch._foreach_clamp_min_(spreads, 0.5)
    torch._foreach_clamp_max_(spreads, 1.5)
    torch._foreach_mul_(spreads, nu)
    return spreads
