"""Structure: how the arguments of forward, and what it returns, are put together from tensors."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from biofx.base.errors import CaptureError, InputError
from biofx.capture.tracer import HelperModule

LITERALS = (tuple, list, dict)  # what a graph can take apart, and return, without a module that does it
CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Leaf:
    """A tensor, or a number that depends on the shape of one."""


@dataclass(frozen=True)
class Constant:
    """A value that the graph was made for."""

    value: Any


@dataclass(frozen=True)
class Container:
    """A container whose type `torch.utils._pytree` knows, or a dataclass.

    Attributes:
        kind: its class.
        spec: what builds it from its items: a tree of one level, or the names of the fields of a dataclass.
        names: what its items are called, as in `[0]`, `["x"]` or `.x`.
        items: the structure of each.
    """

    kind: type
    spec: Any
    names: tuple[str, ...]
    items: tuple[Structure, ...]


Structure = Leaf | Constant | Container


def describe(value: Any, leaves: list[Any]) -> Structure:
    """The structure of a value, whose tensors are appended to `leaves`."""
    if isinstance(value, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
        leaves.append(value)
        return Leaf()
    parts = _parts(value)
    if parts is None:
        return Constant(value)
    spec, named = parts
    return Container(type(value), spec, tuple(named), tuple(describe(item, leaves) for item in named.values()))


def build(structure: Structure, leaves: Iterator[Any]) -> Any:
    """A value of a structure, from its leaves in order."""
    if isinstance(structure, Leaf):
        return next(leaves)
    if isinstance(structure, Constant):
        return structure.value
    items = [build(item, leaves) for item in structure.items]
    if isinstance(structure.spec, tuple):
        return structure.kind(**dict(zip(structure.spec, items, strict=True)))
    return pytree.tree_unflatten(items, structure.spec)


def read(structure: Structure, value: Any, name: str) -> list[Any]:
    """The leaves of a value that has to have the given structure.

    Raises:
        InputError: it has another one; names the first part that differs.
    """
    if isinstance(structure, Leaf):
        if not isinstance(value, torch.Tensor | fx.Proxy):
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
    """What builds a container from its items, and the items by name; None if the value is no container."""
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
    """Takes an argument apart that is not of a type that a graph can take apart."""

    def __init__(self, structure: Structure, name: str) -> None:
        super().__init__()
        self.structure = structure
        self.name = name

    def forward(self, value: Any) -> list[Any]:
        """Its tensors."""
        return read(self.structure, value, self.name)


class Pack(HelperModule):
    """Puts a result together whose type a graph cannot write down."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure

    def forward(self, *leaves: Any) -> Any:
        """The result, from its tensors."""
        return build(self.structure, iter(leaves))


AddModule = Callable[[str, HelperModule], str]
"""Adds a module under a name like the one given, and returns its name."""


def unpacked(graph: fx.Graph, structure: Structure, node: fx.Node, add_module: AddModule) -> list[fx.Node]:
    """The nodes of the leaves of an argument."""
    if isinstance(structure, Leaf):
        return [node]
    if isinstance(structure, Constant):
        return []
    if structure.kind in LITERALS:
        keys = structure.spec.context if structure.kind is dict else range(len(structure.items))
        items = [
            (item, graph.call_function(operator.getitem, (node, key)))
            for key, item in zip(keys, structure.items, strict=True)
            if not isinstance(item, Constant)
        ]
        return [leaf for item, source in items for leaf in unpacked(graph, item, source, add_module)]
    module = Unpack(structure, node.name)
    leaves = graph.call_module(add_module(f"unpack_{node.name}", module), (node,))
    return [graph.call_function(operator.getitem, (leaves, i)) for i in range(len(leaf_names(structure, "")))]


def packed(graph: fx.Graph, structure: Structure, leaves: Iterator[Any], add_module: AddModule) -> Any:
    """What the graph returns, from the nodes of its leaves.

    Raises:
        CaptureError: a part of it is neither a tensor nor a plain value.
    """
    if isinstance(structure, Leaf):
        return next(leaves)
    if isinstance(structure, Constant):
        if not isinstance(structure.value, CONSTANTS):
            raise CaptureError(
                f"forward returns an instance of {type(structure.value).__name__}, which torch.export cannot take "
                "apart; make it return tensors (a cache of transformers: example_inputs with use_cache=False), or "
                "register the class with torch.utils._pytree.register_pytree_node; "
                'frontend="module" keeps it as it is'
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
    """What the leaves of a value are called, from the name of the value."""
    if isinstance(structure, Container):
        named = zip(structure.names, structure.items, strict=True)
        return [leaf for key, item in named for leaf in leaf_names(item, name + key)]
    return [name] if isinstance(structure, Leaf) else []
