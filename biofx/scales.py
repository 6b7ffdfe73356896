"""Scales: parameters that multiply units on their way, such as γ of a batch norm. A negative one turns signs over."""

from __future__ import annotations

import torch
from torch import fx, nn

from biofx.chain import attribute
from biofx.model_editor import ModelEditor
from biofx.provenance import record_of

BatchNorm = nn.modules.batchnorm._BatchNorm


def hold_scales(model: ModelEditor) -> None:
    """Make the parameters that multiply units non-negative, and let `verify` hold them to it.

    Behind a batch norm that directly follows a weight, a negative γ is the same as a positive one with the weights of
    its unit turned over, so nothing changes. Elsewhere negative entries become zero.
    """
    for name in sorted(model.units.scales):
        parameter = attribute(model.bio, name)
        if bool((parameter < 0).any()):
            turn_over(model, name)
            parameter.clamp_(min=0)
        model.keep_nonnegative(name)


def project_scales(bio: fx.GraphModule, by: str) -> None:
    """Set to zero what has become negative in the parameters that a pass holds."""
    for name, holder in record_of(bio).nonnegative.items():
        if holder == by:
            attribute(bio, name).clamp_(min=0)


def turn_over(model: ModelEditor, scale: str) -> None:
    """Move the sign of γ into the weights before the batch norm: γ·(w·x + b − μ) = |γ|·(±w·x ± b ∓ μ)."""
    path = scale.rpartition(".")[0]
    norm = model.bio.get_submodule(path)
    calls = list(model.bio.graph.find_nodes(op="call_module", target=path))
    if not isinstance(norm, BatchNorm) or len(calls) != 1:
        return
    site = next((s for s in model.sites.values() if s.outputs == (calls[0].args[0],)), None)
    if site is None or site.why_no_output is not None or set(site.outputs[0].users) != set(calls):
        return
    bias = site.calls[0].call.bias
    if bias is not None and (bias.op != "get_attr" or len(bias.users) > 1):
        return
    sign = torch.where(norm.weight < 0, -1.0, 1.0).to(norm.weight.dtype)
    site.raw.mul_(site.spread(sign))
    if bias is not None:
        attribute(model.bio, str(bias.target)).mul_(sign)
    if norm.running_mean is not None:
        norm.running_mean.mul_(sign)
    norm.weight.mul_(sign)
