"""Arguments with which a model's forward runs, if the user gave none.

Candidates are tried until forward runs; where one fails, the error often says which size is needed.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from biofx.base.isolation import parameters_kept, undisturbed
from biofx.base.torch_internals import pytree
from biofx.recording.arguments import BATCH, EXTENTS, Extents, Forward, Inputs, Option, TensorSpec

ATTEMPTS = 64  # for one model; most die in its first layers
REPAIRS = 12  # of one candidate
LONGEST = 1024  # of a side, or of a sequence
LARGEST = 2**23  # of the numbers in a tensor


def guess(model: nn.Module) -> Inputs | None:
    """The first candidate, repaired if need be, with which forward runs in evaluation mode; None if there is none.

    A forward that runs may still be meant for other inputs. The model, its buffers, its mode and the global random
    number generators do not change.

    Args:
        model: any module.

    Example:
        >>> import torch
        >>> from biofx.recording.inputs import guess
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5), torch.nn.Flatten(), torch.nn.Linear(400, 2))
        >>> guess(model).description
        'guessed: input float32 (2, 3, 14, 14)'
    """
    if any(map(nn.parameter.is_lazy, chain(model.parameters(), model.buffers()))):  # a run would settle their shapes
        return None
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):  # their state cannot be restored
        return None
    with parameters_kept(model):
        tried = islice(_attempts(model), ATTEMPTS)
        return next((inputs for inputs, error in tried if error is None), None)


def _attempts(model: nn.Module) -> Iterator[tuple[Inputs, Exception | None]]:
    """Candidates, each followed by its repairs, with what forward raises."""
    forward = Forward(model)
    for stated in forward.stated():
        yield stated, _error(model, stated)
    tried = set()
    for first in _guesses(forward):
        candidate: _Guess | None = first
        for _ in range(1 + REPAIRS):
            if candidate is None or candidate.resolved() in tried or candidate.is_large():
                break
            tried.add(candidate.resolved())
            inputs = forward.inputs(candidate.resolved())
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


# --- guesses and their repairs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Guess:
    """What each argument is.

    Attributes:
        arguments: the arguments by name.
        extents: what their tensors' lengths and sides are.
        bounds: the range of the extent that is sought, by the errors so far.
    """

    arguments: tuple[tuple[str, Option], ...]
    extents: Extents
    bounds: tuple[int, int] = (1, LONGEST)

    def resolved(self) -> tuple[tuple[str, Option], ...]:
        """The arguments with numbers for all sizes."""
        return tuple((name, x.resolved(self.extents) if isinstance(x, TensorSpec) else x) for name, x in self.arguments)

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
            if isinstance(x, TensorSpec) and old in x.shape[1:]:
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


def _tensors(arguments: tuple[tuple[str, Option], ...]) -> list[TensorSpec]:
    return [option for _, option in arguments if isinstance(option, TensorSpec)]


def _guesses(forward: Forward) -> Iterator[_Guess]:
    """All combinations of extents and of what the arguments may be, the cheapest first."""
    names = forward.required()
    choices: list[Sequence[Any]] = [EXTENTS, *map(forward.options, names)]
    for cost in range(sum(map(len, choices))):
        for extents, *options in _combinations(choices, cost):
            yield _Guess(tuple(zip(names, options, strict=True)), extents)


def _combinations(choices: Sequence[Sequence[Any]], cost: int) -> Iterator[tuple[Any, ...]]:
    """One of each, such that their indices sum up to the cost."""
    if not choices:
        yield from [()] if cost == 0 else []
        return
    for index, choice in enumerate(choices[0][: cost + 1]):
        for rest in _combinations(choices[1:], cost - index):
            yield (choice, *rest)


def _repaired(failed: _Guess, error: Exception, forward: Forward) -> _Guess | None:
    """The guess with what its error asks for, or None if that is unclear."""
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
    """The size that the inputs have, and the size that the error asks for; None if it names none.

    If it tells only the direction, they are −2 and −1 to grow, or −1 and −2 to shrink.
    """
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
