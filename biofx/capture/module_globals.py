"""Module-level variables that the forward of a model reads, such as a schedule that a training script sets."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import nn

Namespace = dict[str, Any]

# Nobody sets variables of these between two calls; they are by far the most that forwards refer to.
_NOT_OF_USERS = frozenset({*sys.stdlib_module_names, "torch", "numpy", "biofx"})


def reads(modules: Iterable[nn.Module]) -> dict[str, tuple[Namespace, str]]:
    """The variables that the methods of some modules read, and the functions and methods that these call.

    That is what they name: plain values, and attributes that they name of objects and Python modules of the user.

    Returns:
        The namespace of each and its name there, by its name in words.
    """
    found: dict[str, tuple[Namespace, str]] = {}
    seen: set[Any] = set()
    for cls in dict.fromkeys(cls for module in modules for cls in type(module).__mro__ if _is_of_user(cls.__module__)):
        for method in vars(cls).values():
            for function in _functions(method):
                found.update(_read_by(function, seen))
    return found


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions of a method, a property, or what decorators made of one."""
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, functools.partial):
        value = value.func
    if isinstance(value, FunctionType):
        yield value
        wrapped = inspect.unwrap(value)
        if isinstance(wrapped, FunctionType) and wrapped is not value:
            yield wrapped


def _read_by(function: FunctionType, seen: set[Any]) -> Iterator[tuple[str, tuple[Namespace, str]]]:
    if function in seen or not _is_of_user(function.__module__):
        return
    seen.add(function)
    try:
        names = inspect.getclosurevars(function)
    except ValueError:  # a cell that is empty as yet
        return
    for name, value in names.globals.items():
        variables = {name: (function.__globals__, name, value)}
        if _has_attributes(value):
            inner: Namespace = vars(value)  # of a class, it is a view
            parts = sorted(names.unbound & inner.keys())
            variables = {f"{name}.{part}": (inner, part, inner[part]) for part in parts}
        for label, (namespace, key, held) in variables.items():
            if isinstance(held, FunctionType):
                yield from _read_by(held, seen)
            if isinstance(held, FunctionType) or _is_plain(held):
                yield f"{function.__module__}.{label}", (namespace, key)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list | dict | set | frozenset):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bool | int | float | complex | str | bytes | None)


def _has_attributes(value: Any) -> bool:
    """Whether a value is an object or a Python module of the user, or a class that holds options."""
    if isinstance(value, ModuleType):
        return _is_of_user(value.__name__)
    if isinstance(value, nn.Module) or (callable(value) and not isinstance(value, type)):
        return False
    module = value.__module__ if isinstance(value, type) else type(value).__module__
    return hasattr(value, "__dict__") and (isinstance(value, SimpleNamespace) or _is_of_user(str(module)))


def _is_of_user(module: str | None) -> bool:
    return str(module).partition(".")[0] not in _NOT_OF_USERS
