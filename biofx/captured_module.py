"""A GraphModule that is the whole model: tree, attributes, hooks and provenance stay through copies and pickling."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import reduce_graph_module

from biofx.provenance import RECORD

REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class CapturedModule(fx.GraphModule):
    """What `biofx.transform` and `biofx.fold` return.

    A plain `torch.fx.GraphModule` forgets when it is copied or pickled: `meta`, the hooks and the attributes of the
    root, which of its buffers are persistent, and the `meta` of nodes. This one does not.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        copied = _empty(type(self).__name__)
        memo[id(self)] = copied
        _fill(copied, copy.deepcopy(_attributes(self), memo), copy.deepcopy(self.graph))
        return copied

    def __copy__(self) -> CapturedModule:
        copied = _empty(type(self).__name__)
        shared = {name: copy.copy(value) for name, value in _attributes(self).items()}
        _fill(copied, shared, copy.deepcopy(self.graph))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        _, (_, imports) = super().__reduce__()
        origins = [node.meta.get(RECORD) for node in self.graph.nodes]
        return _unpickle, (type(self).__name__, _attributes(self), imports, origins)


def captured(model: nn.Module, graph: fx.Graph) -> CapturedModule:
    """A model with a graph for its forward: it shares the submodules, tensors and attributes of `model`."""
    module = _empty(type(model).__name__, graph._tracer_cls)
    attributes = {name: value for name, value in vars(model).items() if name not in vars(module)}
    attributes |= {name: copy.copy(getattr(model, name)) for name in (*REGISTRIES, *HOOKS)}
    _fill(module, attributes | {"training": model.training}, graph)
    return module


def _empty(class_name: str, tracer: type[fx.Tracer] | None = None) -> CapturedModule:
    return CapturedModule(nn.Module(), fx.Graph(tracer_cls=tracer), class_name)


def _attributes(module: fx.GraphModule) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name != "_graph"}


def _fill(module: CapturedModule, attributes: dict[str, Any], graph: fx.Graph) -> None:
    vars(module).update(attributes)
    module.graph = graph


def _unpickle(class_name: str, attributes: dict[str, Any], imports: str, origins: list[Any]) -> CapturedModule:
    # Code is pickled, not the graph; tracing it again yields the same nodes in the same order, without their meta.
    traced = reduce_graph_module(dict(attributes), imports)
    assert isinstance(traced, fx.GraphModule)
    graph = traced.graph
    for node, origin in zip(graph.nodes, origins, strict=True):
        if origin is not None:
            node.meta[RECORD] = origin
    module = _empty(class_name)
    _fill(module, attributes, graph)
    return module
