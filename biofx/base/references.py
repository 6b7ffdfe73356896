"""References: modules and parameters that a module keeps outside its registries of children and parameters.

They are in plain attributes, in lists, dictionaries and objects there, and in closures and defaults of functions.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from biofx.base.contents import ATOMS, Slots, attributes_of, is_of_user, items_of
from biofx.base.torch_internals import DERIVED, HOOKS, HookWithModule

_REGISTRIES = frozenset(vars(nn.Module())) - {*HOOKS}
_WITHOUT_PARTS = ATOMS - {nn.Parameter}
_DEEPEST = 20  # levels of nesting in which references are replaced


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


def listed_by_classes(model: nn.Module) -> str | None:
    """The first attribute of a class that lists modules of the model, such as all instances: copies are not in it."""
    modules = {id(module) for module in model.modules()}
    for cls in dict.fromkeys(base for module in model.modules() for base in type(module).__mro__):
        for name, value in vars(cls).items():
            listed = [*value.values()] if isinstance(value, Mapping | weakref.WeakValueDictionary) else value
            parts = [*listed] if isinstance(listed, list | tuple | Set | deque | weakref.WeakSet) else []
            if any(id(part) in modules for part in _parts(parts, nn.Module, {})):
                return f"{cls.__qualname__}.{name}"
    return None


def made_anew(module: nn.Module) -> set[str]:
    """The attributes that a module's class leaves out of copies and files, and makes anew, such as wrapped methods."""
    return _attributes(module).keys() - _copied_attributes(module).keys()


def repoint(model: nn.Module, others: Mapping[int, Any], *, is_copy: bool = False) -> None:
    """Let attributes and hooks of modules refer to other objects: bound methods, weak references, what holds a parent.

    `copy.deepcopy` copies no weak reference, so a copied child would refer to the original parent. Containers and
    objects of users' classes are changed in place.

    Args:
        model: the model.
        others: the other objects, by the ids of those that are referred to now.
        is_copy: whether the model is a copy. It shares functions with its original, so they are not changed.
    """
    references = _References(others, is_copy)
    for module in model.modules():
        hooks = {name: value for name, value in vars(module).items() if name.endswith("_hooks")}
        for name, value in (_attributes(module) | hooks).items():
            new = references.changed(value)
            if new is not value:
                vars(module)[name] = new


class _References:
    """Changes references; arguments as of `repoint`."""

    def __init__(self, others: Mapping[int, Any], is_copy: bool) -> None:
        self._others, self._is_copy = others, is_copy
        self._seen: dict[int, Any] = {}  # by id; kept alive, so that no other object gets the id

    def changed(self, value: Any, depth: int = _DEEPEST) -> Any:
        """What takes the place of a value, which is the value itself unless it has to be made anew."""
        if type(value) in ATOMS or not depth or (self._is_copy and isinstance(value, FunctionType)):
            return value
        if isinstance(value, nn.Module):
            return self._others.get(id(value), value)
        if isinstance(value, weakref.ref):
            return weakref.ref(self._others[id(value())]) if id(value()) in self._others else value
        made = _made_of(value)
        if made is not None:
            make, parts = made
            new = [self.changed(part, depth - 1) for part in parts]
            return value if all(a is b for a, b in zip(new, parts, strict=True)) else make(*new)
        if id(value) not in self._seen:
            self._seen[id(value)] = value
            _repoint_inside(value, lambda part: self.changed(part, depth - 1))
        return value


def _made_of(value: Any) -> tuple[Callable[..., Any], list[Any]] | None:
    """How a value that cannot be changed is made, and of which parts; None for another value."""
    if isinstance(value, MethodType):
        return MethodType, [value.__func__, value.__self__]
    if isinstance(value, HookWithModule):
        return HookWithModule, [value.hook, value.module() if value.with_module else None]
    if type(value) is functools.partial:
        names = [*value.keywords]

        def make(function: Any, args: Any, *options: Any) -> Any:
            return functools.partial(function, *args, **dict(zip(names, options, strict=True)))

        return make, [value.func, value.args, *value.keywords.values()]
    if isinstance(value, frozenset):
        return lambda *parts: frozenset(parts), [*items_of(value)]
    if isinstance(value, tuple):
        return (lambda *parts: parts) if type(value) is tuple else type(value), [*items_of(value)]
    return None


def _repoint_inside(value: Any, of: Callable[[Any], Any]) -> None:
    """Replace each part of a container, a function's variables, or an object of a user's class."""
    if isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # it is empty
                cell.cell_contents = of(cell.cell_contents)
        for name in ("__defaults__", "__kwdefaults__"):
            if (new := of(getattr(value, name))) is not getattr(value, name):
                setattr(value, name, new)
        return
    if isinstance(value, set):
        parts = [*items_of(value)]
        new = [of(part) for part in parts]
        if any(a is not b for a, b in zip(new, parts, strict=True)):
            value.clear()
            value.update(new)
    elif isinstance(value, dict):
        for key, part in [*dict.items(value)]:
            if (new := of(part)) is not part:
                dict.__setitem__(value, key, new)
    elif isinstance(value, list | deque):
        for place, part in enumerate([*items_of(value)]):
            if (new := of(part)) is not part:
                value[place] = new
    if is_of_user(value):
        for name, part in [*getattr(value, "__dict__", {}).items(), *Slots(value).items()]:
            if (new := of(part)) is not part:
                object.__setattr__(value, name, new)


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
        return [*items_of(value)]
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]
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
