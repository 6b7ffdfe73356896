"""Derived classes: a class that users derived from one that biofx generated, derived anew from another."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from types import CellType, FunctionType
from typing import Any


def derived_anew(cls: Any, known: Callable[[Any], Any]) -> Any:
    """The class that derives from others as a class does from its bases, such as one that `parametrize` made.

    Args:
        cls: the class.
        known: returns the class that takes the place of one; None for one that is to be derived anew.
    """
    if (found := known(cls)) is not None:
        return found
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    bases = [derived_anew(base, known) for base in cls.__bases__]
    result = type(cls)(cls.__name__, tuple(bases), own)
    others = [(cls, result), *zip(cls.__bases__, bases, strict=True)]
    for name, value in own.items():
        if (method := _referring_to(others, value)) is not value:
            setattr(result, name, method)
    return result


def _referring_to(others: Collection[tuple[Any, Any]], value: Any) -> Any:
    """A method, property or function that refers to other classes, as by `super()`; the value itself if it does not."""
    if isinstance(value, property):
        parts = value.fget, value.fset, value.fdel
        found = [_referring_to(others, part) for part in parts]
        return value if all(map(operator.is_, found, parts)) else property(found[0], found[1], found[2], value.__doc__)
    if isinstance(value, staticmethod | classmethod):
        inner = _referring_to(others, value.__func__)
        return value if inner is value.__func__ else type(value)(inner)
    if not isinstance(value, FunctionType):
        return next((new for old, new in others if old is value), value)
    cells = [(cell, _in_cell(cell)) for cell in value.__closure__ or ()]
    found = [CellType(new) if (new := _referring_to(others, held)) is not held else cell for cell, held in cells]
    if all(cell is new for (cell, _), new in zip(cells, found, strict=True)):
        return value
    copied = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(found))
    copied.__kwdefaults__ = value.__kwdefaults__
    vars(copied).update(vars(value))
    return copied


def _in_cell(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None
