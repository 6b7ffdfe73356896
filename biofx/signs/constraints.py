r"""Sign constraints: functions that give a stored weight the sign of its presynaptic unit.

$$w = s \cdot f(r), \qquad f \ge 0$$

with r the stored weight and s the sign of the unit, +1 or −1. If s is 0, the weight is free: w = r. The sign of a
unit is kept with the weights that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from biofx.base.shards import placed_like
from biofx.base.torch_internals import is_transformed_by_functions
from biofx.model.definitions import define_operator
from biofx.model.slots import Slot

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.analysis.units import PresynapticUnits, Units
    from biofx.rewrite.editor import Editor
    from biofx.rewrite.model_editor import ModelEditor
    from biofx.training.plastic_weight import PlasticWeight

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SignConstraint:
    """One such function.

    Attributes:
        operator: the function as the graph calls it, `operator(stored, sign)`.
        store: its inverse, `store(weight, sign)`; entries of the wrong sign become zero.
        slope: the derivative of the weight's magnitude with respect to the stored weight, `slope(stored, sign)`.
    """

    operator: Any
    store: Function
    slope: Function


def rectify(weight: Tensor, sign: Tensor) -> Tensor:
    """relu(w·s)·s, and w where s = 0."""
    low = torch.where(sign > 0, 0.0, -torch.inf).to(weight.dtype)
    high = torch.where(sign < 0, 0.0, torch.inf).to(weight.dtype)
    return torch.clamp(weight, low, high)


def rectify_(weights: list[Tensor], signs: list[Tensor]) -> None:
    """The same for many weights, in place, with one operator for each.

    Args:
        weights: the weights.
        signs: the sign of the unit behind each synapse, of the dtype of the weight.
    """
    if not weights:
        return
    negated = torch._foreach_neg(signs)
    # ln 1 = 0 and ln 0 = −∞, for all weights at once; `torch.where` would be called for each of them.
    low, low_negated = (torch._foreach_log(torch._foreach_clamp_min(x, 0)) for x in (signs, negated))
    high = torch._foreach_mul(low_negated, -1)
    torch._foreach_add_(high, 0.0)  # −0 becomes 0
    for weight, least, most in zip(weights, low, high, strict=True):
        weight.clamp_(least, most)


def project_(weights: Iterable[PlasticWeight]) -> None:
    """The same for what is stored of weights, where their units have signs."""
    signed = [(weight.raw, sign) for weight in weights if (sign := weight.sign) is not None]
    rectify_([raw for raw, _ in signed], [sign for _, sign in signed])


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, sign: Tensor) -> Tensor:
        return rectify(weight, sign)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _project(weight: Tensor, sign: Tensor) -> Tensor:
    """relu(w·s)·s with the gradient of the identity, so that synapses at zero learn."""
    if not is_transformed_by_functions():  # torch.func runs no autograd.Function without vmap rules
        return _Rectify.apply(weight, sign)  # type: ignore[no-any-return, no-untyped-call]
    return rectify(weight, sign).detach() + (weight - weight.detach())


def _absolute(weight: Tensor, sign: Tensor) -> Tensor:
    """|w|·s. The slope of |w| at 0 is 1, so that a silent synapse can grow."""
    own = torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)
    return weight * torch.where(sign == 0, torch.ones_like(own), own * sign.to(weight.dtype))


def _softplus(weight: Tensor, sign: Tensor) -> Tensor:
    """ln(1 + eʷ)·s."""
    return torch.where(sign == 0, weight, F.softplus(weight) * sign.to(weight.dtype))


def _inverse_softplus(weight: Tensor, sign: Tensor) -> Tensor:
    """ln(eᵐ − 1) of the magnitude m, which is at least the smallest positive number, because ln 0 is infinite."""
    magnitude = rectify(weight, sign).abs().clamp(min=torch.finfo(weight.dtype).tiny)
    return torch.where(sign == 0, weight, magnitude + torch.log(-torch.expm1(-magnitude)))


def sign_of_stored(stored: Tensor, sign: Tensor) -> Tensor:
    """The slope where a synapse has the magnitude of what is stored for it."""
    return stored.sign()


def _logistic(stored: Tensor, sign: Tensor) -> Tensor:
    return torch.where(sign == 0, stored.sign(), torch.sigmoid(stored))


_SIGNATURE = "(Tensor weight, Tensor sign) -> Tensor"
define_operator("project_sign", _SIGNATURE, _project, rectify)
define_operator("abs_sign", _SIGNATURE, _absolute, rectify)
define_operator("softplus_sign", _SIGNATURE, _softplus, _inverse_softplus)

CONSTRAINTS = {
    "project": SignConstraint(torch.ops.biofx.project_sign, rectify, sign_of_stored),
    "abs": SignConstraint(torch.ops.biofx.abs_sign, rectify, sign_of_stored),
    "softplus": SignConstraint(torch.ops.biofx.softplus_sign, _inverse_softplus, _logistic),
}


def constrain(edit: Editor, site: WeightSite, sign: Tensor, units: Tensor, constraint: str) -> None:
    """Constrain a weight to the signs of its presynaptic units.

    Args:
        edit: the weight's editor.
        site: the weight; its stored values are not changed.
        sign: sign of each presynaptic unit, +1, −1, or 0 if it is free, shape (presynaptic_units,).
        units: number of the unit at each presynaptic position, int64, shape (presynaptic_units,). Positions of one
            unit have one number, also across weights.
        constraint: one of `CONSTRAINTS`.
    """
    spread = site.spread_presynaptic(sign).to(site.raw.device, site.raw.dtype)
    edit.insert(CONSTRAINTS[constraint].operator, edit.state("sign", spread))
    edit.keep("units", units)


def constraint_of(site: WeightSite) -> SignConstraint | None:
    """The constraint on a weight's signs, if there is one."""
    for link in site.links:
        if link.origin.slot is Slot.SIGN:
            return next((c for c in CONSTRAINTS.values() if c.operator is link.target), None)
    return None


