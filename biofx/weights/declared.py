"""Declared weights: what the classes of modules say of their parameters, for a model that could not be run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from biofx.weights.axes import GROUP, NEITHER, POST, PRE, Axes, axes_of
from biofx.weights.facts import NOT_A_SYNAPSE, NOT_RUN, Need, WeightFacts
from biofx.weights.fitness import why_unfit

_CONVOLUTIONS = tuple(getattr(nn, f"Conv{n}d") for n in (1, 2, 3))
_TRANSPOSED = tuple(getattr(nn, f"ConvTranspose{n}d") for n in (1, 2, 3))


def _linear(owner: nn.Module, parameter: nn.Parameter) -> Axes:
    return axes_of(parameter.shape, [(0, parameter.shape[0], POST), (1, parameter.shape[1], PRE)])


def _embedding(owner: nn.Module, parameter: nn.Parameter) -> Axes | None:
    if owner.sparse or owner.scale_grad_by_freq or owner.max_norm is not None:
        return None
    return axes_of(parameter.shape, [(0, parameter.shape[0], PRE), (1, parameter.shape[1], POST)])


def _bilinear(owner: nn.Module, parameter: nn.Parameter) -> Axes:
    return axes_of(parameter.shape, zip(range(3), parameter.shape, (POST, PRE, PRE), strict=True))


def _convolution(owner: nn.Module, parameter: nn.Parameter) -> Axes:
    groups, (first, second, *kernel) = int(owner.groups), parameter.shape  # type: ignore[arg-type]
    outer, inner = (PRE, POST) if isinstance(owner, _TRANSPOSED) else (POST, PRE)
    rest = [(2 + axis, length, NEITHER) for axis, length in enumerate(kernel)]
    return axes_of(parameter.shape, [(0, groups, GROUP), (0, first // groups, outer), (1, second, inner), *rest])


_Axes = Callable[[nn.Module, nn.Parameter], Axes | None]
_RULES: list[tuple[type | tuple[type, ...], Callable[[str], bool], str, _Axes]] = [
    (nn.Linear, "weight".__eq__, "linear", _linear),
    ((*_CONVOLUTIONS, *_TRANSPOSED), "weight".__eq__, "convolution", _convolution),
    (nn.MultiheadAttention, lambda key: key.endswith("proj_weight"), "attention", _linear),
    ((nn.RNNBase, nn.RNNCellBase), lambda key: key.startswith("weight_"), "recurrent layer", _linear),
    (nn.Bilinear, "weight".__eq__, "bilinear", _bilinear),
    ((nn.Embedding, nn.EmbeddingBag), "weight".__eq__, "embedding", _embedding),
]


def declared(model: nn.Module) -> tuple[dict[str, WeightFacts], dict[str, str]]:
    """The weights of modules whose classes say how they use them, and why other parameters are left alone."""
    found = {id(parameter): facts for parameter, facts in _declared(model)}
    weights = {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}
    others = {name: _reason(parameter) for name, parameter in model.named_parameters() if name not in weights}
    return weights, others


def _declared(model: nn.Module) -> Iterator[tuple[nn.Parameter, WeightFacts]]:
    for owner in model.modules():
        for classes, is_weight, operator, axes_in in _RULES:
            for key, parameter in owner._parameters.items() if isinstance(owner, classes) else ():
                if parameter is None or not is_weight(key) or why_unfit(parameter) is not None:
                    continue
                axes = axes_in(owner, parameter)
                if axes is not None:
                    unmet = {Need.UNITS: NOT_RUN}
                    groups = int(getattr(owner, "groups", 1))
                    padding = getattr(owner, "padding_idx", None)
                    yield parameter, WeightFacts(operator, 1, axes, unmet, False, groups, padding, 0.0, False, "")


def _reason(parameter: nn.Parameter) -> str:
    if parameter.dim() < 2:
        return NOT_A_SYNAPSE
    return why_unfit(parameter) or f"not judged: {NOT_RUN}"
