"""Contents: the values inside lists, dictionaries, arrays and plain objects, such as a configuration."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from itertools import chain
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, Counter, list, deque, set, tuple})
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
ATOMS = frozenset({*_PLAIN, Tensor, nn.Parameter})  # the most frequent values, checked first for speed
NAMESPACES = (SimpleNamespace, Namespace)
_NOT_OF_USERS = frozenset({*sys.stdlib_module_names, "torch", "biofx"})  # their objects are opaque
_DEEPEST = 20  # levels of nesting that are searched


def is_holder(value: Any) -> bool:
    """Whether a value has contents that can be searched."""
    return _inside(value) is not None


def is_array(value: Any) -> bool:
    """Whether a value is a NumPy array; NumPy need not be installed."""
    return (type(value).__module__, type(value).__name__) == ("numpy", "ndarray")


def holders(value: Any, seen: set[int], depth: int = _DEEPEST) -> Iterator[Any]:
    """The mutable containers inside a value: arrays, lists, dictionaries and sets; for objects, their dictionary.

    Args:
        value: the value. Tensors, modules, functions and classes are opaque.
        seen: ids of the values that were searched already.
        depth: levels of nesting to search.
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


def inside(value: Any, seen: set[int]) -> Iterator[Any]:
    """A value, and all values in the containers inside it; arguments as of `holders`."""
    yield value
    for holder in holders(value, seen):
        if not is_array(holder):
            yield from list(holder.values() if isinstance(holder, dict) else holder)


def slots_of(cls: type) -> tuple[str, ...]:
    """The attributes that a class keeps without a dictionary."""
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def attributes_of(value: Any) -> list[Any]:
    """What an object keeps in its dictionary and in slots."""
    slots = [name for cls in type(value).__mro__ for name in slots_of(cls) if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name) for name in slots)]


def items_of(container: Any) -> Iterable[Any]:
    """What a container holds; subclasses may make what they are asked for."""
    if isinstance(container, dict):
        return dict.items(container)
    kinds = (list, tuple, set, frozenset, deque)
    kind: Any = next((kind for kind in kinds if isinstance(container, kind)), None)
    found: Iterable[Any] = container.items() if kind is None else kind.__iter__(container)
    return found


def put_back(holder: Any, content: Any) -> None:
    """Restore the contents of a container from a copy, also of a subclass that forbids it or does more."""
    if is_array(holder):
        holder[...] = content
        return
    kind: Any = next(kind for kind in (OrderedDict, dict, list, set, deque) if isinstance(holder, kind))
    kind.clear(holder)
    if isinstance(holder, dict):
        for key, value in content.items():
            kind.__setitem__(holder, key, value)
    else:
        (kind.update if kind is set else kind.extend)(holder, content)


class SameObject:
    """An opaque value: equal to another one if both hold the same object."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameObject) and self.value is other.value

    __hash__ = object.__hash__


def contents_key(value: Any) -> tuple[Any, ...]:
    """An immutable key of a value: equal for equal contents, where tensors, modules and functions are the same."""
    return tuple(_key_parts(value, {}, _DEEPEST))


def _key_parts(value: Any, seen: dict[int, int], depth: int) -> Iterator[Any]:
    if isinstance(value, _PLAIN):
        yield type(value).__name__, value
        return
    holder = _inside(value)
    if holder is None or not depth:
        yield SameObject(value)
        return
    yield type(value).__module__, type(value).__qualname__
    if id(value) in seen:
        yield seen[id(value)]
        return
    if is_array(value):
        yield str(value.dtype), value.shape, value.tobytes()
        return
    if type(value) is not tuple:  # equal tuples may be one object in another process
        seen[id(value)] = len(seen)
    yield len(holder)
    if isinstance(holder, set):
        yield frozenset(contents_key(part) for part in holder)
        return
    for part in chain.from_iterable(holder.items()) if isinstance(holder, dict) else holder:
        yield from _key_parts(part, seen, depth - 1)


def _inside(value: Any) -> Any:
    """The container of a value's parts: the value itself, or the dictionary of an object; None if it has no parts."""
    if type(value) in ATOMS:
        return None
    if type(value) in _CONTAINERS or is_array(value):
        return value
    return vars(value) if hasattr(value, "__dict__") and is_of_user(value) else None


def is_of_user(value: Any) -> bool:
    """Whether a value is an instance of a user's class, such as a configuration or a counter."""
    if isinstance(value, (nn.Module, Tensor, type, ModuleType)):
        return False
    return type(value) in NAMESPACES or type(value).__module__.partition(".")[0] not in _NOT_OF_USERS