def sign_violations(sites: Mapping[str, WeightSite]) -> Iterator[str]:
    """One sentence for each weight with synapses of another sign than their unit, or with units of two signs.

    The numbers of a weight's units are in the buffer `<weight>_synapses.units`, and those of one unit have one sign in
    all weights. Free units are omitted.
    """
    positive, negative = set[int](), set[int]()
    for name, site in sites.items():
        if site.sign is not None and constraint_of(site) is not None:
            (weight,) = placed_like([site.synaptic().detach()], site.sign)
            agreement = weight * site.sign
            if agreement.numel() and bool(agreement.amin() < 0):
                count = int((agreement < 0).sum())
                yield f"{name}: {count} of its synapses have another sign than their unit"
        units = site.state("units")
        if units is not None and (sign := unit_signs(site)) is not None:
            positive.update(units[sign > 0].tolist())
            negative.update(units[sign < 0].tolist())
    mixed = positive & negative
    for name, site in sites.items() if mixed else ():
        units = site.state("units")
        count = 0 if units is None else len(mixed.intersection(units.tolist()))
        if count:
            yield f"{name}: {count} of its presynaptic units are excitatory and inhibitory at once"


def unit_signs(site: WeightSite) -> Tensor | None:
    """The sign of each presynaptic unit of a weight, 0 if it is free; None if all are."""
    return None if site.sign is None else site.outgoing(site.sign.detach().expand(site.shape))[:, 0]


def known_signs(model: ModelEditor, units: Units) -> Tensor:
    """Signs that classes of units have from an earlier transform, by number; 0 where they have none."""
    result = torch.zeros(len(units.classes))
    for name, site in model.all_sites.items():
        sign = unit_signs(site)
        if sign is not None and name in units.readings:
            sign = sign.cpu().float()
            result[units.readings[name].classes[sign != 0]] = sign[sign != 0]
    return result


def renumber(model: ModelEditor, units: Units) -> None:
    """Renumber the units of weights that have signs from an earlier transform."""
    for name, site in model.all_sites.items():
        numbers = site.state("units")
        if numbers is not None and name in units.readings:
            numbers.copy_(units.readings[name].classes)


def why_free(units: Units, reading: PresynapticUnits) -> str:
    """Why none of the units that a weight reads has a sign."""
    origins = {units.populations[index].origin for index in units.owner[reading.numbers].tolist()}
    if "constant" in origins:
        return "it reads parameters or constants, which no unit computes"
    return "it reads the model's inputs, which are free"


def remark_on_units(model: ModelEditor, units: Units, signs: Mapping[str, Tensor]) -> None:
    """Remark on weights why the effect of the units that they read may have another sign than theirs.

    Args:
        model: the model.
        units: its units.
        signs: sign of each presynaptic unit, 0 if it is free, by the name of each weight that gets signs.
    """
    free = {n: r for n, r in units.readings.items() if n not in signs and model.all_sites[n].sign is None}
    for name, sign in signs.items():
        own, edit = units.readings[name], model.edits[name]
        if own.signed_by:
            edit.remark(f"the activity of its units can be negative ({own.signed_by})")
        if own.inverted_by:
            what = "subtracts or negates what it returns, so its synapses act with the other sign"
            edit.remark(f"{own.inverted_by} {what}")
        signed = own.classes[sign != 0]
        others = [n for n, reading in free.items() if bool(torch.isin(reading.classes, signed).any())]
        if others:
            edit.remark(f"{', '.join(others)} read the same units with weights of either sign")
