"""The structure of a call: what other arguments must share with those of the check for the graph to run on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

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


def placeholders(graph: fx.Graph) -> dict[str, Any]:
    """Return the arguments of a graph in order, each with the kind of its default or `...`."""
    nodes = graph.find_nodes(op="placeholder")
    return {str(node.target): _kind(node.args[0]) if node.args else ... for node in nodes}


def kinds(defaults: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kind of each argument of a call: what code may ask of it with `is` and `isinstance`."""
    given, rest = dict(kwargs), [*args]
    for name in defaults:
        if name.startswith("**"):
            given[name] = {key: value for key, value in kwargs.items() if key not in defaults}
        elif name.startswith("*"):
            given[name], rest = tuple(rest), []
        elif rest:
            given[name] = rest.pop(0)
    return {name: _kind(given[name]) if name in given else default for name, default in defaults.items()}


def other_kind(now: Mapping[str, Any], known: Mapping[str, Any]) -> str | None:
    """Say which argument is not of its known kind; None if there is none, or `MustBeNone` looks at it."""
    both = (name for name in known if now.get(name, ...) is not ...)
    other = (name for name in both if known[name] is not None and not _fits(now[name], known[name]))
    return next((f"the argument {name} is {now[name]} and was {known[name]}" for name in other), None)


def _kind(value: Any, depth: int = _DEEPEST) -> Any:
    if isinstance(value, Tensor | str):
        return Tensor if isinstance(value, Tensor) else str
    if type(value) in (list, tuple):
        return [type(value), *(_kind(each, depth) for each in value)]
    if type(value) is dict:
        return {key: _kind(each, depth) for key, each in value.items()}
    parts = None if not depth or torch.compiler.is_compiling() else _parts(value)
    return _choice(value) if parts is None else [type(value), *(_kind(each, depth - 1) for each in parts)]


def _fits(now: Any, kind: Any) -> bool:
    """Whether a kind is the known one; a dictionary may have more keys, and a list more or fewer items."""
    if isinstance(now, dict) and isinstance(kind, dict):
        return all(key in now and _fits(now[key], each) for key, each in kind.items())
    if isinstance(now, list) and isinstance(kind, list):
        return all(map(_fits, now, kind))
    return bool(now == kind)


def is_plain(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether all tensors are of PyTorch's own class and layout, and no mode intercepts function calls."""
    tensors = (leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor))
    if any(type(each) not in (Tensor, nn.Parameter) or each.layout is not torch.strided for each in tensors):
        return False
    return not runs_function_modes()
