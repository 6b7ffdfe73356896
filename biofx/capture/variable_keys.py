"""Keys of variables: what is compared to detect whether a value changed, also in another process."""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Iterator
from datetime import date, timedelta
from enum import Enum
from numbers import Number
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from biofx.base.contents import is_array, items_of
from biofx.base.rule_code import digest
from biofx.base.torch_internals import without_dispatch_modes

PLAIN = (bool, int, float, complex, str, bytes, type(None))
KEYED = (Tensor, FunctionType, type, Enum, ModuleType)  # also those that a user defines have keys of their own
CONTAINERS = (dict, list, tuple, set, frozenset, deque, MappingProxyType)
_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_VALUES = (Number, range, slice, date, timedelta, PurePath, *_OF_TORCH)  # told apart by their text
_WRAPPED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    ((functools.partial, functools.partialmethod), ("func", "args", "keywords")),
    (MethodType, ("__func__", "__self__")),
    (BuiltinFunctionType, ("__self__",)),
    ((staticmethod, classmethod), ("__func__",)),
    (property, ("fget",)),
    (functools.cached_property, ("func",)),
)
_FEW = 2**20  # bytes of a tensor whose values are compared; of a larger one, only its version is
_digest = functools.cache(digest)  # of code


class Opaque:
    """An object that is compared by identity, and by its class after pickling."""

    def __init__(self, value: Any) -> None:
        self._kind = f"{type(value).__module__}.{type(value).__qualname__}"
        self._value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Opaque) or self._kind != other._kind:
            return False
        return self._value is other._value or self._value is None or other._value is None

    def __hash__(self) -> int:
        return hash(self._kind)

    def __deepcopy__(self, memo: dict[int, Any]) -> Opaque:
        copied = object.__new__(Opaque)
        copied._kind, copied._value = self._kind, memo.get(id(self._value), self._value)  # it may be part of the model
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"_kind": self._kind, "_value": None}


def key_of(value: Any) -> Any:
    """The key of a value, without those of what it contains."""
    kind = type(value)
    if isinstance(value, PLAIN):
        return kind.__qualname__, repr(value) if isinstance(value, float | complex) else value
    if isinstance(value, Tensor):
        return _key_of_tensor(value)
    if isinstance(value, nn.Module):
        return Opaque(value)
    if isinstance(value, CodeType):
        return _digest(value)
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return value.__module__, value.__qualname__
    if isinstance(value, CONTAINERS):
        parts = [_plain_key(each) for each in items_of(value)]
        return kind.__qualname__, frozenset(parts) if isinstance(value, set | frozenset) else tuple(parts)
    if is_array(value):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, Enum):
        return kind.__module__, kind.__qualname__, value.name
    if any(wrapped_in("", value)):
        return kind.__qualname__
    is_scalar = kind.__module__ == "numpy" and getattr(value, "shape", None) == ()
    return repr(value) if isinstance(value, _VALUES) or is_scalar else Opaque(value)


def _key_of_tensor(tensor: Tensor) -> Any:
    with without_dispatch_modes():  # it is not part of the model's computation
        if not can_be_compared(tensor):
            return Opaque(tensor)
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
        return str(tensor.dtype), tuple(tensor.shape), hashlib.blake2b(flat.view(torch.uint8).numpy().data).hexdigest()


def can_be_compared(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read, and are few enough to be compared often."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return False
    if tensor.is_nested or tensor.is_meta or tensor.is_quantized or tensor.numel() * tensor.element_size() > _FEW:
        return False
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() else 0
    return tensor.untyped_storage().nbytes() >= end  # else its memory was freed


def _plain_key(value: Any) -> Any:
    """The key of an item of a container, if it is a plain value or a pair of them; otherwise its class."""
    if isinstance(value, tuple):
        return tuple(_plain_key(each) for each in value)
    return (type(value).__qualname__, value if isinstance(value, PLAIN) else None)


def wrapped_in(label: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What decorators and bound methods wrap."""
    names = next((names for kinds, names in _WRAPPED if isinstance(value, kinds)), ())
    yield from ((f"{label}.{name}", getattr(value, name)) for name in names)
