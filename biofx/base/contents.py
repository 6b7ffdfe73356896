"""Contents: what lists, dictionaries, arrays and plain objects hold, such as a configuration in an attribute."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import chain
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, Counter, list, deque, set, tuple})
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
ATOMS = frozenset({*_PLAIN, Tensor, nn.Parameter})  # most of what modules hold, told apart at a glance
_NAMESPACES = (SimpleNamespace, Namespace)
_NOT_OF_USERS = frozenset({*sys.stdlib_module_names, "torch", "biofx"})  # their objects are not looked into
_DEEPEST = 20  # how far into what holds something that holds something


def is_holder(value: Any) -> bool:
    """Whether what a value holds can be looked into."""
    return _inside(value) is not None


def is_array(value: Any) -> bool:
    """Whether a value is an array of NumPy, which need not be installed."""
    return (type(value).__module__, type(value).__name__) == ("numpy", "ndarray")


def holders(value: Any, seen: set[int], depth: int = _DEEPEST) -> Iterator[Any]:
    """What can be changed inside of a value: arrays, lists, dictionaries and sets; of objects, their dictionary.

    Args:
        value: the value. Tensors, modules, functions and classes are not looked into.
        seen: ids of what was looked into already.
        depth: how far to look.
    """
    holder = _inside(value)
    if holder is None or not depth or id(value) in seen:
        return
    seen.add(id(value))
    if type(holder) is not tuple:
        yield holder
    parts = holder.values() if isinstance(holder, dict) else () if is_array(holder) else holder
    for part in list(parts):
        yield from holders(part, seen, depth - 1)


def put_back(holder: Any, content: Any) -> None:
    """Make what holds something hold what a copy of it does."""
    if is_array(holder):
        holder[...] = content
        return
    holder.clear()
    (holder.extend if isinstance(holder, list | deque) else holder.update)(content)


class Same:
    """Something that is not looked into: it is equal to itself only, and a copy of it to the copy of its value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    __hash__ = object.__hash__


def frozen(value: Any, opaque: Callable[[Any], Any] = Same) -> tuple[Any, ...]:
    """What is equal for the same contents, and stays what it is when these change.

    Args:
        value: the value.
        opaque: what stands for a tensor, a module, a function, or what else is not looked into.
    """
    return tuple(_frozen(value, opaque, {}, _DEEPEST))


def named(value: Any) -> Any:
    """What stands for something that is not looked into, and is equal in another process if the value is found there.

    A function is the same if it has the same code, and a tensor if it is the same one, in this process.
    """
    if isinstance(value, Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, FunctionType):
        constants = tuple(constant for constant in value.__code__.co_consts if isinstance(constant, _PLAIN))
        return value.__module__, value.__qualname__, value.__code__.co_code, constants
    return (value.__module__, value.__qualname__) if isinstance(value, type) else type(value).__qualname__


def _frozen(value: Any, opaque: Callable[[Any], Any], seen: dict[int, int], depth: int) -> Iterator[Any]:
    if isinstance(value, _PLAIN):
        yield type(value).__name__, value
        return
    holder = _inside(value)
    if holder is None or not depth:
        yield opaque(value)
        return
    yield type(value).__module__, type(value).__qualname__
    if id(value) in seen:
        yield seen[id(value)]
        return
    if is_array(value):
        yield str(value.dtype), value.shape, value.tobytes()
        return
    if type(value) is not tuple:  # an equal one may be the same one in another process
        seen[id(value)] = len(seen)
    yield len(holder)
    if isinstance(holder, set):
        yield frozenset(frozen(part, opaque) for part in holder)
        return
    for part in chain.from_iterable(holder.items()) if isinstance(holder, dict) else holder:
        yield from _frozen(part, opaque, seen, depth - 1)


def _inside(value: Any) -> Any:
    """What holds the parts of a value: the value itself, or the dictionary of an object; None if it has no parts."""
    if type(value) in ATOMS:
        return None
    if type(value) in _CONTAINERS or is_array(value):
        return value
    return vars(value) if _is_plain_object(value) else None


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an object of somebody's own class, such as a configuration or a counter."""
    if isinstance(value, (nn.Module, Tensor, type, ModuleType)) or not hasattr(value, "__dict__") or callable(value):
        return False
    return type(value) in _NAMESPACES or type(value).__module__.partition(".")[0] not in _NOT_OF_USERS
