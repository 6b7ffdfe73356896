"""References: modules and parameters that a module keeps where `torch.nn` does not look for children."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

_REGISTRIES = frozenset(vars(nn.Module()))
_FLAT_WEIGHTS = "_flat_weights"  # of recurrent layers, which look up what is in it before they use it


def outside(model: nn.Module, path: str) -> str | None:
    """Path of the smallest module around an island that holds all it refers to; None if the island itself does.

    An island runs with the weights inside of it rewritten; what it reaches in a list or in a plain attribute is not.

    Args:
        model: the model.
        path: path of the island.
    """
    paths = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    for name, owner in model.named_modules():
        paths.update((id(parameter), f"{name}.{key}".lstrip(".")) for key, parameter in owner._parameters.items())
    island = model.get_submodule(path)
    own = {id(module) for module in island.modules()} | {id(parameter) for parameter in island.parameters()}
    found = path
    for referred in _referred(island):
        if id(referred) not in own and id(referred) in paths:
            found = _common(found, paths[id(referred)])
    return found if found != path else None


def held_parameters(island: nn.Module) -> set[int]:
    """The parameters, by id, that modules in an island keep in plain attributes: those stay what they are."""
    return {id(referred) for referred in _referred(island) if isinstance(referred, nn.Parameter)}


def _referred(island: nn.Module) -> Iterator[nn.Module | nn.Parameter]:
    for module in island.modules():
        attributes = [value for name, value in vars(module).items() if name not in (*_REGISTRIES, _FLAT_WEIGHTS)]
        yield from _modules_and_parameters(attributes, set())


def _modules_and_parameters(value: Any, seen: set[int]) -> Iterator[Any]:
    if isinstance(value, nn.Module | nn.Parameter):
        yield value
    parts: list[Any] = []
    if isinstance(value, list | tuple | set | frozenset):
        parts = [*value]
    elif isinstance(value, dict):
        parts = [*value.values()]
    elif isinstance(value, MethodType):
        parts = [value.__self__]
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    if parts and id(value) not in seen:
        seen.add(id(value))
        for part in parts:
            yield from _modules_and_parameters(part, seen)


def _common(a: str, b: str) -> str:
    """The path in which two paths begin."""
    atoms = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        atoms.append(x)
    return ".".join(atoms)
