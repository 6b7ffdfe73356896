"""Layouts: operators that only move entries, executed on other tensors than those of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from biofx.analysis.numbers import NOBODY
from biofx.recording.catalog import argument_positions
from biofx.recording.operations import Depends, Operation, Value
from biofx.recording.trees import leaves, mapped

Look = Callable[[Value], Tensor | None]
"""The tensor that takes the place of a value, or None if the value's own numbers do."""


class CannotFollowError(Exception):
    """What an operator does with entries depends on their values, or is not known."""


def execute(operation: Operation, look: Look) -> list[Tensor]:
    """Run a layout operator on other tensors, and return a tensor for each of its outputs.

    Raises:
        CannotFollowError: which entries it takes depends on the inputs, or is not known.
    """
    given = _without_numbers(operation)
    args, kwargs = mapped(Value, lambda value: _operand(value, look), given)
    _refuse_choices(operation, args[0] if args else None)
    try:
        result = _execute(operation, args, kwargs)
    except (RuntimeError, IndexError, TypeError, NotImplementedError) as error:
        raise CannotFollowError(str(error)) from error
    return list(leaves(Tensor, result))


def moved(operation: Operation, entries: Tensor) -> list[Tensor]:
    """What a layout operator returns if its first operand has other entries; errors as of `execute`."""
    first = operation.operands[0]
    return execute(operation, lambda value: entries if value is first else None)


def rearranged(operation: Operation, entries: Tensor) -> list[Tensor]:
    """The same, compressed."""
    return [compressed(tensor) for tensor in moved(operation, entries)]


def _without_numbers(operation: Operation) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an operator, with nobody in place of numbers that it puts among the entries."""
    args, kwargs = list(operation.args), dict(operation.kwargs)
    for name in operation.numbers:
        if name in kwargs:
            kwargs[name] = NOBODY
        else:
            args[argument_positions(operation.operator)[name][0]] = NOBODY
    return tuple(args), kwargs


def _operand(value: Value, look: Look) -> Tensor:
    found = look(value)
    found = value.data if found is None else found
    if found is None:
        raise CannotFollowError("a tensor has too many entries to be kept, or no values")
    return found


def _refuse_choices(operation: Operation, moved: Any) -> None:
    """Entries that inputs choose are known only if those to choose from are the same."""
    indices = [v for v in operation.operands[1:] if not v.is_activity and v.depends is Depends.INPUTS]
    if not indices or not isinstance(moved, Tensor):
        return
    if operation.name == "index":
        start, axes = 0, list[int]()
        for index in operation.argument("indices"):
            width = len(index.shape) if index is not None and index.dtype is torch.bool else 1
            axes += range(start, start + width) if index is not None else ()
            start += width
    elif operation.name in ("_pack_padded_sequence", "_pad_packed_sequence"):
        axes = list(range(moved.dim() - 1))
    elif operation.name in ("gather", "index_select"):
        axes = [operation.argument("dim")]
    else:
        axes = list(range(moved.dim()))
    if any(varies(moved, axis) for axis in axes):
        raise CannotFollowError("its inputs choose the units")


def varies(tensor: Tensor, axis: int) -> bool:
    """Whether the entries of a compressed tensor differ along an axis."""
    return tensor.shape[axis] > 1 and tensor.stride(axis) != 0


def compressed(tensor: Tensor) -> Tensor:
    """A tensor that is expanded along all axes along which its entries do not differ."""
    small = tensor
    for axis in range(tensor.dim()):
        if varies(small, axis):
            first = small.narrow(axis, 0, 1)
            if bool((small == first).all()):
                small = first
        elif small.shape[axis] > 1:
            small = small.narrow(axis, 0, 1)
    return small.expand(tensor.shape)


def once(*tensors: Tensor, keep: int | None = None) -> tuple[Tensor, ...]:
    """Tensors of one shape, with a length of 1 along the axes on which all are expanded, other than `keep`."""
    for axis in range(tensors[0].dim()):
        if axis != keep and tensors[0].shape[axis] > 1 and not any(varies(tensor, axis) for tensor in tensors):
            tensors = tuple(tensor.narrow(axis, 0, 1) for tensor in tensors)
    return tensors


def _execute(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = operation.name
    if name in _SPECIAL:
        return _SPECIAL[name](operation, args, kwargs)
    if name in _NOT_OF_INTEGERS:
        return getattr(torch.ops.aten, name)(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
    return getattr(torch.ops.aten, name.removeprefix("unsafe_"))(*args, **kwargs)


def _as_strided(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    source = operation.operands[0]
    size, stride = operation.argument("size"), operation.argument("stride")
    if operation.argument("storage_offset") or source.stride != tuple(
        torch.empty(source.shape, device="meta").stride()
    ):
        raise CannotFollowError("it takes entries by their place in memory")
    result: Tensor = args[0].contiguous().as_strided(size, stride)
    return result


def _as_complex(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    real, imaginary = args[0].unbind(-1)
    if not torch.equal(real, imaginary):
        raise CannotFollowError("it makes one number of two units")
    made: Tensor = real
    return made


# Unit numbers are not laid out in memory as the values are, so a view may have to copy them.
_SPECIAL: dict[str, Callable[[Operation, tuple[Any, ...], dict[str, Any]], Any]] = {
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias"), lambda _, args, kwargs: args[0].reshape(args[1])),
    "as_strided": _as_strided,
    "view_as_real": lambda _, args, kwargs: args[0].unsqueeze(-1).expand(*args[0].shape, 2),
    "view_as_complex": _as_complex,
    **dict.fromkeys(("imag", "_conj", "_neg_view"), lambda _, args, kwargs: args[0]),
}
_NOT_OF_INTEGERS = frozenset(
    ("im2col", *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)))
)
