"""Attribute assignments: nodes that set an attribute of a module, such as an auxiliary loss that forward keeps."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from biofx.base.torch_internals import pytree
from biofx.model.islands import WHOLE_MODEL


@fx.node.has_side_effect
def assign_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of a module. One node in the graph."""
    tracer = next((leaf.tracer for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Proxy)), None)
    if tracer is None:
        setattr(module, name, value)
        return
    # The graph is traced again: the call becomes a node again.
    paths = {id(child): path for path, child in tracer.root.named_modules()}  # type: ignore[attr-defined]
    add_assignment(tracer, paths.get(id(module), ""), name, tracer.create_arg(value))


def add_assignment(tracer: fx.proxy.TracerBase | fx.Graph, path: str, name: str, value: Any) -> fx.Node:
    """Add a node that sets an attribute of the module at a path, to a value of nodes and constants."""
    module = tracer.create_node("get_attr", path or WHOLE_MODEL, (), {})
    return tracer.create_node("call_function", assign_attribute, (module, name, value), {})
