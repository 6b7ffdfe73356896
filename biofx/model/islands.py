"""Islands: the untraced submodules of a model.

An island is a submodule whose own Python forward is called from the graph, as one node. The model itself can be one
island; then its whole forward is that node.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from biofx.model.provenance import record_of

WHOLE_MODEL = "whole_model"  # the attribute by which a graph refers to the model that it belongs to
ORIGINAL_CLASS = "_biofx_class"  # where a model that is one island keeps its original class
PRESENT_FORWARD = "present_forward"  # where the generated class of a captured model keeps its forward
ORIGINAL_HOOKS = "_biofx_hooks"  # where a captured model keeps the hooks that compute a weight before forward

GUARD = "_biofx_guard"  # the attribute that holds the guard of a model whose graph was checked


def call_python(model: Any, args: Any, kwargs: Any) -> Any:
    """Run the Python forward of a model that is one island. One node in the graph."""
    tracer = next((value.tracer for value in (args, kwargs) if isinstance(value, fx.Proxy)), None)
    if tracer is not None:  # the graph is traced again, by any tracer: the call becomes a node again
        target = tracer.create_proxy("get_attr", WHOLE_MODEL, (), {})
        return tracer.create_proxy("call_function", call_python, (target, args, kwargs), {})
    return model.original_forward(*args, **dict(kwargs))  # fx.Interpreter gives an empty list where there are none


def island_graph(tracer: Any) -> fx.Graph:
    """Return the graph of a model that is one island: it passes all arguments on. `tracer` would trace it again."""
    graph = fx.Graph(tracer_cls=tracer)
    args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    module = graph.get_attr(WHOLE_MODEL)
    graph.output(graph.call_function(call_python, (module, args, kwargs)))
    return graph


def island_path(bio: nn.Module, node: fx.Node) -> str | None:
    """Return the path of the island that a node calls, empty for the model itself; None if it calls none."""
    if node.op == "call_module":
        return str(node.target) if node.target in record_of(bio).islands else None
    return "" if node.op == "call_function" and node.target is call_python else None


def describe_island(path: str) -> str:
    """Describe an island in a message, by its path."""
    return f"the untraced submodule {path}" if path else "the model, which is untraced"


def generated_class(model: nn.Module) -> Any:
    """Return the class that capture made for a model, from which users may have derived another."""
    return next(each for each in type(model).__mro__ if PRESENT_FORWARD in vars(each))


def is_one_island(model: nn.Module) -> bool:
    """Whether the graph of a model is a single call of its Python forward."""
    return ORIGINAL_CLASS in vars(model)
