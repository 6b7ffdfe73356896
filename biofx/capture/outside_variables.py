"""Variables: state outside of a model that its forward reads, such as a schedule that a training script sets."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Set
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from biofx.base.contents import is_holder
from biofx.base.rule_code import codes_in

Variable = Callable[[], Any]
"""Returns the current value of a variable."""

_WATCHED = (
    bool | int | float | complex | str | bytes | None | FunctionType | BuiltinFunctionType | Enum | torch.dtype | Tensor
)
_DEEPEST = 4  # levels of nested attributes

# Most variables that forwards refer to belong to these packages, and nobody sets them between two calls.
_NOT_OF_USERS = frozenset({*sys.stdlib_module_names, "torch", "numpy", "biofx"})


def reads(modules: Iterable[nn.Module]) -> dict[str, Variable]:
    """Return the variables that the methods of some modules read, directly or through functions that they call.

    These are the global variables and the variables of enclosing functions that the code names: plain values, tensors,
    and the named attributes of the user's objects and Python modules.

    Returns:
        The variables by their qualified names.
    """
    found: dict[str, Variable] = {}
    seen: set[Any] = set()
    for cls in dict.fromkeys(cls for module in modules for cls in type(module).__mro__ if _is_of_user(cls.__module__)):
        for key, value in vars(cls).items():
            if isinstance(value, _WATCHED) and not key.startswith("__"):
                found[f"{cls.__module__}.{cls.__qualname__}.{key}"] = partial(_of_class, cls, key)
            for function in _functions(value):
                found.update(_read_by(function, seen))
    return found


def _of_class(cls: type, key: str) -> Any:
    return vars(cls).get(key)


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions behind an attribute of a class: a method or a property, with or without decorators."""
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
    except ValueError:  # a variable of an enclosing function has no value yet
        return
    named = {name for code in codes_in(function.__code__) for name in code.co_names}  # in comprehensions and the like
    known = names.globals.keys() | (named & function.__globals__.keys())
    variables = {name: partial(function.__globals__.get, name) for name in known}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    variables |= {name: partial(getattr, cell, "cell_contents", None) for name, cell in cells}
    variables.pop("__class__", None)  # of `super()`
    for name, variable in variables.items():
        for label, part in _parts(name, variable, frozenset(names.unbound | named)):
            value = part()
            if isinstance(value, FunctionType):
                yield from _read_by(value, seen)
            if isinstance(value, _WATCHED) or is_holder(value):
                yield f"{function.__module__}.{label}", part


def _parts(name: str, variable: Variable, names: Set[str], depth: int = _DEEPEST) -> Iterator[tuple[str, Variable]]:
    """Yield a variable, or, if it is an object, its attributes that a function names, recursively."""
    value = variable()
    if not depth or not _has_attributes(value):
        yield name, variable
        return
    for key in sorted(names & vars(value).keys()):
        yield from _parts(f"{name}.{key}", partial(_attribute, variable, key), names, depth - 1)


def _attribute(variable: Variable, key: str) -> Any:
    return getattr(variable(), "__dict__", {}).get(key)


def _has_attributes(value: Any) -> bool:
    """Whether a value is an object, class or Python module of the user, so that its attributes may change."""
    if isinstance(value, ModuleType):
        return _is_of_user(value.__name__)
    if isinstance(value, nn.Module) or (callable(value) and not isinstance(value, type)):
        return False
    module = value.__module__ if isinstance(value, type) else type(value).__module__
    return hasattr(value, "__dict__") and (isinstance(value, SimpleNamespace) or _is_of_user(str(module)))


def _is_of_user(module: str | None) -> bool:
    return str(module).partition(".")[0] not in _NOT_OF_USERS
