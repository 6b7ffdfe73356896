"""Dale's principle by interneurons: all units are excitatory, and inhibit through interneurons of the next layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from biofx.base.options import check_choice, check_number
from biofx.model.definitions import define_operator
from biofx.model.slots import Slot
from biofx.model.synapses import State
from biofx.rewrite.registry import Moment, Pass, option, register
from biofx.signs.balance import divided
from biofx.signs.constraints import CONSTRAINTS, constrain, known_signs, project_, remark_on_units, renumber, why_free
from biofx.signs.scales import keep_scales_nonnegative
from biofx.weights.facts import NOT_RUN, Need

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.analysis.units import PresynapticUnits
    from biofx.rewrite.editor import Editor
    from biofx.rewrite.model_editor import ModelEditor
    from biofx.training.plastic_weight import PlasticWeight

DRIVE, INHIBITION = "to_interneurons", "from_interneurons"  # the names of W^IX and W^EI among the synapses


@register
@dataclass(frozen=True)
class InhibitoryInterneurons(Pass):
    r"""Make every unit excitatory, and let it inhibit through interneurons, without changing what the model computes.

    $$W = W^{\mathrm{EX}} - W^{\mathrm{EI}}\, W^{\mathrm{IX}}, \qquad
    W^{\mathrm{EX}},\ W^{\mathrm{EI}},\ W^{\mathrm{IX}} \ge 0$$

    with $W^{\mathrm{EX}}$, shape (n, m), the synapses of m excitatory units on n units, $W^{\mathrm{IX}}$, (k, m),
    their synapses on k interneurons, and $W^{\mathrm{EI}}$, (n, k), the synapses of the interneurons. So each unit has
    one sign for all its targets, in whichever weights. The interneurons of a weight serve no other. They are linear,
    which is no restriction as long as units are not negative: their input is not negative either, so a ReLU would do
    nothing. Of a convolution, a row is all kernels of a channel, and an interneuron is a channel as well.

    *Insertion.* Every W can be written so, with however few interneurons. Unit i listens to interneuron
    $\kappa(i) = i \bmod k$, which inhibits its pool as much as the one of its units that needs it most:

    $$W^{\mathrm{IX}}_{\kappa j} = \frac{1}{a_\kappa} \max_{i:\, \kappa(i) = \kappa} W^-_{ij}, \qquad
    W^{\mathrm{EI}}_{i \kappa} = a_\kappa\, [\kappa(i) = \kappa], \qquad
    W^{\mathrm{EX}} = W + W^{\mathrm{EI}}\, W^{\mathrm{IX}} \ge 0$$

    with $W^- = \max(-W, 0)$. So the model computes what it did, to rounding. With one interneuron for each unit,
    $W^{\mathrm{EX}} = W^+$ and $W^{\mathrm{EI}} W^{\mathrm{IX}} = W^-$; with fewer, excitation and inhibition are
    larger, and cancel. $a_\kappa > 0$ gives the incoming and the outgoing synapses of an interneuron the same norm,
    which gradient flow conserves, so that both learn.

    *Training.* All three are trained, each by its own gradient: $W^{\mathrm{EX}}$ is what the weight's module stores,
    the other two are the parameters `<weight>_synapses.to_interneurons` and `….from_interneurons`. Gradients pass
    synapses at 0 unchanged; negative values are set to 0 after every step of an attached optimizer, and count as 0
    without one. Synapses that are 0 at insertion may grow. Gains, splitting, turnover and scaling by other passes act
    on $W^{\mathrm{EX}}$.

    *What is verified.* `biofx.verify` and `biofx.units` judge the synapses of the units, $W^{\mathrm{EX}}$, and say
    "obeys, with inhibition by interneurons". W itself has both signs. So has the folded model, which is the plain one:
    it has no interneurons, and `biofx.units` of it says that it breaks the principle.

    *What is left alone.* Weights that read the model's inputs, which are not units; weights with groups of units; those
    whose units are inhibitory already. `summary` says so, and also where the activity of units can be negative
    (tanh, no activation), so that their effect changes sign although their synapses do not. A parameter that
    multiplies units on their way, such as γ of a batch norm, is kept from being negative.

    *Differences from the papers.* Inhibition is subtractive, as in the recurrent networks of Li et al. (2023); the
    feedforward networks of Cornford et al. (2021) divide by a second, shunting inhibition and multiply by a gain for
    each unit. That depends on the activity, so no weight can express it. They draw new weights from exponential
    distributions, with mean inhibition equal to mean excitation; here W is what the model's author drew or trained, and
    inhibition follows from it. They divide the gradients of $W^{\mathrm{IX}}$ and $W^{\mathrm{EI}}$ by
    $\sqrt{n}$ and m for SGD; here the optimizer sees the gradients. The reference package has nothing of this kind.

    Args:
        fraction: number of interneurons of a weight for each of its postsynaptic units, in (0, 1]; at least one
            interneuron. Default: 10%, as in the output layers of Cornford et al.
        inputs: `"free"`: inputs of the model are not units, and have no interneurons; `"excitatory"`: they are
            excitatory units.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 20), torch.nn.ReLU(), torch.nn.Linear(20, 30))
        >>> bio = biofx.transform(model, [passes.InhibitoryInterneurons(fraction=0.1)])
        >>> synapses = bio.get_submodule("2.weight_synapses")
        >>> synapses.to_interneurons.shape, synapses.from_interneurons.shape
        (torch.Size([3, 20]), torch.Size([30, 3]))
        >>> x = torch.randn(5, 4)
        >>> torch.allclose(bio(x), model(x), atol=1e-5)
        True
        >>> print(biofx.verify(bio)["2.weight"])
        obeys, with inhibition by interneurons

    References:
        Cornford, Kalajdzievski, Leite, Lamarquette, Kullmann & Richards, Learning to live with Dale's principle: ANNs
        with separate excitatory and inhibitory units, ICLR 2021. Li, Cornford, Ghosh & Richards, Learning better with
        Dale's Law: a spectral perspective, NeurIPS 2023.
    """

    name: ClassVar[str] = "inhibitory-interneurons"
    slot: ClassVar[Slot] = Slot.SIGN
    preserves_function: ClassVar[bool] = True  # any weight is a difference of excitation and inhibition
    moment: ClassVar[Moment] = Moment.PROJECTION
    works_on_shards: ClassVar[bool] = True

    fraction: float = option(0.1, check_number, above=0, at_most=1)
    inputs: str = option("free", check_choice, choices=("free", "excitatory"))

    def rewrite_model(self, model: ModelEditor) -> None:
        """Divide weights into excitation and inhibition."""
        units = model.units
        if units is None:
            model.leave(f"not judged: {NOT_RUN}")
            return
        known = known_signs(model, units)
        signs: dict[str, Tensor] = {}
        for name, site in model.sites.items():
            reading = units.readings.get(name)
            reason = _unfit(site, reading, known)
            if reading is None or reason is not None:
                model.edits[name].leave(reason or NOT_RUN)
                continue
            sign = (~reading.is_free if self.inputs == "free" else torch.ones_like(reading.is_free)).float()
            if bool(sign.any()):
                signs[name] = sign
            else:
                model.edits[name].leave(why_free(units, reading))
        neural = {name for name in signs if not bool(units.readings[name].is_free.all())}
        scales = {name: read & neural for name, read in units.scales.items() if name not in model.excluded}
        keep_scales_nonnegative(model, scales)
        renumber(model, units)
        for name, sign in signs.items():
            self._insert(model.sites[name], model.edits[name], sign, units.readings[name])
        remark_on_units(model, units, signs)

    def _insert(self, site: WeightSite, edit: Editor, sign: Tensor, reading: PresynapticUnits) -> None:
        axis = site.postsynaptic_axis
        assert axis is not None
        count = max(1, round(self.fraction * site.units))
        edit.remark(f"{count} interneurons" if count > 1 else "1 interneuron")
        is_unit = site.spread_presynaptic(sign).to(site.raw)
        weight = site.direct().detach()
        inhibition, drive = factors_of_inhibition(weight * is_unit, axis, count)
        excitation = weight + product(inhibition, drive, axis)
        edit.replace_raw(divided(site, CONSTRAINTS["project"].store(excitation, is_unit)))
        constrain(edit, site, sign, reading.classes, "project")
        edit.insert(
            torch.ops.biofx.inhibit,
            edit.state(INHIBITION, nn.Parameter(inhibition)),
            edit.state(DRIVE, nn.Parameter(drive)),
            State("sign"),
            axis,
            slot=Slot.INTERNEURONS,
        )

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Set negative synapses to 0: those of units, and those from and to interneurons."""
        project_(weights)
        torch._foreach_clamp_min_([weight.state(key) for weight in weights for key in (INHIBITION, DRIVE)], 0)

    def violations(self, site: WeightSite) -> Iterator[str]:
        """Synapses of interneurons that are not numbers."""
        for key in (INHIBITION, DRIVE):
            synapses = site.state(key)
            if synapses is None or not bool(synapses.isfinite().all()):
                yield f"its synapses {key.replace('_', ' ')} are not finite"


