"""Plain weights: how synapses take over a weight of the original model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biofx.base.errors import ArgumentError
from biofx.base.shards import placed_like
from biofx.model.definitions import inverse_of
from biofx.model.slots import Slot

if TYPE_CHECKING:
    from biofx.model.synapses import Synapses

PLAIN_CHECKPOINT = "this looks like a checkpoint of the plain model; load it into that, before transform"


@torch.no_grad()
def stored_for(name: str, child: Synapses, weight: Tensor) -> Tensor:
    """Return the stored tensor from which synapses compute a weight of the original model."""
    present = child.stored.detach()
    if not child.is_computed or weight.shape != (present[0] if child.is_split else present).shape:
        return weight
    value = weight.to(present.device)
    if child.has_interneurons:  # they inhibit as they do now
        value = value + (child(until=Slot.SUM) - child()).to(value)
    if child.is_split:
        sizes = child(until=Slot.SIGN).abs().double()
        total = sizes.sum(0)
        value = value.double() * torch.where(total > 0, sizes / total.where(total > 0, 1.0), 1 / len(present))
    stored = value.to(present)
    for link in reversed([link for link in child.links if link.origin.slot is Slot.SIGN]):
        inverse = inverse_of(link.target)
        if inverse is not None:
            stored = inverse(stored, *placed_like(child.arguments(link), stored))
    computed = child.computed_from(stored)
    if computed.shape != weight.shape:
        raise ArgumentError(
            f"{PLAIN_CHECKPOINT}: each synapse of {name} has an activation here, so no weight tells them all"
        )
    if not _is_close(computed, weight):
        raise ArgumentError(f"{PLAIN_CHECKPOINT}: {name} violates the signs that its units have in this model")
    return stored


def _is_close(computed: Tensor, weight: Tensor) -> bool:
    """Whether synapses compute a weight, up to the rounding of what is stored."""
    precision = torch.finfo(computed.dtype).eps
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    rtol, atol = max(1e-4, 16 * precision), max(1e-6, precision * largest)
    return torch.allclose(computed.double(), weight.to(computed.device).double(), rtol=rtol, atol=atol)
