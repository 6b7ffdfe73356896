"""Arguments with which a model's forward runs, for when nobody gave any.

Candidates come from what the model says of its inputs, from what its weights can read, and from what its arguments are
called. They are tried until forward runs; where one fails, the error often says what was asked for instead.
"""

from __future__ import annotations

import inspect
import io
import re
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from biofx.trial import parameters_kept, split_inputs, undisturbed

BATCH = 2
ATTEMPTS = 64  # for one model; most die in its first layers
REPAIRS = 12  # of one candidate
LONGEST = 1024  # of a side, or of a sequence
LARGEST = 2**23  # of the numbers in a tensor
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


def guess(model: nn.Module) -> Inputs | None:
    """The first candidate, as it is or repaired, with which forward runs in evaluation mode; None if there is none.

    That forward runs does not prove that it was meant to be run so. The model, with its buffers and its mode, and the
    global random number generators are afterwards what they were before.

    Args:
        model: any module.

    Example:
        >>> import torch
        >>> from biofx.analysis.inputs import guess
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5), torch.nn.Flatten(), torch.nn.Linear(400, 2))
        >>> guess(model).description
        'guessed: input float32 (2, 3, 14, 14)'
    """
    if any(map(is_lazy, chain(model.parameters(), model.buffers()))):  # a run would settle their shapes
        return None
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):  # their state cannot be restored
        return None
    with parameters_kept(model):
        tried = islice(_attempts(model), ATTEMPTS)
        return next((inputs for inputs, error in tried if error is None), None)


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Arguments that forward may take, the most trustworthy first; none has been tried.

    Args:
        model: any module.
    """
    forward = _Forward(model)
    yield from forward.stated()
    yield from map(forward.inputs, _guesses(forward))


def _attempts(model: nn.Module) -> Iterator[tuple[Inputs, Exception | None]]:
    """Candidates, each followed by its repairs, with what forward raises."""
    forward = _Forward(model)
    for stated in forward.stated():
        yield stated, _error(model, stated)
    tried = set()
    for first in _guesses(forward):
        candidate: _Guess | None = first
        for _ in range(1 + REPAIRS):
            if candidate is None or candidate.resolved() in tried or candidate.is_large():
                break
            tried.add(candidate.resolved())
            inputs = forward.inputs(candidate)
            error = _error(model, inputs)
            yield inputs, error
            candidate = _repaired(candidate, error, forward) if error else None


def _error(model: nn.Module, inputs: Inputs) -> Exception | None:
    """What forward raises in evaluation mode, or None if it runs."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (inputs.args, inputs.kwargs))
    silent = redirect_stderr(io.StringIO())  # where torch.fx prints tracebacks
    with undisturbed(model), torch.no_grad(), warnings.catch_warnings(), silent:
        warnings.simplefilter("ignore")
        try:
            model.eval()
            model(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - forward is anybody's code
            return error.with_traceback(None)  # frames hold tensors
    return None


# --- tensors that are yet to be made -------------------------------------------------------------------------------


class _Extents(NamedTuple):
    """Sizes that weights leave open: how long sequences are, and the sides of images and signals."""

    length: int
    side: int


_EXTENTS = tuple(map(_Extents, (8, 16, 8, 32, 64, 16, 16), (16, 32, 28, 64, 128, 224, 256)))


@dataclass(frozen=True)
class _Tensor:
    """A tensor that is yet to be made.

    Attributes:
        content: what is in it, a key of `_CONTENTS`.
        shape: its sizes, as numbers or as names of extents.
    """

    content: str
    shape: tuple[int | str, ...]

    def resolved(self, extents: _Extents) -> _Tensor:
        """The same with numbers only."""
        return replace(self, shape=tuple(getattr(extents, x) if isinstance(x, str) else x for x in self.shape))

    def numel(self) -> int:
        """The number of its numbers, if its sizes are known."""
        return prod(size for size in self.shape if isinstance(size, int))

    def resized(self, old: int, new: int) -> _Tensor:
        """The same with another number for a size, except for that of the batch."""
        return replace(self, shape=(self.shape[0], *(new if size == old else size for size in self.shape[1:])))


def _normal(*shape: int | str) -> _Tensor:
    return _Tensor("normal", shape)


def _ids(*shape: int | str) -> _Tensor:
    return _Tensor("ids", shape)


_CONTENTS: dict[str, Callable[[list[Any], int, torch.Generator], Tensor]] = {
    "normal": lambda shape, _, generator: torch.randn(shape, generator=generator, device="cpu"),
    "ids": lambda shape, vocabulary, generator: torch.randint(vocabulary, shape, generator=generator, device="cpu"),
    "ones": lambda shape, *_: torch.ones(shape),
    "true": lambda shape, *_: torch.ones(shape, dtype=torch.bool),
    "lengths": lambda shape, *_: torch.full(shape, 4),
    "offsets": lambda shape, *_: torch.arange(shape[0]),
}


# --- what weights can read, and what arguments of some names are ---------------------------------------------------


def _sequences(layer: Any, *widths: int) -> list[_Tensor]:
    return [_normal(*((BATCH, "length") if layer.batch_first else ("length", BATCH)), width) for width in widths]


def _images(layer: Any) -> list[_Tensor]:
    sides = ("side",) * len(layer.kernel_size)
    channels = layer.in_channels
    without_channels = [(BATCH, *sides)] if channels == 1 else []
    frame_by_frame = [(BATCH, "length", channels, *sides)] if len(sides) == 2 else []
    at_once = [(BATCH, channels, "length", *sides[1:])] if len(sides) == 3 else []
    shapes = [(BATCH, channels, *sides), *without_channels, *frame_by_frame, *at_once, (BATCH, *sides, channels)]
    return [_normal(*shape) for shape in shapes]


def _bare(weight: Tensor) -> list[_Tensor]:
    """What can be multiplied by a bare parameter, along either axis, or convolved with it."""
    widths = dict.fromkeys(weight.shape[-2:])
    images = [_normal(BATCH, weight.shape[1], *["side"] * (weight.dim() - 2))] if weight.dim() > 2 else []
    return [_normal(*front, width) for front in ((BATCH,), (BATCH, "length")) for width in widths] + images


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS: tuple[tuple[type | tuple[type, ...], Callable[[Any], list[_Tensor]]], ...] = (
    (nn.Linear, lambda layer: [_normal(BATCH, layer.in_features), _normal(BATCH, "length", layer.in_features)]),
    (nn.Bilinear, lambda layer: [_normal(BATCH, layer.in1_features), _normal(BATCH, layer.in2_features)]),
    (_CONVOLUTIONS, _images),
    ((nn.Embedding, nn.EmbeddingBag), lambda _: [_ids(BATCH, "length"), _ids(BATCH), _ids("length")]),
    (nn.RNNBase, lambda layer: _sequences(layer, layer.input_size)),
    (nn.RNNCellBase, lambda layer: [_normal(BATCH, layer.input_size)]),
    (nn.MultiheadAttention, lambda layer: _sequences(layer, layer.embed_dim, layer.kdim, layer.vdim)),
)
_ANYTHING = (_normal(BATCH, "length"), _ids(BATCH, "length"), _normal(BATCH, "length", "length"))

_Option: TypeAlias = "_Tensor | float | None"  # what an argument may be: a tensor, or the value itself

_MASK, _LENGTHS, _ADJACENCY = r"(.*_)?masks?", r"(.*_)?(lengths?|lens)", r"adj(acency)?(_.*)?"
_NAMED: dict[str, tuple[_Option, ...]] = {
    r"(.*_)?(ids?|idx|index|indices|tokens?|words?|text|captions?)": (_ids(BATCH, "length"),),
    _MASK: (None, _Tensor("true", (BATCH, "length")), _Tensor("true", ("length", "length"))),
    _LENGTHS: (_Tensor("lengths", (BATCH,)),),
    _ADJACENCY: (_Tensor("ones", (BATCH, "length", "length")), _Tensor("ones", ("length", "length"))),
    r"edge_index": (_ids(BATCH, "length"),),
    r"ts?|(.*_)?(time|timesteps?|steps?|sigmas?)": (
        _ids(BATCH),
        _Tensor("ones", (BATCH,)),
        _Tensor("ones", (BATCH, 1)),
    ),
    r"h|hx|h_?0|hidden|(.*_)?state|cache|past(_.*)?": (None,),
    r"(.*_)?(labels?|targets?)": (None, _ids(BATCH), _ids(BATCH, "length")),
    r"offsets": (_Tensor("offsets", (BATCH,)),),
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


class _Forward:
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

    def options(self, name: str) -> list[_Option]:
        """What an argument may be, the most likely first."""
        annotation = self.parameters[name].annotation
        type_name = str(getattr(annotation, "__name__", annotation))  # a string itself under postponed evaluation
        if type_name in _CONSTANTS:
            return [_CONSTANTS[type_name]]
        named = chain.from_iterable(options for pattern, options in _NAMED.items() if re.fullmatch(pattern, name))
        bare = chain.from_iterable(map(_bare, self._bare[:FIRST]))
        return list(dict.fromkeys([*named, *self._read_by_layers(name), *bare, *_ANYTHING]))

    def inputs(self, candidate: _Guess) -> Inputs:
        """The arguments themselves."""
        args, kwargs, generator = [], {}, _generator()
        for name, option in candidate.resolved():
            value = self._made(option, generator) if isinstance(option, _Tensor) else option
            parameter = self.parameters[name]
            if parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
                args.append((name, value))
            else:
                kwargs[name] = value
        return _inputs("guessed", args, kwargs)

    def _read_by_layers(self, name: str) -> Iterator[_Tensor]:
        readers = tuple(kind for pattern, kinds in _READERS.items() if re.fullmatch(pattern, name) for kind in kinds)
        for layer, read in sorted(self._layers, key=lambda pair: not isinstance(pair[0], readers))[:FIRST]:
            longest_first = self._has_sequences and isinstance(layer, nn.Linear)
            yield from reversed(read(layer)) if longest_first else read(layer)

    def _made(self, tensor: _Tensor, generator: torch.Generator) -> Tensor:
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


# --- guesses and their repairs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Guess:
    """What each argument is.

    Attributes:
        arguments: the arguments by name.
        extents: what their tensors' lengths and sides are.
        bounds: between what the extent that is sought must lie, by the errors so far.
    """

    arguments: tuple[tuple[str, _Option], ...]
    extents: _Extents
    bounds: tuple[int, int] = (1, LONGEST)

    def resolved(self) -> tuple[tuple[str, _Option], ...]:
        """The arguments with numbers for all sizes."""
        return tuple((name, x.resolved(self.extents) if isinstance(x, _Tensor) else x) for name, x in self.arguments)

    def has(self, size: int) -> bool:
        """Whether a tensor has this size, except as that of the batch."""
        return any(size in tensor.shape[1:] for tensor in _tensors(self.resolved()))

    def fixed(self, size: int) -> int:
        """How many tensors have this size, except as that of the batch or as an extent."""
        return sum(size in tensor.shape[1:] for tensor in _tensors(self.arguments))

    def resized(self, old: int, new: Iterable[int]) -> _Guess:
        """The same with another number for this size in each tensor that has it."""
        numbers, arguments = iter(new), []
        for name, x in self.arguments:
            if isinstance(x, _Tensor) and old in x.shape[1:]:
                x = x.resized(old, next(numbers))
            arguments.append((name, x))
        return replace(self, arguments=tuple(arguments))

    def open(self) -> list[str]:
        """The extents that the tensors have, the one that is more likely to be wrong first."""
        sizes = {size for tensor in _tensors(self.arguments) for size in tensor.shape}
        return [extent for extent in ("side", "length") if extent in sizes]

    def is_large(self) -> bool:
        """Whether a tensor has more numbers than inputs do."""
        return any(tensor.numel() > LARGEST for tensor in _tensors(self.resolved()))


def _tensors(arguments: tuple[tuple[str, _Option], ...]) -> list[_Tensor]:
    return [option for _, option in arguments if isinstance(option, _Tensor)]


def _guesses(forward: _Forward) -> Iterator[_Guess]:
    """All combinations of extents and of what the arguments may be, the cheapest first."""
    names = forward.required()
    choices: list[Sequence[Any]] = [_EXTENTS, *map(forward.options, names)]
    yielded = set()
    for cost in range(sum(map(len, choices))):
        for extents, *options in _combinations(choices, cost):
            candidate = _Guess(tuple(zip(names, options, strict=True)), extents)
            if candidate.resolved() not in yielded:
                yielded.add(candidate.resolved())
                yield candidate


def _combinations(choices: Sequence[Sequence[Any]], cost: int) -> Iterator[tuple[Any, ...]]:
    """One of each, such that their indices sum up to the cost."""
    if not choices:
        yield from [()] if cost == 0 else []
        return
    for index, choice in enumerate(choices[0][: cost + 1]):
        for rest in _combinations(choices[1:], cost - index):
            yield (choice, *rest)


def _repaired(failed: _Guess, error: Exception, forward: _Forward) -> _Guess | None:
    """The guess with what its error asks for, or None if that cannot be told."""
    missing = forward.left_out(dict(failed.arguments))
    words = [] if isinstance(error, RuntimeError) else re.findall(r"\w+", str(error))
    for name in missing if "NoneType" in words else [word for word in words if word in missing]:
        if options := [option for option in forward.options(name) if option is not None]:
            return replace(failed, arguments=(*failed.arguments, (name, options[0])))
    mismatch = _mismatch(str(error), failed)
    extents = [] if "channels" in str(error) else failed.open()
    return _corrected(failed, *mismatch, extents) if mismatch and mismatch[1] else None


_MISMATCHES = (
    r"to have (?P<asked>\d+) channels, but got (?P<got>\d+)",
    r"cannot be multiplied \(\d+x(?P<got>\d+) and (?P<asked>\d+)x",
    r"should contain (?P<got>\d+) elements not (?P<asked>\d+)",
    r"with shape \[\*,? ?(?P<asked>\d+)\], but got input of size\[.*?(?P<got>\d+)\]",
    r"Expected (?P<asked>\d+),? (but )?got (?P<got>\d+)",
    r"size (?P<asked>\d+) for operand \d+ .* seen size (?P<got>\d+)",
    r"tensor a \((?P<got>\d+)\) must match the size of tensor b \((?P<asked>\d+)\)",
)
_INVALID_SHAPE = r"shape '\[(?P<asked>[-\d, ]+)\]' is invalid for input of size (?P<got>\d+)"
_TOO_SMALL = r"(?i)too small|smaller than|can't be greater than actual|should be less than the corresponding"
_TOO_LARGE = r"index out of range in self"


def _mismatch(message: str, failed: _Guess) -> tuple[int, int] | None:
    """A size that there is and the one that is asked for, or just negative numbers of which the larger is asked for."""
    for pattern in _MISMATCHES:
        if found := re.search(pattern, message):
            return int(found["got"]), int(found["asked"])
    if found := re.search(_INVALID_SHAPE, message):
        return int(found["got"]), prod(BATCH if size == -1 else size for size in map(int, found["asked"].split(",")))
    if re.search(_TOO_SMALL, message):
        return -2, -1
    if re.search(_TOO_LARGE, message):
        return -1, -2
    numbers = list(dict.fromkeys(map(int, re.findall(r"\b\d{1,9}\b", message))))
    ours = [number for number in numbers if failed.has(number)]
    return (ours[0], sum(numbers) - ours[0]) if (len(numbers), len(ours)) == (2, 1) else None


def _corrected(failed: _Guess, got: int, asked: int, extents: list[str]) -> _Guess | None:
    """The guess with the size that is asked for; a step towards it if that size is one that forward computes."""
    if failed.fixed(got):
        return failed.resized(got, [asked] * failed.fixed(got))
    for extent in extents:
        if getattr(failed.extents, extent) == got:
            return replace(failed, extents=failed.extents._replace(**{extent: asked}))
    if got > asked and (count := failed.fixed(asked)):  # features of several tensors are concatenated
        least, rest = divmod(count * asked - (got - asked), count)
        if least > 0:
            return failed.resized(asked, [least + (index < rest) for index in range(count)])
    if not extents:
        return None
    size = getattr(failed.extents, extents[0])
    low, high = (size + 1, failed.bounds[1]) if got < asked else (failed.bounds[0], size - 1)
    nearer = failed.extents._replace(**{extents[0]: min(2 * size, (low + high) // 2)})
    return replace(failed, extents=nearer, bounds=(low, high)) if low <= high else None
