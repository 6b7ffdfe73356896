"""Connections: the sums over the synapses of a weight, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from biofx.analysis.sites import WeightSite


def connections(site: WeightSite, values: Tensor | None = None) -> Tensor:
    """The sum over the synapses of each connection: of values of synapses, or of what is stored."""
    values = site.raw.detach() if values is None else values
    return values.sum(0) if site.is_split else values


def divided(site: WeightSite, weight: Tensor) -> Tensor:
    """The weight of every synapse for that of every connection, in proportion to the present magnitudes."""
    if not site.is_split:
        return weight
    size = site.raw.detach().abs()
    total = size.sum(0)
    return torch.where(total > 0, size / total, 1 / len(size)) * weight
