"""Contents: what lists, dictionaries, sets and plain objects hold, such as a configuration in an attribute."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, deque, set)
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_DEEPEST = 6  # how far into what holds something that holds something


def is_holder(value: Any) -> bool:
    """Whether what a value holds can be looked into."""
    return type(value) in (*_CONTAINERS, tuple) or _is_plain_object(value)


def holders(value: Any, seen: set[int], depth: int = _DEEPEST) -> Iterator[Any]:
    """What can be changed inside of a value: lists, dictionaries and sets; of objects, their dictionary.

    Args:
        value: the value. Tensors, modules, functions and classes are not looked into.
        seen: ids of what was looked into already.
        depth: how far to look.
    """
    if not depth or id(value) in seen or not is_holder(value):
        return
    seen.add(id(value))
    holder = vars(value) if _is_plain_object(value) else value
    if type(holder) is not tuple:
        yield holder
    for part in list(holder.values() if isinstance(holder, dict) else holder):
        yield from holders(part, seen, depth - 1)


def frozen(value: Any, depth: int = _DEEPEST) -> Any:
    """What is equal for the same contents, in this process and in another, and cannot be changed.

    Tensors, modules and what else is not looked into are told apart by their class, and functions by their name.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, FunctionType | type):
        return value.__module__, value.__qualname__
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if not depth or not is_holder(value):
        return (name,)
    holder = vars(value) if _is_plain_object(value) else value
    if isinstance(holder, dict):
        return name, tuple((frozen(key, depth - 1), frozen(part, depth - 1)) for key, part in holder.items())
    parts = [frozen(part, depth - 1) for part in holder]
    return name, frozenset(parts) if isinstance(holder, set) else tuple(parts)


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an object of somebody's own class, such as a configuration or a counter."""
    if isinstance(value, nn.Module | Tensor | type | ModuleType) or not hasattr(value, "__dict__") or callable(value):
        return False
    return type(value).__module__.partition(".")[0] not in ("torch", "builtins", "functools", "enum")
