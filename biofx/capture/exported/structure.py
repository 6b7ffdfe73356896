"""Structure: how the arguments and the result of forward are built from tensors."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from biofx.base.errors import CaptureError, InputError
from biofx.base.torch_internals import pytree
from biofx.capture.tracer import HelperModule

LITERALS = (tuple, list, dict)  # containers that a graph can return without a helper module
CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Leaf:
    """A tensor, or a number that depends on the shape of one."""


@dataclass(frozen=True)
class Constant:
    """A value that has to be the same in every call."""

    value: Any


@dataclass(frozen=True)
class Container:
    """A dataclass, or a container whose type is registered with `torch.utils._pytree`.

    Attributes:
        kind: its class.
        spec: rebuilds it from its items: a pytree spec of one level, or the names of the fields of a dataclass.
        names: the names of its items, such as `[0]`, `["x"]` or `.x`.
        items: the structure of each item.
    """

    kind: type
    spec: Any
    names: tuple[str, ...]
    items: tuple[Structure, ...]


Structure = Leaf | Constant | Container


def describe(value: Any, leaves: list[Any]) -> Structure:
    """Return the structure of a value, and append its tensors to `leaves`."""
    if isinstance(value, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        leaves.append(value)
        return Leaf()
    parts = _parts(value)
    if parts is None:
        return Constant(value)
    spec, named = parts
    return Container(type(value), spec, tuple(named), tuple(describe(item, leaves) for item in named.values()))


def build(structure: Structure, leaves: Iterator[Any]) -> Any:
    """Build a value from its structure and its leaves in order."""
    if isinstance(structure, Leaf):
        return next(leaves)
    if isinstance(structure, Constant):
        return structure.value
    items = [build(item, leaves) for item in structure.items]
    if isinstance(structure.spec, tuple):
        return structure.kind(**dict(zip(structure.spec, items, strict=True)))
    return pytree.tree_unflatten(items, structure.spec)


def read(structure: Structure, value: Any, name: str) -> list[Any]:
    """Return the leaves of a value that has to have the given structure.

    Raises:
        InputError: it has another structure; names the first part that differs.
    """
    if isinstance(structure, Leaf):
        if not isinstance(value, (torch.Tensor, fx.Proxy)):  # the compiler of 2.9 cannot follow a union
            raise _mismatch(name, value, "a tensor")
        return [value]
    if isinstance(structure, Constant):
        if type(value) is not type(structure.value) or value != structure.value:
            raise _mismatch(name, value, repr(structure.value))
        return []
    parts = _parts(value) if type(value) is structure.kind else None
    if parts is None or set(parts[1]) != set(structure.names):
        raise _mismatch(name, value, _described(structure.kind, structure.names))
    found = [read(item, parts[1][key], name + key) for key, item in zip(structure.names, structure.items, strict=True)]
    return [leaf for leaves in found for leaf in leaves]


def _mismatch(name: str, value: Any, expected: str) -> InputError:
    parts = _parts(value)
    found = repr(value) if isinstance(value, CONSTANTS) else _described(type(value), parts[1] if parts else ())
    return InputError(
        f"{name} is {found}, and forward was captured for {expected}; "
        f"transform the model with example_inputs that contain this {name}"
    )


def _described(kind: type, names: Iterable[str]) -> str:
    if not issubclass(kind, LITERALS):
        return f"an instance of {kind.__name__}"
    return f"a {kind.__name__} of {', '.join(names)}" if names else f"an empty {kind.__name__}"


def _parts(value: Any) -> tuple[Any, dict[str, Any]] | None:
    """Return the spec of a container and its items by name; None if the value is not a container."""
    if (
        not isinstance(value, LITERALS)
        and dataclasses.is_dataclass(value)
        and type(value) not in pytree.SUPPORTED_NODES
    ):
        fields = tuple(field.name for field in dataclasses.fields(value))
        return fields, {f".{name}": getattr(value, name) for name in fields}
    items, spec = pytree.tree_flatten(value, is_leaf=lambda item: item is not value)
    if spec.is_leaf():
        return None
    keys = list(value) if isinstance(value, dict) and len(value) == len(items) else range(len(items))
    return spec, {f"[{key!r}]": item for key, item in zip(keys, items, strict=True)}


class Unpack(HelperModule):
    """Unpacks an argument that is a container."""

    def __init__(self, structure: Structure, name: str) -> None:
        super().__init__()
        self.structure = structure
        self.name = name

    def forward(self, value: Any) -> list[Any]:
        """Return the tensors in the argument."""
        return read(self.structure, value, self.name)


class Pack(HelperModule):
    """Builds a result of a type that a graph cannot build."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure

    def forward(self, *leaves: Any) -> Any:
        """Build the result from its tensors."""
        return build(self.structure, iter(leaves))


AddModule = Callable[[str, HelperModule], str]
"""Adds a module under an unused name that resembles the given one, and returns that name."""


def unpacked(graph: fx.Graph, structure: Structure, node: fx.Node, add_module: AddModule) -> list[fx.Node]:
    """Add nodes that unpack an argument, and return those of its leaves."""
    if isinstance(structure, Leaf):
        return [node]
    count = len(leaf_names(structure, ""))
    if not count:
        return []
    leaves = graph.call_module(add_module(f"unpack_{node.name}", Unpack(structure, node.name)), (node,))
    return [graph.call_function(operator.getitem, (leaves, index)) for index in range(count)]


def packed(graph: fx.Graph, structure: Structure, leaves: Iterator[Any], add_module: AddModule) -> Any:
    """Add nodes that build the result from the nodes of its leaves, and return it.

    Raises:
        CaptureError: a part of the result is neither a tensor nor a plain value.
    """
    if isinstance(structure, Leaf):
        return next(leaves)
    if isinstance(structure, Constant):
        if not isinstance(structure.value, CONSTANTS):
            raise CaptureError(
                f"forward returns an instance of {type(structure.value).__name__}, which torch.export cannot "
                "unpack; make it return tensors (a cache of transformers: example_inputs with use_cache=False), or "
                "register the class with torch.utils._pytree.register_pytree_node; "
                'or use frontend="module", which returns it unchanged'
            )
        return structure.value
    if structure.kind in LITERALS:
        items = [packed(graph, item, leaves, add_module) for item in structure.items]
        return build(Container(structure.kind, structure.spec, structure.names, (Leaf(),) * len(items)), iter(items))
    _ = [packed(graph, item, iter(()), add_module) for item in _constants(structure)]
    arguments = tuple(next(leaves) for _ in leaf_names(structure, ""))
    return graph.call_module(add_module("pack_outputs", Pack(structure)), arguments)


def _constants(structure: Structure) -> list[Constant]:
    if isinstance(structure, Container):
        return [constant for item in structure.items for constant in _constants(item)]
    return [structure] if isinstance(structure, Constant) else []


def leaf_names(structure: Structure, name: str) -> list[str]:
    """Return the names of the leaves of a value with the given name."""
    if isinstance(structure, Container):
        named = zip(structure.names, structure.items, strict=True)
        return [leaf for key, item in named for leaf in leaf_names(item, name + key)]
    return [name] if isinstance(structure, Leaf) else []
