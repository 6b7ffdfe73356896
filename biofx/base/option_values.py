"""Values of options in files: as JSON, as Python literals, or as names of what can be imported."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from collections.abc import Collection
from typing import Any

import torch
from torch.nn import functional as F

from biofx.base.errors import SavingError

_HOMES = (F, torch)  # of functions whose own module is hidden, such as torch._C._nn


def option_fields(options: Any) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a dataclass that its constructor takes; it computes the others from them."""
    return tuple(field for field in dataclasses.fields(options) if field.init)


def written_options(options: Any) -> dict[str, Any]:
    """The options of a dataclass as JSON, defaults included: another version may have others.

    Raises:
        SavingError: a value that is neither data nor the name of something that can be imported.
    """
    return {field.name: _written(getattr(options, field.name), field.name) for field in option_fields(options)}


def described_options(options: Any, omitted: Collection[str]) -> dict[str, str]:
    """The options of a dataclass as texts, for comparison with another. What has no name is given by its class."""
    names = [field.name for field in option_fields(options) if field.name not in omitted]
    return {name: _described(getattr(options, name)) for name in names}


def _described(value: Any) -> str:
    name = _name(value) if callable(value) else None
    if name is not None:
        return name
    return f"an instance of {type(value).__qualname__}" if callable(value) else repr(value)


def read_option(value: Any, where: str) -> Any:
    """The value of an option from JSON. Names are looked up in modules that were imported: a file imports nothing.

    Args:
        value: the JSON that `written_options` returned for it.
        where: the option, for messages.

    Raises:
        SavingError: there is no such name, or no such literal.
    """
    if not isinstance(value, dict):
        return value
    if "literal" in value:
        try:
            return ast.literal_eval(value["literal"])
        except (ValueError, SyntaxError, TypeError) as error:
            raise SavingError(f"{where} is {value['literal']!r}, which is no Python literal") from error
    name = str(value.get("name"))
    found = _found(name)
    if found is None:
        raise SavingError(f"{where} is {name}, which cannot be found; import {name.partition(':')[0]} first")
    return found


def _written(value: Any, option: str) -> Any:
    if not isinstance(value, dict) and _is_same(value, lambda: json.loads(json.dumps(value))):
        return value
    if _is_same(value, lambda: ast.literal_eval(repr(value))):
        return {"literal": repr(value)}
    name = _name(value)
    if name is None:
        raise SavingError(
            f"{option}={value!r} is neither data nor a function that can be imported by name; give such a function, or "
            "use torch.save(bio, path)"
        )
    return {"name": name}


def _is_same(value: Any, copy: Any) -> bool:
    try:
        return bool(copy() == value)
    except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _name(value: Any) -> str | None:
    """The module and the path in it under which a value can be found."""
    modules = (*(home.__name__ for home in _HOMES), getattr(value, "__module__", None))
    paths = (getattr(value, "__qualname__", ""), getattr(value, "__name__", ""))
    return next((f"{m}:{path}" for m in modules for path in paths if _found(f"{m}:{path}") is value), None)


def _found(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found
