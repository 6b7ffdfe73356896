"""References: modules and parameters that a module keeps outside its registries of children and parameters.

They are in plain attributes, in lists and dictionaries there, and in closures and defaults of functions.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from biofx.base.torch_internals import DERIVED, HOOKS

_REGISTRIES = frozenset(vars(nn.Module())) - {*HOOKS}


def held_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters that modules keep in plain attributes; replacing them would leave the attribute stale."""
    found = (part for module in model.modules() for part in _parts(_attributes(module), nn.Parameter, set()))
    return {id(parameter) for parameter in found}


def enclosed(model: nn.Module) -> tuple[str, str] | None:
    """A function in a module's attribute that refers to a part of the model: copying the model does not copy closures.

    Returns:
        The path of the attribute, and that of the module or parameter; None if there is no such function.
    """
    paths = {id(part): name for name, part in [*model.named_parameters(), *model.named_modules()]}
    for path, owner in model.named_modules():
        for name, value in _copied_attributes(owner).items():
            for function in _parts(value, FunctionType, set()):
                for found in _parts(_contents(function), nn.Module | nn.Parameter, set()):
                    parts = found.modules() if isinstance(found, nn.Module) else [found]
                    part = next((paths[id(part)] for part in parts if id(part) in paths), None)
                    if part is not None:
                        return f"{path}.{name}".lstrip("."), part or type(model).__name__
    return None


def repoint(model: nn.Module, others: Mapping[int, Any]) -> None:
    """Point weak references in attributes of modules, such as from a child to its parent, to other objects.

    `copy.deepcopy` copies no weak reference, so a copied child would refer to the original parent.

    Args:
        model: the model.
        others: the other objects, by the ids of those that are referred to now.
    """
    for module in model.modules():
        for name, value in _attributes(module).items():
            if isinstance(value, weakref.ref) and id(value()) in others:
                vars(module)[name] = weakref.ref(others[id(value())])


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in (*_REGISTRIES, *DERIVED)}


def _copied_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that `copy.deepcopy` copies. For what torch.compile returns, it makes them anew."""
    attributes = _attributes(module)
    if hasattr(type(module), "__deepcopy__"):
        return attributes
    try:
        reduced = module.__reduce_ex__(4)
    except Exception:  # noqa: BLE001 - the copy fails as well, and says why
        return attributes
    kept = reduced[2] if len(reduced) > 2 else {}
    return {name: x for name, x in attributes.items() if name in kept} if isinstance(kept, dict) else attributes


def _parts(value: Any, kind: Any, seen: set[int]) -> Iterator[Any]:
    """All objects of a kind in a value and its contents."""
    if isinstance(value, kind):
        yield value
    parts = _contents(value)
    if parts and id(value) not in seen:
        seen.add(id(value))
        for part in parts:
            yield from _parts(part, kind, seen)


def _contents(value: Any) -> list[Any]:
    if isinstance(value, list | tuple | set | frozenset):
        return [*value]
    if isinstance(value, dict):
        return [*value.values()]
    if isinstance(value, weakref.ref):
        return [value()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        return [*_cells(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return []


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty
            continue
