"""Declared weights: what parameters say of themselves, and the classes of their modules if a model could not be run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from biofx.base.torch_internals import is_traceable_wrapper_subclass
from biofx.weights.axes import GROUP, NEITHER, POST, PRE, Axes, Factor
from biofx.weights.facts import NOT_A_SYNAPSE, NOT_RUN, Need, WeightFacts

CONVOLUTIONS = tuple(getattr(nn, f"Conv{n}d") for n in (1, 2, 3))
TRANSPOSED = tuple(getattr(nn, f"ConvTranspose{n}d") for n in (1, 2, 3))
_ROLES = {"i": PRE, "o": POST, "g": GROUP, "k": NEITHER}

# Classes, which of their parameters are weights, the operator, and letters for the factors of the weight's axes:
# inputs, outputs, groups, and the kernel, which has all axes that are left.
_RULES: tuple[tuple[type | tuple[type, ...], str, str, str], ...] = (
    (nn.Linear, "weight", "linear", "o i"),
    (CONVOLUTIONS, "weight", "convolution", "go i k"),
    (TRANSPOSED, "weight", "convolution", "gi o k"),
    (nn.MultiheadAttention, ".*proj_weight", "attention", "o i"),
    ((nn.RNNBase, nn.RNNCellBase), "weight_.*", "recurrent layer", "o i"),
    (nn.Bilinear, "weight", "bilinear", "o i i"),
    ((nn.Embedding, nn.EmbeddingBag), "weight", "embedding", "i o"),
)


def _axes(shape: Sequence[int], words: list[str], groups: int) -> Axes:
    factors: list[Factor] = []
    for axis, length in enumerate(shape):
        letters = words[min(axis, len(words) - 1)]
        sizes = [length] if len(letters) == 1 else [groups, length // groups]
        factors += [Factor(axis, size, *_ROLES[letter]) for letter, size in zip(letters, sizes, strict=True)]
    return Axes(tuple(shape), tuple(factors))


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


def declared(model: nn.Module) -> tuple[dict[str, WeightFacts], dict[str, str]]:
    """The weights of modules whose classes say how they use them, and why other parameters are left alone."""
    found = {id(parameter): facts for parameter, facts in _declared(model)}
    weights = {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}
    others = {name: _reason(parameter) for name, parameter in model.named_parameters() if name not in weights}
    return weights, others


def _declared(model: nn.Module) -> Iterator[tuple[nn.Parameter, WeightFacts]]:
    for owner in model.modules():
        for classes, key, operator, words in _RULES:
            for name, parameter in owner._parameters.items() if isinstance(owner, classes) else ():
                if parameter is None or not re.fullmatch(key, name) or why_unfit(parameter) or _has_own_rule(owner):
                    continue
                groups = int(getattr(owner, "groups", 1))
                axes, padding = _axes(parameter.shape, words.split(), groups), getattr(owner, "padding_idx", None)
                unmet = {Need.UNITS: NOT_RUN}
                yield parameter, WeightFacts(operator, 1, axes, unmet, False, groups, padding, 0.0, False)


def _has_own_rule(owner: nn.Module) -> bool:
    """Whether an embedding changes its gradient or its weight itself."""
    if not isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return False
    return owner.sparse or owner.scale_grad_by_freq or owner.max_norm is not None


def _reason(parameter: nn.Parameter) -> str:
    if parameter.dim() < 2:
        return NOT_A_SYNAPSE
    return why_unfit(parameter) or f"not judged: {NOT_RUN}"
