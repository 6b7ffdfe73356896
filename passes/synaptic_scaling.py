"""Homeostasis: units that are too active weaken their inputs, silent ones strengthen them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from biofx.base.options import check_choice, check_integer, check_number
from biofx.model.observers import observer
from biofx.model.slots import Slot
from biofx.rewrite.registry import Moment, Pass, option, register
from biofx.training.statistics import magnitudes_along
from biofx.weights.facts import Need

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.editor import Editor
    from biofx.training.plastic_weight import PlasticWeight

STRENGTH = {"gradient": 0.5, "weight": 0.01}
UNSEEN = -1.0  # the running mean of a unit before the first step


@register
@dataclass(frozen=True)
class SynapticScaling(Pass):
    r"""Keep every postsynaptic unit near a target activity, through the learning or the size of its incoming synapses.

    | on | rule |
    |---|---|
    | `"gradient"` | incoming gradient of unit i times clip((t/a_i)^ε, 0.5, 2) |
    | `"weight"` | w_i· ← w_i·clip(1 + ε·(t − a_i), 0.5, 2) after the step |

    with a_i the running mean activity of unit i, t the `target`, and ε the `strength`. Activity is the mean of \|z_i\|,
    the magnitude of what the operator returns for the unit, over batch, time and space; an observer node adds it up in
    training mode, over all micro-batches since the last step. After every `every` steps of the optimizer
    (`biofx.attach`) the running mean moves by a fraction 1 − `memory` towards it; the first such step sets it. In
    between, observers are paused.

    The factor on gradients is one number for each unit and starts neutral. A unit whose activity is 0 takes the bound,
    2.

    The reference package names homeostasis (`scale_grad`) in its documentation and has no code for it.

    Args:
        target: t, above 0; None is the mean activity over the site's units.
        strength: ε, above 0; None is 0.5 on the gradient and 0.01 on the weight.
        on: `"gradient"` or `"weight"`.
        memory: weight of the past in the running mean, in [0, 1).
        every: steps from one look to the next, at least 1: the rule acts at every such step, on what its forward passes
            show.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> scaling = passes.SynapticScaling(target=1.0, strength=0.1, on="weight")
        >>> bio = biofx.transform(torch.nn.Linear(1, 2), [scaling])
        >>> with torch.no_grad():
        ...     _ = bio.weight.copy_(torch.tensor([[3.0], [0.5]])), bio.bias.zero_()
        >>> optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
        >>> attachment = biofx.attach(bio, optimizer)
        >>> bio(torch.ones(1, 1)).sum().backward()
        >>> optimizer.step()
        >>> bio.weight.data  # 3 · (1 + 0.1 · (1 − 3)) and 0.5 · (1 + 0.1 · (1 − 0.5))
        tensor([[2.4000],
                [0.5250]])

    References:
        van Rossum, Bi & Turrigiano, Stable Hebbian learning from spike timing-dependent plasticity, Journal of
        Neuroscience 20, 2000.
    """

    name: ClassVar[str] = "synaptic-scaling"
    slot: ClassVar[Slot] = Slot.HOOK
    preserves_function: ClassVar[bool] = True  # at insertion: scaling begins with the first step
    moment: ClassVar[Moment] = Moment.SCALING
    works_on_shards: ClassVar[bool] = True

    target: float | None = option(None, check_number, above=0)
    strength: float | None = option(None, check_number, above=0)
    on: str = option("gradient", check_choice, choices=STRENGTH)
    memory: float = option(0.9, check_number, at_least=0, below=1)
    every: int = option(1, check_integer, at_least=1)

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Observe the units' activity, and hook their factor to the gradient."""
        unmet = site.unmet(Need.OUTPUT)
        if unmet is not None:
            edit.leave(unmet)
            return
        edit.observe(torch.ops.biofx.sum_activity, site, "seen")
        device, dtype = site.raw.device, site.raw.dtype
        unseen = torch.full((site.units,), UNSEEN, device=device, dtype=torch.promote_types(dtype, torch.float32))
        edit.keep("activity", unseen)
        if self.on == "gradient":
            neutral = site.spread(torch.ones(site.units, device=device, dtype=dtype))
            edit.insert(torch.ops.biofx.scale_grad, edit.state("homeostasis", neutral))

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Update the running means, and scale weights or the factors on gradients by them."""
        due = [weight for weight in weights if weight.step % self.every == 0]
        for device in {weight.raw.device for weight in due}:
            self._scale([weight for weight in due if weight.raw.device == device])
        for weight in weights:
            if weight.step % self.every and "seen" not in weight.synapses.paused:
                weight.state("seen").zero_()  # its observers could not know that this step would not be due
            weight.synapses.pause("seen", (weight.step + 1) % self.every != 0)

    def _scale(self, weights: Sequence[PlasticWeight]) -> None:
        """Act on weights of one device, on all units at once: nothing is decided on the host, which would wait."""
        means, seen = ([weight.state(key) for weight in weights] for key in ("activity", "seen"))
        activity = updated_means(torch.cat(means), torch.cat(seen, -1), self.memory)
        sizes = [len(mean) for mean in means]
        torch._foreach_copy_(means, activity.split(sizes))
        torch._foreach_zero_(seen)
        target = population_means(activity, sizes) if self.target is None else self.target
        strength = STRENGTH[self.on] if self.strength is None else self.strength
        factor = gradient_factor if self.on == "gradient" else weight_factor
        # Nothing is known yet if all forward passes were in evaluation mode.
        by_unit = torch.where(activity == UNSEEN, 1.0, factor(activity, target, strength)).split(sizes)
        factors = [weight.site.spread(own) for weight, own in zip(weights, by_unit, strict=True)]
        if self.on == "gradient":
            states = [weight.state("homeostasis") for weight in weights]
            # Those of a weight with one input for each unit are cut with it, as a gain for every synapse would be.
            rows = zip(weights, states, factors, strict=True)
            parts = (own if own.shape == state.shape else weight.part(own) for weight, state, own in rows)
            torch._foreach_copy_(states, list(parts))
            return
        for weight, own in zip(weights, factors, strict=True):
            weight.assign(weight.value * weight.part(own))


def updated_means(activity: Tensor, seen: Tensor, memory: float) -> Tensor:
    """The running means of units, moved towards what was seen since the last step, shape (2, 2, units)."""
    sums, positions = seen.sum(0)
    mean = sums / positions
    after = torch.where(activity == UNSEEN, mean, mean.lerp(activity, memory))
    return torch.where(mean + positions < torch.inf, after, activity)  # not if nothing was seen, or it overflowed


def population_means(activity: Tensor, sizes: Sequence[int]) -> Tensor:
    """The mean activity over the units of the same weight, for every unit; an unknown activity counts as 0."""
    means = torch._foreach_norm(activity.relu().split(sizes), 1)
    torch._foreach_div_(means, [float(size) for size in sizes])
    return torch.cat([mean.expand(size) for mean, size in zip(means, sizes, strict=True)])


def gradient_factor(activity: Tensor, target: Tensor | float, strength: float) -> Tensor:
    """clip((t/a)^ε, 0.5, 2) for every unit; 2 for a silent one, 1 if the target is silence as well."""
    ratio: Tensor = target / activity
    return ratio.nan_to_num(nan=1.0, posinf=torch.inf).pow(strength).clamp(0.5, 2)


def weight_factor(activity: Tensor, target: Tensor | float, strength: float) -> Tensor:
    """clip(1 + ε·(t − a), 0.5, 2) for every unit: a weight keeps its sign, and no unit is silenced for ever."""
    return (1 + strength * (target - activity)).clamp(0.5, 2)


@observer("sum_activity")
def sum_activity(activity: Tensor, positions: tuple[int, ...]) -> Tensor:
    """The sum of the magnitudes of every unit."""
    return magnitudes_along(activity, positions)
