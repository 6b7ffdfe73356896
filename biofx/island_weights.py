"""Which parameters inside an island are synapses, and along which axes: what the class of their owner says.

An island is a module whose Python forward is called as it is, so the operators on its weights are not in the graph.
The class of the module that owns a parameter says how it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from biofx.references import held_parameters


@dataclass(frozen=True)
class Role:
    """How a module uses one of its parameters.

    Attributes:
        operator: the operator's name in tables.
        presynaptic_axis: axis of the weight that runs over presynaptic units (within one group, if there are groups).
        postsynaptic_axis: axis of the weight that runs over postsynaptic units.
        channel_axis: axis of the module's output that runs over postsynaptic units, counted from the end.
        groups: number of groups into which the module divides its units.
    """

    operator: str
    presynaptic_axis: int
    postsynaptic_axis: int
    channel_axis: int = -1
    groups: int = 1


_CONVOLUTIONS = {
    **{(getattr(nn, f"Conv{n}d")): (f"conv{n}d", 1, 0, -1 - n) for n in (1, 2, 3)},
    **{(getattr(nn, f"ConvTranspose{n}d")): (f"conv_transpose{n}d", 0, 1, -1 - n) for n in (1, 2, 3)},
}
HELD = "a module keeps it in a list or a plain attribute as well, where it stays as it is"
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def _convolution(owner: nn.Module) -> Role:
    axes = next(axes for cls, axes in _CONVOLUTIONS.items() if isinstance(owner, cls))
    return Role(*axes, groups=int(owner.groups))  # type: ignore[arg-type]


def _embedding(owner: nn.Module) -> Role | str:
    if owner.sparse:
        return "its gradient is sparse, and rules act on every entry"
    if owner.max_norm is not None:
        return "its max_norm changes it in place at every call"
    return Role("embedding", 0, 1)  # a token is a presynaptic unit


def _is_transposed_linear(owner: nn.Module) -> bool:
    """Whether a module is the Conv1D of transformers, a linear layer whose weight is (in, out)."""
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(owner).__mro__)


# Whose parameters, which of them, and the role they have. Bilinear: the second input modulates what the first sends.
_RULES: list[tuple[Callable[[nn.Module], bool], Callable[[str], bool], Callable[[nn.Module], Role | str]]] = [
    (lambda m: isinstance(m, nn.Linear), "weight".__eq__, lambda m: Role("linear", 1, 0)),
    (lambda m: isinstance(m, tuple(_CONVOLUTIONS)), "weight".__eq__, _convolution),
    (lambda m: isinstance(m, nn.MultiheadAttention), _PROJECTIONS.__contains__, lambda m: Role("attention", 1, 0)),
    (
        lambda m: isinstance(m, nn.RNNBase | nn.RNNCellBase),
        lambda key: key.startswith("weight_"),
        lambda m: Role(_recurrent(m), 1, 0),
    ),
    (lambda m: isinstance(m, nn.Bilinear), "weight".__eq__, lambda m: Role("bilinear", 1, 0)),
    (lambda m: isinstance(m, _EMBEDDINGS), "weight".__eq__, _embedding),
    (_is_transposed_linear, "weight".__eq__, lambda m: Role("linear", 0, 1)),
]


def _recurrent(owner: nn.Module) -> str:
    kinds = {"lstm": nn.LSTM | nn.LSTMCell, "gru": nn.GRU | nn.GRUCell}
    return next((name for name, cls in kinds.items() if isinstance(owner, cls)), "rnn")


def role(owner: nn.Module, key: str) -> Role | str:
    """How a module uses a parameter of its own as synaptic weights, or in words why that cannot be known.

    Args:
        owner: the module in which the parameter is registered.
        key: the parameter's name in it.
    """
    parameter = owner._parameters[key]
    assert parameter is not None
    if parameter.layout is not torch.strided or parameter.is_quantized or parameter.is_nested:
        return f"its layout is {str(parameter.layout).removeprefix('torch.')}, and rules act on every entry"
    if type(parameter) is not nn.Parameter:
        return f"it is a {type(parameter).__name__}, not a plain torch.nn.Parameter"
    for owns, is_weight, described in _RULES:
        if owns(owner) and is_weight(key):
            return described(owner)
    return f"biofx does not know how {type(owner).__name__} uses it"


def roles(island: nn.Module) -> dict[str, tuple[nn.Parameter, Role | str]]:
    """Every parameter in an island with what `role` says of it, by every place where it is registered in the island."""
    held = held_parameters(island)
    return {
        f"{path}.{key}".lstrip("."): (parameter, HELD if id(parameter) in held else role(owner, key))
        for path, owner in island.named_modules()
        for key, parameter in owner._parameters.items()
        if parameter is not None
    }


def weights(island: nn.Module) -> dict[str, nn.Parameter]:
    """The synaptic weights inside an island, by every place where one is registered in the island."""
    return {name: parameter for name, (parameter, found) in roles(island).items() if isinstance(found, Role)}
