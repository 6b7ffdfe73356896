"""Scales: parameters that multiply units on their way, such as γ of a batch norm. A negative one turns signs over."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from biofx.model.chain import attribute, original_name
from biofx.model.provenance import record_of
from biofx.model.synapses import stored
from biofx.weights.facts import Need

if TYPE_CHECKING:
    from biofx.analysis.units import Units
    from biofx.rewrite.model_editor import ModelEditor

BatchNorm = nn.modules.batchnorm._BatchNorm


def hold_scales(model: ModelEditor, units: Units, constrained: Collection[str]) -> None:
    """Keep parameters that multiply units on their way to weights with signs from being negative.

    Behind a batch norm that directly follows a weight, a negative γ is the same as a positive one with the weights of
    its unit turned over, so nothing changes. A parameter that is negative elsewhere stays as it is, and the weights
    that read its units get a remark.

    Args:
        model: the model.
        units: its units.
        constrained: the weights that get signs.
    """
    for name in sorted(units.scales.keys() - model.excluded.keys()):
        readers = sorted(units.scales[name] & set(constrained))
        if not readers:
            continue
        if bool((model.value(name) < 0).any()):
            turn_over(model, name)
        negative = int((model.value(name) < 0).sum())
        if not negative:
            model.keep_nonnegative(name)
            continue
        for reader in readers:
            model.edits[reader].remark(f"{name} is negative for {negative} units, and turns their signs over")


def project_scales(bio: fx.GraphModule, held: Collection[int] | None = None) -> None:
    """Set to zero what has become negative in the parameters that passes keep from it.

    Args:
        bio: the transformed model.
        held: ids of the parameters that may change; None for all.
    """
    for name in record_of(bio).nonnegative:
        parameter = stored(bio, name)
        if held is None or id(parameter) in held:
            parameter.clamp_(min=0)


def turn_over(model: ModelEditor, scale: str) -> None:
    """Move the sign of γ into the weights before the batch norm: γ·(w·x + b − μ) = |γ|·(±w·x ± b ∓ μ)."""
    path = scale.rpartition(".")[0]
    norm = model.bio.get_submodule(path)
    calls = list(model.bio.graph.find_nodes(op="call_module", target=path))
    if not isinstance(norm, BatchNorm) or len(calls) != 1:
        return
    site = next((s for s in model.sites.values() if s.outputs == (calls[0].args[0],)), None)
    if site is None or site.unmet(Need.OUTPUT) is not None or set(site.outputs[0].users) != set(calls):
        return
    bias = site.calls[0].bias
    if site.calls[0].use.bias is not None and bias is None:
        return
    if bias is not None and (bias.op != "get_attr" or len(bias.users) > 1):
        return
    if bias is not None and original_name(model.bio, bias) in model.excluded:
        return
    sign = torch.where(norm.weight < 0, -1.0, 1.0).to(norm.weight.dtype)
    model.edits[site.name].replace_raw(site.raw * site.spread(sign))
    if bias is not None:
        attribute(model.bio, str(bias.target)).mul_(sign)
    if norm.running_mean is not None:
        norm.running_mean.mul_(sign)
    norm.weight.mul_(sign)
