"""Candidates for the arguments of forward, if the user gave none.

Options come from what the model declares about its inputs, from what its weights can read, and from the names of its
arguments.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from biofx.base.isolation import split_inputs
from biofx.base.torch_internals import pytree

BATCH = 2
FIRST = 3  # layers, or weights, that may read the arguments


@dataclass(frozen=True)
class Inputs:
    """Arguments of a model's forward.

    Attributes:
        args: those by position.
        kwargs: those by name.
        description: where they come from, and their names, dtypes and shapes.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    description: str


class Extents(NamedTuple):
    """Sizes that weights leave open: how long sequences are, and the sides of images and signals."""

    length: int
    side: int


EXTENTS = tuple(map(Extents, (8, 16, 8, 32, 64, 16, 16), (16, 32, 28, 64, 128, 224, 256)))


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that has yet to be created.

    Attributes:
        content: what is in it, a key of `_CONTENTS`.
        shape: its sizes, as numbers or as names of extents.
    """

    content: str
    shape: tuple[int | str, ...]

    def resolved(self, extents: Extents) -> TensorSpec:
        """The same with numbers only."""
        return replace(self, shape=tuple(getattr(extents, x) if isinstance(x, str) else x for x in self.shape))

    def numel(self) -> int:
        """The number of its numbers, if its sizes are known."""
        return prod(size for size in self.shape if isinstance(size, int))

    def resized(self, old: int, new: int) -> TensorSpec:
        """The same with another number for a size, except for that of the batch."""
        return replace(self, shape=(self.shape[0], *(new if size == old else size for size in self.shape[1:])))


def _normal(*shape: int | str) -> TensorSpec:
    return TensorSpec("normal", shape)


def _ids(*shape: int | str) -> TensorSpec:
    return TensorSpec("ids", shape)


_CONTENTS: dict[str, Callable[[list[Any], int, torch.Generator], Tensor]] = {
    "normal": lambda shape, _, generator: torch.randn(shape, generator=generator, device="cpu"),
    "ids": lambda shape, vocabulary, generator: torch.randint(vocabulary, shape, generator=generator, device="cpu"),
    "ones": lambda shape, *_: torch.ones(shape),
    "true": lambda shape, *_: torch.ones(shape, dtype=torch.bool),
    "lengths": lambda shape, *_: torch.full(shape, 4),
    "offsets": lambda shape, *_: torch.arange(shape[0]),
}


# --- what weights can read, and what arguments of some names are ---------------------------------------------------


def _sequences(layer: Any, *widths: int) -> list[TensorSpec]:
    return [_normal(*((BATCH, "length") if layer.batch_first else ("length", BATCH)), width) for width in widths]


def _images(layer: Any) -> list[TensorSpec]:
    sides = ("side",) * len(layer.kernel_size)
    channels = layer.in_channels
    without_channels = [(BATCH, *sides)] if channels == 1 else []
    frame_by_frame = [(BATCH, "length", channels, *sides)] if len(sides) == 2 else []
    at_once = [(BATCH, channels, "length", *sides[1:])] if len(sides) == 3 else []
    shapes = [(BATCH, channels, *sides), *without_channels, *frame_by_frame, *at_once, (BATCH, *sides, channels)]
    return [_normal(*shape) for shape in shapes]


def _bare(weight: Tensor) -> list[TensorSpec]:
    """Tensors that a bare parameter can multiply along either axis, or be convolved with."""
    widths = dict.fromkeys(weight.shape[-2:])
    images = [_normal(BATCH, weight.shape[1], *["side"] * (weight.dim() - 2))] if weight.dim() > 2 else []
    return [_normal(*front, width) for front in ((BATCH,), (BATCH, "length")) for width in widths] + images


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS: tuple[tuple[type | tuple[type, ...], Callable[[Any], list[TensorSpec]]], ...] = (
    (nn.Linear, lambda layer: [_normal(BATCH, layer.in_features), _normal(BATCH, "length", layer.in_features)]),
    (nn.Bilinear, lambda layer: [_normal(BATCH, layer.in1_features), _normal(BATCH, layer.in2_features)]),
    (_CONVOLUTIONS, _images),
    ((nn.Embedding, nn.EmbeddingBag), lambda _: [_ids(BATCH, "length"), _ids(BATCH), _ids("length")]),
    (nn.RNNBase, lambda layer: _sequences(layer, layer.input_size)),
    (nn.RNNCellBase, lambda layer: [_normal(BATCH, layer.input_size)]),
    (nn.MultiheadAttention, lambda layer: _sequences(layer, layer.embed_dim, layer.kdim, layer.vdim)),
)
_ANYTHING = (_normal(BATCH, "length"), _ids(BATCH, "length"), _normal(BATCH, "length", "length"))

Option: TypeAlias = "TensorSpec | float | None"  # what an argument may be: a tensor, or the value itself

_MASK, _LENGTHS, _ADJACENCY = r"(.*_)?masks?", r"(.*_)?(lengths?|lens)", r"adj(acency)?(_.*)?"
_NAMED: dict[str, tuple[Option, ...]] = {
    r"(.*_)?(ids?|idx|index|indices|tokens?|words?|text|captions?)": (_ids(BATCH, "length"),),
    _MASK: (None, TensorSpec("true", (BATCH, "length")), TensorSpec("true", ("length", "length"))),
    _LENGTHS: (TensorSpec("lengths", (BATCH,)),),
    _ADJACENCY: (TensorSpec("ones", (BATCH, "length", "length")), TensorSpec("ones", ("length", "length"))),
    r"edge_index": (_ids(BATCH, "length"),),
    r"ts?|(.*_)?(time|timesteps?|steps?|sigmas?)": (
        _ids(BATCH),
        TensorSpec("ones", (BATCH,)),
        TensorSpec("ones", (BATCH, 1)),
    ),
    r"h|hx|h_?0|hidden|(.*_)?state|cache|past(_.*)?": (None,),
    r"(.*_)?(labels?|targets?)": (None, _ids(BATCH), _ids(BATCH, "length")),
    r"offsets": (TensorSpec("offsets", (BATCH,)),),
}
"""What arguments of some names usually are."""

_BESIDE_SEQUENCES = f"{_MASK}|{_LENGTHS}|{_ADJACENCY}"
_READERS: dict[str, tuple[type, ...]] = {
    r".*(pixel|image|img|frame|video).*": _CONVOLUTIONS,
    r"z|.*(noise|latent).*": (nn.Linear, *_CONVOLUTIONS),
    r"input_values|.*(audio|wave|signal|input_features).*": (nn.Conv1d,),
}
"""Layers that read arguments of some names, wherever they stand in the model."""

_CONSTANTS: dict[str, float] = {"int": 1, "float": 0.5, "bool": False}
"""Arguments of some types, by annotation."""


class Forward:
    """The arguments of a model's forward, and what each of them may be."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = _parameters(model)
        self._model = model
        self._example = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        modules = [*model.modules()]
        self._layers = [(module, read) for module in modules for kinds, read in _LAYERS if isinstance(module, kinds)]
        known = {id(parameter) for layer, _ in self._layers for parameter in layer.parameters()}
        self._bare = [p for p in model.parameters() if not p.is_nested and p.dim() > 1 and id(p) not in known]
        words = [m.num_embeddings for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        self._vocabulary = min(8, *words) if words else 2
        recurrent = any(isinstance(module, nn.RNNBase | nn.MultiheadAttention) for module in modules)
        self._has_sequences = recurrent or any(re.fullmatch(_BESIDE_SEQUENCES, name) for name in self.required())

    def stated(self) -> Iterator[Inputs]:
        """Inputs that the model carries with it, by the conventions of PyTorch Lightning, transformers and timm."""
        for name in ("example_input_array", "dummy_inputs"):
            value = _read(self._model, name)
            if value is not None:
                args, kwargs = pytree.tree_map_only(Tensor, self._placed, split_inputs(value))
                yield _inputs(f"guessed from its {name}", [("", value) for value in args], kwargs)
        for name in ("pretrained_cfg", "default_cfg"):
            size = _read(_read(self._model, name), "input_size")
            if isinstance(size, tuple | list) and all(isinstance(x, int) and x > 0 for x in size):
                yield _inputs(f"guessed from its {name}", [("", self._made(_normal(BATCH, *size), _generator()))], {})

    def required(self) -> list[str]:
        """The arguments that have to be given, or the one that matters most."""
        parameters = self.parameters.items()
        needed = [name for name, p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
        main = _read(self._model, "main_input_name")  # of a model of transformers, whose arguments are all optional
        return needed or [name for name in (main, *self.parameters) if name in self.parameters][:1]

    def left_out(self, given: Container[str]) -> list[str]:
        """The arguments that were not given and are None then."""
        return [name for name, p in self.parameters.items() if name not in given and p.default is None]

    def options(self, name: str) -> list[Option]:
        """What an argument may be, the most likely first."""
        annotation = self.parameters[name].annotation
        type_name = str(getattr(annotation, "__name__", annotation))  # a string itself under postponed evaluation
        if type_name in _CONSTANTS:
            return [_CONSTANTS[type_name]]
        named = chain.from_iterable(options for pattern, options in _NAMED.items() if re.fullmatch(pattern, name))
        bare = chain.from_iterable(map(_bare, self._bare[:FIRST]))
        return list(dict.fromkeys([*named, *self._read_by_layers(name), *bare, *_ANYTHING]))

    def inputs(self, chosen: Sequence[tuple[str, Option]]) -> Inputs:
        """The arguments themselves."""
        args, kwargs, generator = [], {}, _generator()
        for name, option in chosen:
            value = self._made(option, generator) if isinstance(option, TensorSpec) else option
            parameter = self.parameters[name]
            if parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
                args.append((name, value))
            else:
                kwargs[name] = value
        return _inputs("guessed", args, kwargs)

    def _read_by_layers(self, name: str) -> Iterator[TensorSpec]:
        readers = tuple(kind for pattern, kinds in _READERS.items() if re.fullmatch(pattern, name) for kind in kinds)
        for layer, read in sorted(self._layers, key=lambda pair: not isinstance(pair[0], readers))[:FIRST]:
            longest_first = self._has_sequences and isinstance(layer, nn.Linear)
            yield from reversed(read(layer)) if longest_first else read(layer)

    def _made(self, tensor: TensorSpec, generator: torch.Generator) -> Tensor:
        return self._placed(_CONTENTS[tensor.content]([*tensor.shape], self._vocabulary, generator))

    def _placed(self, tensor: Tensor) -> Tensor:
        """The tensor on the model's device and, if it has floating-point numbers, in the model's dtype."""
        return tensor.to(self._example.device, self._example.dtype if tensor.is_floating_point() else tensor.dtype)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    with suppress(ValueError, TypeError):  # a forward without a signature
        parameters = inspect.signature(_read(model, "forward")).parameters
        return {name: p for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    return {}


def _read(holder: Any, name: str) -> Any:
    """An entry or an attribute, or None if there is none."""
    with suppress(Exception):  # a property is anybody's code
        return holder[name] if isinstance(holder, dict) else getattr(holder, name)
    return None


def _inputs(source: str, args: Sequence[tuple[str, Any]], kwargs: dict[str, Any]) -> Inputs:
    described = ", ".join(f"{name} {_kind(value)}".strip() for name, value in (*args, *kwargs.items()))
    return Inputs(tuple(value for _, value in args), kwargs, f"{source}: {described or 'no arguments'}")


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
