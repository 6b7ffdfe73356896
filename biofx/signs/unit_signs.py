"""Signs of units: which units have a sign already, and which weights read the same units without one."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from biofx.analysis.units import Reading, Units
    from biofx.rewrite.model_editor import ModelEditor


def known_signs(model: ModelEditor, units: Units) -> Tensor:
    """Signs that classes of units have from an earlier transform, by number; 0 where they have none."""
    result = torch.zeros(len(units.classes))
    for name, site in model.all_sites.items():
        if site.sign is not None and name in units.readings:
            sign = site.outgoing(site.sign.detach().expand(site.shape))[:, 0].cpu().float()
            result[units.readings[name].classes[sign != 0]] = sign[sign != 0]
    return result


def renumber(model: ModelEditor, units: Units) -> None:
    """Let weights that got their signs in an earlier transform know their units by the present numbers."""
    for name, site in model.all_sites.items():
        numbers = site.state("units")
        if numbers is not None and name in units.readings:
            numbers.copy_(units.readings[name].classes)


def why_free(units: Units, reading: Reading) -> str:
    """Why a weight whose units have no signs reads no others."""
    origins = {units.populations[index].origin for index in units.owner[reading.numbers].tolist()}
    if "constant" in origins:
        return "it reads parameters or constants, which no unit computes"
    return "it reads the model's inputs, which are free"


def remark_on_units(model: ModelEditor, units: Units, name: str, signed: Collection[str]) -> None:
    """Say of one of the weights that get signs why the effect of its units may have another sign."""
    own, edit = units.readings[name], model.edits[name]
    if own.signed_by:
        edit.remark(f"the activity of its units can be negative ({own.signed_by})")
    free = {n: r for n, r in units.readings.items() if n not in signed and model.all_sites[n].sign is None}
    others = [n for n, reading in free.items() if bool(torch.isin(reading.classes, own.classes).any())]
    if others:
        edit.remark(f"{', '.join(others)} read the same units with weights of either sign")
