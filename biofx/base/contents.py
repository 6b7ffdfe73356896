"""Contents: the values inside lists, dictionaries, arrays and plain objects, such as a configuration."""

from __future__ import annotations

import sys
import threading
from argparse import Namespace
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterable, Iterator
from itertools import chain
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution, Transform

_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, Counter, list, deque, set, tuple})
_KINDS = (OrderedDict, dict, list, set, deque)  # a class comes before its base
_IMMUTABLE = (tuple, frozenset)  # what they hold may be mutable
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
ATOMS = frozenset({*_PLAIN, Tensor, nn.Parameter})  # the most frequent values, checked first for speed
NAMESPACES = (SimpleNamespace, Namespace, UserDict, UserList, threading.local)
_NOT_OF_USERS = frozenset({*sys.stdlib_module_names, "torch", "biofx"})  # their objects are opaque
_DEEPEST = 20  # levels of nesting that are searched


def is_holder(value: Any) -> bool:
    """Whether a value has contents that can be searched."""
    return bool(_holders_of(value))


def is_array(value: Any) -> bool:
    """Whether a value is a NumPy array; NumPy need not be installed."""
    return (type(value).__module__, type(value).__name__) == ("numpy", "ndarray")


def holders(value: Any, seen: set[int]) -> Iterator[Any]:
    """The mutable containers inside a value: arrays, lists, dictionaries and sets; for objects, their dictionary.

    Args:
        value: the value. Tensors, modules, functions and classes are opaque.
        seen: ids of the values that were searched already.
    """
    for _, found in _searched(value, seen):
        yield from (holder for holder in found if not isinstance(holder, _IMMUTABLE))


def values_within(value: Any, seen: set[int]) -> Iterator[Any]:
    """A value, and all values in the containers inside it; arguments as of `holders`."""
    for part, _ in _searched(value, seen):
        yield part


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in arguments or results, each once: in containers, and in objects such as distributions."""
    found = {id(part): part for part in values_within(value, set()) if isinstance(part, Tensor)}
    return [*found.values()]


def _searched(value: Any, seen: set[int], depth: int = _DEEPEST) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """A value and all values inside it, each with the containers of its parts if these are searched."""
    found = _holders_of(value) if depth and id(value) not in seen else ()
    yield value, found
    if found:
        seen.add(id(value))
    for holder in found:
        parts = dict.values(holder) if isinstance(holder, dict) else () if is_array(holder) else items_of(holder)
        for part in list(parts):
            yield from _searched(part, seen, depth - 1)


class Slots:
    """The attributes that an object keeps in slots, as a container of pairs of name and value."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._names = slots_of(type(owner))

    def __eq__(self, other: object) -> bool:
        return self.items() == other  # its copy is a list

    __hash__ = None  # type: ignore[assignment]  # it is mutable

    def items(self) -> list[tuple[str, Any]]:
        """The attributes that are set."""
        return [(name, getattr(self._owner, name)) for name in self._names if hasattr(self._owner, name)]

    def put_back(self, items: list[tuple[str, Any]]) -> None:
        """Set these attributes, and no others."""
        for name in dict(self.items()).keys() - dict(items).keys():
            object.__delattr__(self._owner, name)
        for name, value in items:
            object.__setattr__(self._owner, name, value)  # also of a frozen dataclass, which may set its own


def slots_of(cls: type) -> tuple[str, ...]:
    """The attributes that objects of a class keep in slots, its bases' included, by the names that `getattr` takes."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            is_private = name.startswith("__") and not name.endswith("__")  # Python adds the class to such a name
            names[f"_{base.__name__.lstrip('_')}{name}" if is_private else name] = None
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def attributes_of(value: Any) -> list[Any]:
    """What an object keeps in its dictionary and in slots."""
    return [*getattr(value, "__dict__", {}).values(), *dict(Slots(value).items()).values()]


def items_of(container: Any) -> Iterable[Any]:
    """The items of a container, by the methods of its built-in class: a subclass may return something else."""
    if isinstance(container, dict):  # only the method of its own class knows the order of an `OrderedDict`
        return (OrderedDict if isinstance(container, OrderedDict) else dict).items(container)
    kinds = (list, tuple, set, frozenset, deque)
    kind: Any = next((kind for kind in kinds if isinstance(container, kind)), None)
    found: Iterable[Any] = container.items() if kind is None else kind.__iter__(container)
    return found


def copy_of(holder: Any) -> Any:
    """A copy of a container, as `put_back` takes it; a subclass may copy itself otherwise."""
    if isinstance(holder, Slots):
        return holder.items()
    return holder.copy() if is_array(holder) else _kind_of(holder)(items_of(holder))


def put_back(holder: Any, content: Any) -> None:
    """Restore a container from a copy, by the methods of its built-in class: a subclass may forbid writes."""
    if is_array(holder):
        holder[...] = content
        return
    if isinstance(holder, Slots):
        holder.put_back(content)
        return
    kind = _kind_of(holder)
    kind.clear(holder)
    if isinstance(holder, dict):
        for key, value in content.items():
            kind.__setitem__(holder, key, value)
    else:
        (kind.update if kind is set else kind.extend)(holder, content)


def _kind_of(holder: Any) -> Any:
    return next(kind for kind in _KINDS if isinstance(holder, kind))


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
    found = _holders_of(value)
    if not found or not depth:
        yield SameObject(value)
        return
    yield type(value).__module__, type(value).__qualname__
    if id(value) in seen:
        yield seen[id(value)]
        return
    if is_array(value):
        yield str(value.dtype), value.shape, value.tobytes()
        return
    if not isinstance(value, _IMMUTABLE):  # equal ones may be one object in another process
        seen[id(value)] = len(seen)
    for items, holder in ((list(items_of(holder)), holder) for holder in found):
        yield len(items)
        if isinstance(holder, set | frozenset):
            yield frozenset(map(contents_key, items))
            continue
        for part in chain.from_iterable(items) if isinstance(holder, dict) else items:
            yield from _key_parts(part, seen, depth - 1)


def _holders_of(value: Any) -> tuple[Any, ...]:
    """The containers of a value's parts: itself, and the dictionary and slots of an object; none if it is opaque."""
    if type(value) in ATOMS:
        return ()
    if type(value) in _CONTAINERS or is_array(value):
        return (value,)
    own = (value,) if isinstance(value, (*_KINDS, *_IMMUTABLE)) else ()  # such as a named tuple
    if not is_of_user(value):
        return own
    kept = (vars(value),) if hasattr(value, "__dict__") else ()
    return (*own, *kept, Slots(value)) if slots_of(type(value)) else (*own, *kept)


def is_of_user(value: Any) -> bool:
    """Whether a value is an instance of a user's class, such as a configuration or a counter."""
    if isinstance(value, (nn.Module, Tensor, type, ModuleType)):
        return False
    if isinstance(value, (Distribution, Transform)):  # policies and autoencoders keep the last one
        return True
    return type(value) in NAMESPACES or type(value).__module__.partition(".")[0] not in _NOT_OF_USERS
