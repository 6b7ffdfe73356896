"""The structure of a call: what other arguments must share with those of the check for the graph to run on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from biofx.base.contents import slots_of
from biofx.base.rule_code import digest
from biofx.base.torch_internals import pytree, runs_function_modes

CallStructure = tuple[Any, ...]

_DEEPEST = 4  # levels of nested objects that are inspected in an argument


def structure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallStructure:
    """Return the structure of arguments: types, the dtype and rank of tensors, and the values of flags and strings."""
    return tuple(_structure((args, dict(kwargs)), _DEEPEST))


def _structure(value: Any, depth: int) -> Iterator[Any]:
    leaves, spec = pytree.tree_flatten(value)
    yield str(spec)
    places: dict[int, int] = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            yield type(leaf), leaf.dtype, leaf.dim(), places.setdefault(id(leaf), place)  # the same object twice
        elif depth and (parts := _parts(leaf)) is not None:
            yield type(leaf)
            yield from _structure(parts, depth - 1)
        else:
            yield _choice(leaf)


def _choice(value: Any) -> Any:
    """The value itself if forward may branch on it; otherwise its type."""
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, FunctionType):
        return value.__module__, value.__qualname__, digest(value)
    if isinstance(value, type | BuiltinFunctionType):
        return value.__module__, value.__qualname__
    return repr(value) if isinstance(value, torch.dtype | Enum) else type(value)


def _parts(value: Any) -> tuple[Any, ...] | None:
    """The items and attributes of a user's object, such as a batch; None for other values."""
    if isinstance(value, type | FunctionType | nn.Module):
        return None
    items = (
        dict(dict.items(value)) if isinstance(value, dict) else list(value) if isinstance(value, list | tuple) else None
    )
    slots = slots_of(type(value))
    attributes = {name: getattr(value, name) for name in sorted(slots) if hasattr(value, name)}
    attributes |= getattr(value, "__dict__", {})
    return None if items is None and not slots and not hasattr(value, "__dict__") else (items, attributes)


def is_plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether all tensors are of PyTorch's own class and layout, and no mode intercepts function calls."""
    tensors = (leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor))
    if any(type(each) not in (Tensor, nn.Parameter) or each.layout is not torch.strided for each in tensors):
        return False
    return not runs_function_modes()
