"""References: modules and parameters that a module keeps outside its registries of children and parameters.

They are in plain attributes, in lists, dictionaries and objects there, and in closures and defaults of functions.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from biofx.base.contents import ATOMS, attributes_of, is_of_user
from biofx.base.torch_internals import DERIVED, HOOKS

_REGISTRIES = frozenset(vars(nn.Module())) - {*HOOKS}
_WITHOUT_PARTS = ATOMS - {nn.Parameter}


def held_parameters(model: nn.Module) -> dict[int, str]:
    """The parameters that modules keep in plain attributes, or in objects there, which would go on with the old tensor.

    Returns:
        What holds each, by the parameter's id.
    """
    found: dict[int, str] = {}
    seen: dict[int, Any] = {}
    for path, module in model.named_modules():
        for name, value in _attributes(module).items():
            for parameter in _parts(value, nn.Parameter, seen, _contents_of_any):
                found.setdefault(id(parameter), _described(f"{path}.{name}".lstrip("."), value))
    return found


def _described(path: str, value: Any) -> str:
    if any(_parts(value, Optimizer, {}, _contents_of_any)):
        return (
            f"the optimizer in the attribute {path} holds it as well, and would go on with the old tensor; set the "
            "attribute to None before the transform, and make the optimizer after it"
        )
    return f"the attribute {path} holds it as well, and would keep the old tensor; store the module there instead"


def enclosed(model: nn.Module) -> tuple[str, str] | None:
    """A function in a module's attribute that refers to a part of the model: copying the model does not copy closures.

    Returns:
        The path of the attribute, and that of the module or parameter; None if there is no such function.
    """
    paths = {id(part): name for name, part in [*model.named_parameters(), *model.named_modules()]}
    for path, owner in model.named_modules():
        for name, value in _copied_attributes(owner).items():
            for function in _parts(value, FunctionType, {}):
                for found in _parts(_contents(function), nn.Module | nn.Parameter, {}):
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


def _contents_of_any(value: Any) -> list[Any]:
    """The contents of a value, also those of an optimizer and of an object of a user's class."""
    if isinstance(value, Optimizer):
        return [getattr(value, "param_groups", None)]  # its hooks belong to others
    if isinstance(value, LRScheduler):
        return [vars(value).get("optimizer")]
    return [*_contents(value), *(attributes_of(value) if is_of_user(value) else ())]


def _parts(
    value: Any, kind: Any, seen: dict[int, Any], contents: Callable[[Any], list[Any]] | None = None
) -> Iterator[Any]:
    """All objects of a kind in a value and its contents.

    Args:
        value: the value.
        kind: the class of the objects.
        seen: what was searched already, by id; it is kept alive, so that no other object gets the id.
        contents: tells what is in a value; by default, what `copy.deepcopy` may fail to copy.
    """
    pending = [value]
    while pending:
        part = pending.pop()
        if type(part) in _WITHOUT_PARTS:
            continue
        if isinstance(part, kind):
            yield part
        inner = [] if id(part) in seen else (contents or _contents)(part)
        if inner:
            seen[id(part)] = part
            pending += reversed(inner)


def _contents(value: Any) -> list[Any]:
    if isinstance(value, list | tuple | set | frozenset | deque):
        return [*value]
    if isinstance(value, dict):
        return [*value, *value.values()]
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
