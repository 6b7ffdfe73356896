"""Dale's principle without a change of the function: every unit becomes an excitatory and an inhibitory one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from biofx.model.slots import Slot
from biofx.rewrite.registry import Moment, Pass, register
from biofx.signs.constraints import constrain, project_, rectify
from biofx.signs.scales import keep_scales_nonnegative
from biofx.weights.facts import NOT_RUN
from biofx.widening.search import find_widening

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.model_editor import ModelEditor
    from biofx.training.plastic_weight import PlasticWeight
    from biofx.widening.axis_doubling import AxisDoubling


@register
@dataclass(frozen=True)
class MirrorUnits(Pass):
    r"""Double every unit into an excitatory and an inhibitory twin, so that the network obeys Dale's principle.

    The twins of a unit have its incoming weights, its bias and its normalisation, so they compute what it computed. Its
    outgoing weights W are divided between them:

    $$W\,h = W^+ h - W^- h, \qquad W^+ = \max(W, 0), \quad W^- = \max(-W, 0)$$

    with h the unit's activity: $W^+$ leaves the excitatory twin, and $-W^-$ the inhibitory one. So a network, new or
    trained, computes what it did, to rounding; half of the units of every doubled population are excitatory; and every
    unit has one sign for all its targets, in whichever weights, which it keeps: the weight that is used is relu(r·s)·s,
    with r the stored weight and s the sign, in the buffer `<weight>_synapses.sign`. Its gradient reaches r unchanged,
    so synapses at 0 learn as well, and r is projected on its sign after every step of the optimizer. Twins start out
    equal and part as they learn. Because both parts of a weight move, it learns up to twice as fast under gradient
    descent.

    *Shapes.* Parameters change their shape: a weight between doubled populations has four times as many entries, and
    the axes of biases and normalisations are twice as long. Twins are adjacent (x₀, x₀', x₁, x₁', …), so groups of
    convolutions and of norms stay what they are. The folded model has these shapes, too: fewer units cannot
    express what the twins learned.

    *What is doubled.* The outputs of linear layers and convolutions, along every path to another weight:
    activations, norms, pooling, flattening, concatenations, residual additions, gates. Before anything is changed, the
    graph is run to find out what has to be doubled as well; sizes in the model's forward are adapted. Inputs and
    outputs of the model keep their shape. What cannot be doubled is left alone, with free weights, and `summary` says
    why: units that are added to an input or to the output of an embedding, or queries and keys, whose products would be
    twice as large; and units that reach an untraced submodule, whose Python may depend on their number in other runs.
    After the transform, a changed attribute or arguments of another structure are an error for the same reason. Dropout
    draws for each twin by itself.

    *What can turn a sign over.* A parameter that multiplies twins on their way, such as γ of a batch norm, is kept from
    being negative. Where γ is negative behind a weight, the weight's rows change their sign instead; elsewhere it stays
    negative, and `summary` says so. A unit whose activity can be negative (tanh, no activation) has an effect of either
    sign although its weights have one.

    The reference package has nothing of this kind. Signs that are imposed on a network, as by its Dale's principle or
    by `DalesPrinciple`, change what it computes.

    Example:
        >>> import biofx, torch
        >>> from biofx import passes
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = model[2].weight.copy_(torch.tensor([[0.5, -3.0]]))
        >>> bio = biofx.transform(model, [passes.MirrorUnits()])
        >>> bio.get_parameter("2.weight").data
        tensor([[ 0.5000,  0.0000,  0.0000, -3.0000]])
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(bio(x), model(x), atol=1e-6)
        True

    References:
        Cornford et al., Learning to live with Dale's principle: ANNs with separate excitatory and inhibitory units,
        ICLR 2021.
    """

    name: ClassVar[str] = "mirror-units"
    slot: ClassVar[Slot] = Slot.SIGN
    preserves_function: ClassVar[bool] = True  # twins together have the effect of their unit
    moment: ClassVar[Moment] = Moment.PROJECTION
    works_on_shards: ClassVar[bool] = True
    changes_units: ClassVar[bool] = True

    def rewrite_model(self, model: ModelEditor) -> None:
        """Double all units that can be, and divide their outgoing weights between the twins."""
        units = model.units
        if units is None or model.understood is None:
            model.leave(NOT_RUN)
            return
        plan = find_widening(model.bio, model.all_sites, model.excluded, model.understood.run)
        scales = {name: plan.reaching[name] for name in units.scales.keys() & plan.tensors.keys()}
        keep_scales_nonnegative(model, scales)
        for name, site in model.sites.items():
            edit, doubling, is_doubled = model.edits[name], plan.presynaptic.get(name), name in plan.doubled
            if doubling is None and not is_doubled:
                edit.leave(plan.reasons[name])
                continue
            edit.replace_raw(mirrored(site, doubling, doubled=is_doubled))
            presynaptic = site.presynaptic_units if doubling is None else len(doubling.source)
            _set_sizes(model, site, presynaptic, site.units * (2 if is_doubled else 1))
            if not is_doubled:
                edit.remark(plan.reasons[name])
        plan.apply(model.bio, model.places)
        model.look_again()
        assert model.understood is not None
        readings = model.understood.readings
        for name, doubling in plan.presynaptic.items():
            constrain(model.edits[name], model.sites[name], doubling.sign, readings[name].classes, "project")

    def at_step(self, weights: Sequence[PlasticWeight]) -> None:
        """Project stored weights on their signs."""
        project_(weights)


def mirrored(site: WeightSite, doubling: AxisDoubling | None, *, doubled: bool) -> Tensor:
    """A weight whose presynaptic units became twins, [W⁺, −W⁻], and whose postsynaptic units are doubled if asked."""
    weight = site.raw.detach()
    if doubling is not None:
        connections = site.outgoing(weight)[doubling.source.to(weight.device)]
        wider = site.known_axes.with_presynaptic(len(connections))
        weight = wider.from_outgoing(rectify(connections, doubling.sign[:, None].to(connections)))
    return weight.repeat_interleave(2, site.postsynaptic_axis) if doubled else weight


def _set_sizes(model: ModelEditor, site: WeightSite, presynaptic: int, units: int) -> None:
    """Update the numbers of units in the modules that hold a weight."""
    sizes = dict.fromkeys(("in_features", "in_channels"), presynaptic)
    sizes |= dict.fromkeys(("out_features", "out_channels"), units)
    for module, _ in model.places[id(site.raw)]:
        vars(module).update({name: size for name, size in sizes.items() if name in vars(module)})
