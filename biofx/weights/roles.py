"""Which parameters inside an island are synapses, and along which axes: what the class of their owner says.

An island is a module whose Python forward is called as it is, so the operators on its weights are not in the graph.
The class of the module that owns a parameter says how it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from biofx.islands import island_path, island_weights
from biofx.references import held_parameters
from biofx.weights.axes import GROUP, NEITHER
from biofx.weights.operators import POST, PRE, Call
from biofx.weights.reparametrizations import Effect, computed


@dataclass(frozen=True)
class Role:
    """How a module uses one of its parameters.

    Attributes:
        operator: the operator's name in tables.
        presynaptic: axes of the weight that run over presynaptic units (within one group, if there are groups).
        postsynaptic: axis of the weight that runs over postsynaptic units.
        groups: number of groups into which the module divides its units, on the first axis of the weight.
        padding: the index of the row that takes no part in learning, if there is one.
        effect: what is done to the parameter before the module uses it, if something is.
    """

    operator: str
    presynaptic: tuple[int, ...]
    postsynaptic: int
    groups: int = 1
    padding: int | None = None
    effect: Effect | None = None


_CONVOLUTIONS = {
    **{getattr(nn, f"Conv{n}d"): (f"conv{n}d", (1,), 0) for n in (1, 2, 3)},
    **{getattr(nn, f"ConvTranspose{n}d"): (f"conv_transpose{n}d", (0,), 1) for n in (1, 2, 3)},
}
HELD = "a module keeps it in a list or a plain attribute as well, where it stays as it is"
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def _convolution(owner: nn.Module) -> Role:
    name, presynaptic, postsynaptic = next(axes for cls, axes in _CONVOLUTIONS.items() if isinstance(owner, cls))
    return Role(name, presynaptic, postsynaptic, int(owner.groups))  # type: ignore[arg-type]


def _embedding(owner: nn.Module) -> Role | str:
    if owner.sparse:
        return "its gradient is sparse, and rules act on every entry"
    if owner.max_norm is not None:
        return "its max_norm changes it in place at every call"
    if owner.scale_grad_by_freq:
        return "its gradient is divided by the frequency of tokens, which is a learning rule of its own"
    return Role("embedding", (0,), 1, padding=owner.padding_idx)  # a token is a presynaptic unit


def _is_transposed_linear(owner: nn.Module) -> bool:
    """Whether a module is the Conv1D of transformers, a linear layer whose weight is (in, out)."""
    return any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in type(owner).__mro__)


# Whose parameters, which of them, and the role they have.
_RULES: list[tuple[Callable[[nn.Module], bool], Callable[[str], bool], Callable[[nn.Module], Role | str]]] = [
    (lambda m: isinstance(m, nn.Linear), "weight".__eq__, lambda m: Role("linear", (1,), 0)),
    (lambda m: isinstance(m, tuple(_CONVOLUTIONS)), "weight".__eq__, _convolution),
    (lambda m: isinstance(m, nn.MultiheadAttention), _PROJECTIONS.__contains__, lambda m: Role("attention", (1,), 0)),
    (
        lambda m: isinstance(m, nn.RNNBase | nn.RNNCellBase),
        lambda key: key.startswith("weight_"),
        lambda m: Role(_recurrent(m), (1,), 0),
    ),
    (lambda m: isinstance(m, nn.Bilinear), "weight".__eq__, lambda m: Role("bilinear", (1, 2), 0)),
    (lambda m: isinstance(m, _EMBEDDINGS), "weight".__eq__, _embedding),
    (_is_transposed_linear, "weight".__eq__, lambda m: Role("linear", (0,), 1)),
]


def _recurrent(owner: nn.Module) -> str:
    kinds = {"lstm": nn.LSTM | nn.LSTMCell, "gru": nn.GRU | nn.GRUCell}
    return next((name for name, cls in kinds.items() if isinstance(owner, cls)), "rnn")


def why_unfit(parameter: nn.Parameter) -> str | None:
    """Why a parameter's numbers cannot be those of synapses, or None if they can."""
    if is_traceable_wrapper_subclass(parameter):
        return f"it is a {type(parameter).__name__}, and biofx rewrites plain tensors only"
    if parameter.is_nested or parameter.layout is not torch.strided:
        return f"its layout is {'nested' if parameter.is_nested else parameter.layout}, and synapses need a dense one"
    if not parameter.is_floating_point():
        return f"its dtype is {parameter.dtype}, and synapses are real numbers"
    return None


def role(root: nn.Module, path: str, key: str) -> Role | str:
    """How a module uses a parameter as synaptic weights, or in words why that cannot be known.

    Args:
        root: a module around it.
        path: path of the module in which the parameter is registered.
        key: the parameter's name there.
    """
    owner = root.get_submodule(path)
    parameter = owner._parameters[key]
    assert parameter is not None
    unfit = why_unfit(parameter)
    if unfit is not None:
        return unfit
    found = computed(root, path, key)
    if found is not None:
        user, name, effect = found
        known = effect if isinstance(effect, str) else _role_of_weight(user, name)
        return replace(known, effect=effect) if isinstance(known, Role) and isinstance(effect, Effect) else known
    return _role_of_weight(owner, key)


def _role_of_weight(owner: nn.Module, key: str) -> Role | str:
    for owns, is_weight, described in _RULES:
        if owns(owner) and is_weight(key):
            return described(owner)
    return f"biofx does not know how {type(owner).__name__} uses it"


def roles(island: nn.Module) -> dict[str, tuple[nn.Parameter, Role | str]]:
    """Every parameter in an island with what `role` says of it, by every place where it is registered in the island."""
    held = held_parameters(island)
    return {
        f"{path}.{key}".lstrip("."): (parameter, HELD if id(parameter) in held else role(island, path, key))
        for path, owner in island.named_modules()
        for key, parameter in owner._parameters.items()
        if parameter is not None
    }


def weights(island: nn.Module) -> dict[str, nn.Parameter]:
    """The synaptic weights inside an island, by every place where one is registered in the island."""
    return {name: parameter for name, (parameter, found) in roles(island).items() if isinstance(found, Role)}


def calls_inside(
    bio: fx.GraphModule, island: fx.Node, weight: fx.Node, shape: Sequence[int]
) -> list[tuple[Call, Effect | None]]:
    """How an island consumes a node as a weight: one call for each way in which a module in it does.

    Beside each is what is done to the weight before, if something is.
    """
    names = [name for name, end in island_weights(island).items() if end is weight]
    places = [f"{island_path(island)}.{name}".strip(".").rpartition(".") for name in names]
    found = [role(bio, path, key) for path, _, key in places]
    known = [one for one in dict.fromkeys(found) if isinstance(one, Role)]
    return [(_call(one, island, weight, shape), one.effect) for one in known]


def _call(known: Role, island: fx.Node, weight: fx.Node, shape: Sequence[int]) -> Call:
    first, *others = shape
    roles = [NEITHER] * len(shape)
    for axis in known.presynaptic:
        roles[axis] = PRE
    roles[known.postsynaptic] = POST
    return Call(
        name=known.operator,
        node=island,
        weight=weight,
        bias=None,
        sources=(),
        lengths=(known.groups, first // known.groups, *others),
        axes=(0, *range(len(shape))),
        roles=(GROUP, *roles),
        output_axes=(),
        groups=known.groups,
        padding=known.padding,
    )
