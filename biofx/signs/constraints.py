r"""Sign constraints: functions that give a stored weight the sign of its presynaptic unit.

$$w = s \cdot f(r), \qquad f \ge 0$$

with r the stored weight and s the sign of the unit, +1 or −1. If s is 0, the weight is free: w = r.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from biofx.base.torch_internals import is_transformed_by_functions
from biofx.model.operators import define_operator
from biofx.model.slots import Slot

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.rewrite.editor import Editor

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


def _sign(stored: Tensor, sign: Tensor) -> Tensor:
    return stored.sign()


def _logistic(stored: Tensor, sign: Tensor) -> Tensor:
    return torch.where(sign == 0, stored.sign(), torch.sigmoid(stored))


_SIGNATURE = "(Tensor weight, Tensor sign) -> Tensor"
define_operator("project_sign", _SIGNATURE, _project, rectify)
define_operator("abs_sign", _SIGNATURE, _absolute, rectify)
define_operator("softplus_sign", _SIGNATURE, _softplus, _inverse_softplus)

CONSTRAINTS = {
    "project": SignConstraint(torch.ops.biofx.project_sign, rectify, _sign),
    "abs": SignConstraint(torch.ops.biofx.abs_sign, rectify, _sign),
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


def wrong_signs(sites: dict[str, WeightSite]) -> Iterator[str]:
    """One sentence for each weight with synapses whose sign is not that of their unit."""
    for name, site in sites.items():
        if site.sign is not None and constraint_of(site) is not None:
            agreement = site.synaptic().detach() * site.sign
            if agreement.numel() and bool(agreement.amin() < 0):
                count = int((agreement < 0).sum())
                yield f"{name}: {count} of its synapses have another sign than their unit"


def mixed_units(sites: dict[str, WeightSite]) -> Iterator[str]:
    """One sentence for each weight that reads units with outgoing weights of both signs, over all weights.

    The numbers of a weight's units are in the buffer `<weight>_synapses.units`. Free units are omitted.
    """
    signs: dict[int, set[float]] = {}
    readers: dict[int, list[str]] = {}
    for site in sites.values():
        units, sign = site.state("units"), site.sign
        if units is None or sign is None:
            continue
        constrained = site.outgoing(sign.expand(site.shape))[:, 0] != 0
        weight = site.outgoing(site.direct().detach())
        if not weight.numel():
            continue
        lowest, highest = weight.aminmax(dim=1)
        for has, value in ((highest > 0, 1.0), (lowest < 0, -1.0)):
            for unit in units[has & constrained].tolist():
                signs.setdefault(unit, set()).add(value)
                readers.setdefault(unit, []).append(site.name)
    mixed = Counter(name for unit, found in signs.items() if len(found) > 1 for name in dict.fromkeys(readers[unit]))
    for name, count in mixed.items():
        yield f"{name}: {count} of its presynaptic units are excitatory and inhibitory at once"
