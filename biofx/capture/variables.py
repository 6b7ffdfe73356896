"""Variables outside of a model that its forward reads, such as a schedule that a training script sets."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

Variable = Callable[[], Any]
"""Gives the value of a variable now."""

# Nobody sets variables of these between two calls; they are by far the most that forwards refer to.
_NOT_OF_USERS = frozenset({*sys.stdlib_module_names, "torch", "numpy", "biofx"})


def reads(modules: Iterable[nn.Module]) -> dict[str, Variable]:
    """The variables that the methods of some modules read, and the functions and methods that these call.

    That is what they name, on the level of Python modules and in functions around them: plain values, tensors, and
    attributes that they name of objects and Python modules of the user.

    Returns:
        The variables, each by its name in words.
    """
    found: dict[str, Variable] = {}
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
    if isinstance(value, partial):
        value = value.func
    if isinstance(value, FunctionType):
        yield value
        wrapped = inspect.unwrap(value)
        if isinstance(wrapped, FunctionType) and wrapped is not value:
            yield wrapped


def _read_by(function: FunctionType, seen: set[Any]) -> Iterator[tuple[str, Variable]]:
    if function in seen or not _is_of_user(function.__module__):
        return
    seen.add(function)
    try:
        names = inspect.getclosurevars(function)
    except ValueError:  # a cell that is empty as yet
        return
    variables = {name: partial(function.__globals__.get, name) for name in names.globals}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    variables |= {name: partial(getattr, cell, "cell_contents", None) for name, cell in cells}
    for name, variable in variables.items():
        parts: dict[str, Variable] = {name: variable}
        value = variable()
        if _has_attributes(value):
            parts = {f"{name}.{key}": partial(vars(value).get, key) for key in names.unbound & vars(value).keys()}
        for label, part in parts.items():
            if isinstance(part(), FunctionType):
                yield from _read_by(part(), seen)
            if isinstance(part(), FunctionType | Tensor) or _is_plain(part()):
                yield f"{function.__module__}.{label}", part


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
