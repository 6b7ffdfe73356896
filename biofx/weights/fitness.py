"""Fitness: whether the numbers of a parameter can be those of synapses."""

from __future__ import annotations

import torch
from torch import nn

from biofx.base.torch_internals import is_traceable_wrapper_subclass


def why_unfit(parameter: nn.Parameter) -> str | None:
    """Why a parameter's numbers cannot be those of synapses, or None if they can."""
    if is_traceable_wrapper_subclass(parameter):
        return f"it is a {type(parameter).__name__}, and biofx rewrites plain tensors only"
    if parameter.is_nested or parameter.layout is not torch.strided:
        return f"its layout is {'nested' if parameter.is_nested else parameter.layout}, and synapses need a dense one"
    if not parameter.numel():
        return "it has no entries"
    if not parameter.is_floating_point():
        return f"its dtype is {parameter.dtype}, and synapses are real numbers"
    return None
