"""Stores and loads: what forward keeps in an attribute of a module, such as a loss beside its result, in the graph."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from biofx.islands import WHOLE


@fx.node.has_side_effect
def store(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of a module; one node in the graph.

    Args:
        module: the module.
        name: the attribute's name.
        value: what it becomes.
    """
    tracer = next((leaf.tracer for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Proxy)), None)
    if tracer is None:
        setattr(module, name, value)
        return
    paths = {id(child): path for path, child in tracer.root.named_modules()}  # type: ignore[attr-defined]
    add_store(tracer, paths.get(id(module), ""), name, tracer.create_arg(value))


def add_store(tracer: fx.proxy.TracerBase, path: str, name: str, value: Any) -> fx.Node:
    """Put a node into the graph of a tracer that stores a value.

    Args:
        tracer: the tracer.
        path: the path of the module; empty for the model itself.
        name: the attribute's name.
        value: nodes and constants.
    """
    module = tracer.create_node("get_attr", path or WHOLE, (), {})
    return tracer.create_node("call_function", store, (module, name, value), {})


def load(module: nn.Module, name: str, after: Any) -> Any:
    """What a module that is called as it is keeps in an attribute after a call; one node in the graph.

    Args:
        module: the module.
        name: the attribute's name.
        after: what the call returned.
    """
    tracer = next((leaf.tracer for leaf in pytree.tree_leaves(after) if isinstance(leaf, fx.Proxy)), None)
    if tracer is None:
        return getattr(module, name)
    target = tracer.create_proxy("get_attr", tracer.path_of_module(module), (), {})  # type: ignore[attr-defined]
    return tracer.create_proxy("call_function", load, (target, name, after), {})


@functools.cache
def stored_attributes(cls: type[nn.Module]) -> frozenset[str]:
    """The names of the attributes that the forward of a class may store, as its code says."""
    names: set[str] = set()
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        method = waiting.pop()
        function = inspect.unwrap(getattr(cls, method, None))  # type: ignore[arg-type]
        if method in seen or not isinstance(function, FunctionType) or function.__module__.startswith("torch."):
            continue
        seen.add(method)
        for code in _with_inner(function.__code__):
            waiting += code.co_names
            names.update(str(i.argval) for i in dis.get_instructions(code) if i.opname == "STORE_ATTR")
            if "setattr" in code.co_names:
                names.update(constant for constant in code.co_consts if isinstance(constant, str))
    return frozenset(names - {"training"})


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)
