"""Islands: modules whose own Python forward is called from the graph; the model itself may be one."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from biofx.model.provenance import record_of

WHOLE = "whole_model"  # what the graph of a model that is one island reads: the model itself
ORIGINAL_CLASS = "_biofx_class"  # where such a model keeps the class whose forward it runs
ORIGINAL_HOOKS = "_biofx_hooks"  # where it keeps the hooks that compute a weight before that forward


def call_python(model: Any, args: Any, kwargs: Any) -> Any:
    """Run the Python forward of a model that is one island; one node in the graph."""
    tracer = next((value.tracer for value in (args, kwargs) if isinstance(value, fx.Proxy)), None)
    if tracer is not None:  # whichever it is, the call stays one node
        target = tracer.create_proxy("get_attr", WHOLE, (), {})
        return tracer.create_proxy("call_function", call_python, (target, args, kwargs), {})
    return model.original_forward(*args, **kwargs)


def island_path(bio: nn.Module, node: fx.Node) -> str | None:
    """Path of the module that a node calls as an island, empty for the model itself; None if it calls none."""
    if node.op == "call_module":
        return str(node.target) if node.target in record_of(bio).islands else None
    return "" if node.op == "call_function" and node.target is call_python else None


def described(path: str) -> str:
    """An island in words, by its path."""
    return f"the island {path}" if path else "the model, which is one island"


def is_whole(model: nn.Module) -> bool:
    """Whether a model is one island."""
    return ORIGINAL_CLASS in vars(model)
