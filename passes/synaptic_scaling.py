r"""Homeostasis: units that are too active weaken their inputs, silent ones strengthen them.

$$w_{i\cdot} \leftarrow w_{i\cdot}\,(1 + \epsilon\,(t - a_i))$$
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from biofx.editor import Editor
from biofx.model.slots import Slot
from biofx.operators import observer
from biofx.options import check_choice, check_number
from biofx.plastic_weight import PlasticWeight
from biofx.registry import Moment, Pass, register
from biofx.weights.sites import WeightSite

STRENGTH = {"gradient": 0.5, "weight": 0.01}
UNSEEN = -1.0  # the running mean of a unit before the first step


@register
@dataclass(frozen=True)
class SynapticScaling(Pass):
    r"""Keep every postsynaptic unit near a target activity, through the learning or the size of its incoming synapses.

    | on | rule |
    |---|---|
    | `"gradient"` | incoming gradient of unit i times clip((t/a_i)^ε, 0.5, 2) |
    | `"weight"` | w_i· ← w_i·clip(1 + ε·(t − a_i), 0.5, 2) after every step |

    with a_i the running mean activity of unit i, t the `target`, and ε the `strength`. Activity is the mean of
    \|z_i\|, the magnitude of what the operator returns for the unit, over batch, time and space; an observer node adds
    it up in training mode, over all micro-batches since the last step. At every step of the optimizer (`biofx.attach`)
    the running mean moves by a fraction 1 − `memory` towards it; the first step sets it.

    The factor on gradients is one number for each unit and starts neutral. A unit whose activity is 0 takes the bound,
    2.

    The reference package names homeostasis (`scale_grad`) in its documentation and has no code for it.

    Args:
        target: t, above 0; None is the mean activity over the site's units.
        strength: ε, above 0; None is 0.5 on the gradient and 0.01 on the weight.
        on: `"gradient"` or `"weight"`.
        memory: weight of the past in the running mean, in [0, 1).

    Raises:
        ArgumentError: an option out of its range.

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
    moment: ClassVar[Moment] = Moment.SCALING

    target: float | None = None
    strength: float | None = None
    on: str = "gradient"
    memory: float = 0.9

    def __post_init__(self) -> None:
        if self.target is not None:
            check_number(self, "target", above=0)
        if self.strength is not None:
            check_number(self, "strength", above=0)
        check_choice(self, "on", STRENGTH)
        check_number(self, "memory", at_least=0, below=1)

    @property
    def preserves_function(self) -> bool:
        """True at insertion: scaling begins with the first step."""
        return True

    def rewrite(self, site: WeightSite, edit: Editor) -> None:
        """Observe the units' activity, and hook their factor to the gradient."""
        if site.why_no_output is not None:
            edit.leave(site.why_no_output)
            return
        device, (unit_axis,) = site.raw.device, site.calls[0].use.output_axes
        seen = edit.state("seen", torch.zeros(site.units + 1, device=device, dtype=torch.float64))
        edit.observe(torch.ops.biofx.sum_activity, site.outputs, unit_axis, seen)
        edit.keep("activity", torch.full((site.units,), UNSEEN, device=device, dtype=torch.float64))
        if self.on == "gradient":
            neutral = site.spread(torch.ones(site.units, device=device, dtype=site.raw.dtype))
            edit.insert(torch.ops.biofx.scale_grad, edit.state("homeostasis", neutral))

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Update the running means, and scale weights or the factors on gradients by them."""
        strength = STRENGTH[self.on] if self.strength is None else self.strength
        for weight in weights:
            activity = weight.state("activity")
            update_activity(activity, weight.state("seen"), self.memory)
            # Nothing is decided on the host, which would have to wait for a GPU. Nothing is known yet if all forward
            # passes were in evaluation mode.
            is_known = (activity != UNSEEN).all()
            target = activity.mean() if self.target is None else activity.new_full((), self.target)
            if self.on == "weight":
                factor = weight_factor(activity, target, strength).where(is_known, 1)
                weight.assign(weight.value * weight.site.spread(factor).to(weight.raw.dtype))
            else:
                factor, present = gradient_factor(activity, target, strength), weight.state("homeostasis")
                present.copy_(torch.where(is_known, weight.site.spread(factor).view_as(present), present))


def update_activity(activity: Tensor, seen: Tensor, memory: float) -> None:
    """Move the running means of units towards what was seen since the last step, and forget that."""
    is_new = (seen[-1] > 0) & torch.isfinite(seen).all()  # what overflowed is no activity
    mean = seen[:-1] / seen[-1]
    moved = torch.where(activity == UNSEEN, mean, memory * activity + (1 - memory) * mean)
    activity.copy_(torch.where(is_new, moved, activity))
    seen.zero_()


def gradient_factor(activity: Tensor, target: Tensor, strength: float) -> Tensor:
    """clip((t/a)^ε, 0.5, 2) for every unit; 2 for a silent one, 1 if the target is silence as well."""
    ratio = torch.where(activity > 0, target / activity, torch.where(target > 0, torch.inf, 1.0))
    return ratio.pow(strength).clamp(0.5, 2)


def weight_factor(activity: Tensor, target: Tensor, strength: float) -> Tensor:
    """clip(1 + ε·(t − a), 0.5, 2) for every unit: a weight keeps its sign, and no unit is silenced for ever."""
    return (1 + strength * (target - activity)).clamp(0.5, 2)


@observer("sum_activity")
def sum_activity(activity: Tensor, seen: Tensor) -> None:
    """Add up the activity of every unit, and in the last entry the number of positions."""
    # A float64 pass over every activity costs several times as much; the sums of calls are added up in float64.
    dtype = torch.promote_types(activity.dtype, torch.float32)
    seen[:-1] += torch.linalg.vector_norm(activity, 1, dim=0, dtype=dtype)
    seen[-1] += len(activity)
