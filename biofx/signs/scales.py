"""Scale parameters: those that multiply units, such as γ of a batch norm. Negative ones invert the units' effect."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from biofx.model.chain import attribute, original_name
from biofx.model.provenance import record_of
from biofx.model.synapses import stored
from biofx.weights.facts import Need

if TYPE_CHECKING:
    from biofx.rewrite.model_editor import ModelEditor

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def keep_scales_nonnegative(model: ModelEditor, scales: Mapping[str, Collection[str]]) -> None:
    """Keep scale parameters from being negative, if that does not change the model.

    A negative γ of a batch norm that directly follows a weight is inverted together with the weights of its unit, which
    changes nothing. Other parameters with negative entries are not changed, and the weights behind them get a remark.

    Args:
        model: the model.
        scales: the names of scale parameters, each with the weights that get the remark; one without any is left alone.
    """
    for name in sorted(name for name, weights in scales.items() if weights):
        if bool((stored(model.bio, name) < 0).any()):
            _move_sign_into_weight(model, name)
        negative = int((stored(model.bio, name) < 0).sum())
        if not negative:
            model.keep_nonnegative(name)
            continue
        for weight in sorted(scales[name]):
            model.edits[weight].remark(f"{name} is negative for {negative} units, and inverts their signs")


def scales_of(bio: nn.Module) -> list[nn.Parameter]:
    """The parameters of a transformed model that passes keep from being negative."""
    return [stored(bio, name) for name in record_of(bio).nonnegative]


def project_scales(scales: Sequence[torch.Tensor]) -> None:
    """Set negative entries to zero in parameters."""
    if scales:
        torch._foreach_clamp_min_(list(scales), 0)


def _move_sign_into_weight(model: ModelEditor, scale: str) -> None:
    """Move the sign of γ into the weight before a batch norm: γ·(w·x + b − μ) = |γ|·(±w·x ± b ∓ μ)."""
    path = scale.rpartition(".")[0]
    norm = model.bio.get_submodule(path)
    calls = list(model.bio.graph.find_nodes(op="call_module", target=path))
    if not isinstance(norm, BATCH_NORMS) or len(calls) != 1:
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