def _unfit(site: WeightSite, reading: PresynapticUnits | None, known: Tensor) -> str | None:
    """Why a weight cannot have interneurons, or None."""
    if reading is None:
        return site.unmet(Need.AXES) or NOT_RUN
    unjudged = site.unmet(Need.UNITS)
    if unjudged is not None:
        return f"not judged: {unjudged}"
    axis, factors = site.postsynaptic_axis, site.known_axes.factors
    if (
        axis is None
        or site.units != site.shape[axis]
        or any(f.presynaptic and f.size > 1 for f in factors if f.axis == axis)
    ):
        return "it has groups of units, which have no interneurons in common"
    if site.direct().shape != site.shape:
        return "its synapses have an activation each, so it is no sum from which interneurons could subtract"
    if not site.raw.numel():
        return "it has no entries"
    return "it reads units that are inhibitory" if bool((known[reading.classes] < 0).any()) else None


def factors_of_inhibition(weight: Tensor, axis: int, count: int) -> tuple[Tensor, Tensor]:
    r"""Non-negative factors $W^{\mathrm{EI}}$ and $W^{\mathrm{IX}}$ with a product of at least $W^-$ in every entry.

    Args:
        weight: W, of n postsynaptic units.
        axis: the axis of these.
        count: k, the number of interneurons, at most n.

    Returns:
        $W^{\mathrm{EI}}$, shape (n, k), and $W^{\mathrm{IX}}$, of the shape of the weight with k in place of n.
    """
    needed = (-weight).clamp(min=0).movedim(axis, 0)
    pool = torch.arange(len(needed), device=weight.device) % count
    drive = torch.stack([needed[pool == interneuron].amax(0) for interneuron in range(count)])
    inhibition = nn.functional.one_hot(pool, count).to(weight)
    incoming, outgoing = drive.flatten(1).norm(dim=1), inhibition.norm(dim=0)
    scale = torch.where(incoming > 0, (incoming / outgoing).sqrt(), 1.0)
    drive = drive / scale.reshape(-1, *[1] * (drive.dim() - 1))
    return inhibition * scale, drive.movedim(0, axis)


def product(inhibition: Tensor, drive: Tensor, axis: int) -> Tensor:
    r"""$W^{\mathrm{EI}} W^{\mathrm{IX}}$, with postsynaptic units on an axis."""
    inhibited: Tensor = torch.tensordot(inhibition, drive, dims=([1], [axis]))
    return inhibited.movedim(0, axis)


def _inhibit(weight: Tensor, inhibition: Tensor, drive: Tensor, sign: Tensor, axis: int) -> Tensor:
    """W^EX − W^EI·W^IX, where free inputs, of sign 0, drive no interneuron.

    What is stored below 0 counts as 0, and feels the gradient all the same.
    """
    positive = weight.new_ones(())
    inhibition, drive = (CONSTRAINTS["project"].operator(each, positive) for each in (inhibition, drive))
    return weight - product(inhibition, drive * sign.narrow(axis, 0, 1), axis)


define_operator(
    "inhibit", "(Tensor weight, Tensor inhibition, Tensor drive, Tensor sign, int axis) -> Tensor", _inhibit
)
