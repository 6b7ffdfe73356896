"""Stores: what forward keeps in an attribute of a module, such as a loss beside its result, in the graph."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from biofx.model.islands import WHOLE_MODEL


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
    module = tracer.create_node("get_attr", path or WHOLE_MODEL, (), {})
    return tracer.create_node("call_function", store, (module, name, value), {})
