"""A GraphModule that is the whole model: its class, tree, attributes, hooks and provenance stay through all copies."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import reduce_graph_module
from torch.nn.modules.module import _WrappedHook

from biofx.errors import ArgumentError, CaptureError
from biofx.provenance import RECORD, Record, record_of

REGISTRIES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Their methods go through all children, and a captured model has more of them: the record, constants of each mode.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_OVERRIDES = ("train", "state_dict", "load_state_dict", "get_extra_state", "set_extra_state", "_apply")

_OF_MODULES = frozenset(vars(nn.Module()))
_OF_GRAPH_MODULES = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - _OF_MODULES
RESERVED = frozenset(
    name for name in {*dir(fx.GraphModule), *_OF_GRAPH_MODULES} - {*dir(nn.Module)} if not name.startswith("__")
)
"""What a GraphModule has and a module has not: names that a model cannot use for itself."""


class CapturedModule(fx.GraphModule):
    """What `biofx.transform` and `biofx.fold` return.

    An instance is also one of the model's class: methods, properties and overrides such as `train` stay; only forward
    is the graph's. A model that is a container, such as `torch.nn.Sequential`, is no container any more.

    A plain `torch.fx.GraphModule` forgets when it is copied or pickled: `meta`, the hooks and the attributes of the
    root, which of its buffers are persistent, and the `meta` of nodes. This one does not.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        copied = _empty(type(self).__name__, _model_class(self))
        memo[id(self)] = copied
        _fill(copied, copy.deepcopy(_attributes(self), memo), copy.deepcopy(self.graph))
        return copied

    def __copy__(self) -> CapturedModule:
        copied = _empty(type(self).__name__, _model_class(self))
        shared = {name: copy.copy(value) for name, value in _attributes(self).items()}
        _fill(copied, shared, copy.deepcopy(self.graph))
        return copied

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a checkpoint of this model.

        Raises:
            ArgumentError: `strict`, and other passes made the model of the checkpoint; names the first difference.
        """
        if strict and isinstance(self._modules.get(RECORD), Record):
            _check_pipeline(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def __reduce__(self) -> tuple[Any, ...]:
        _, (_, imports) = super().__reduce__()
        return _empty, (type(self).__name__, _model_class(self)), (_attributes(self), imports, *_origins(self.graph))

    def __setstate__(self, state: tuple[dict[str, Any], str, dict[str, Any], list[Any]]) -> None:
        # Code is pickled, not the graph; tracing it again yields the same calls in the same order, without their meta.
        attributes, imports, reads, calls = state
        traced = reduce_graph_module(dict(attributes), imports)
        assert isinstance(traced, fx.GraphModule)
        others = [node for node in traced.graph.nodes if node.op != "get_attr"]
        origins = [(node, reads.get(str(node.target))) for node in traced.graph.find_nodes(op="get_attr")]
        for node, origin in [*origins, *zip(others, calls, strict=True)]:
            if origin is not None:
                node.meta[RECORD] = origin
        _fill(self, attributes, traced.graph)


def _check_pipeline(bio: nn.Module, state_dict: Mapping[str, Any]) -> None:
    record = record_of(bio)
    own = dict([*bio.named_parameters(remove_duplicate=False), *bio.named_buffers(remove_duplicate=False)])

    def refuse(difference: str) -> ArgumentError:
        return ArgumentError(f"the checkpoint is of another pipeline than {record.extra_repr()}: {difference}")

    for name, by in record.state.items():
        if name not in state_dict:
            raise refuse(f"it has no {name}, which {by} keeps here")
    for name in record.original:
        if name in state_dict and state_dict[name].shape != own[name].shape:
            raise refuse(f"{name} is {tuple(state_dict[name].shape)} in it and {tuple(own[name].shape)} here")
    for name in state_dict:
        if name not in own and any(name.startswith(f"{parameter}_") for parameter in record.original):
            raise refuse(f"it has {name}, which no pass keeps here")


def captured(model: nn.Module, graph: fx.Graph) -> CapturedModule:
    """A model with a graph for its forward: it shares the submodules, tensors and attributes of `model`.

    Raises:
        CaptureError: the class of the model does something that the result cannot inherit.
    """
    module = _empty(type(model).__name__, _model_class(model), graph._tracer_cls)
    kept = {name: value for name, value in vars(model).items() if name not in _OF_GRAPH_MODULES}
    _fill(module, {name: copy.copy(value) if name in _OF_MODULES else value for name, value in kept.items()}, graph)
    for owner in module.modules():
        for registry in (getattr(owner, name) for name in REGISTRIES if name.endswith("_hooks")):
            registry.update({key: _bound_to(module, model, hook) for key, hook in registry.items()})
    return module


def _bound_to(module: nn.Module, model: nn.Module, hook: Any) -> Any:
    """A hook of `model` that acts on `module` instead."""
    if isinstance(hook, _WrappedHook):
        return _WrappedHook(_bound_to(module, model, hook.hook), module if hook.with_module else None)
    if isinstance(hook, MethodType) and hook.__self__ is model:
        return MethodType(hook.__func__, module)
    return hook


def _model_class(model: nn.Module) -> type[nn.Module]:
    """The class whose methods a captured model has."""
    cls = type(model)
    if isinstance(model, fx.GraphModule):
        cls = cls.__mro__[cls.__mro__.index(fx.GraphModule) + 1]
    if not issubclass(cls, _CONTAINERS):
        return cls
    lost = [name for name in _OVERRIDES if getattr(cls, name) is not getattr(nn.Module, name)]
    if lost:
        raise CaptureError(
            f"{cls.__name__} is a container with a {lost[0]} of its own, and a captured model is no container; "
            "make it an attribute of a torch.nn.Module that has this method"
        )
    return nn.Module


def _empty(name: str, model_class: type[nn.Module], tracer: type[fx.Tracer] | None = None) -> CapturedModule:
    try:
        cls: type[CapturedModule] = type(name, (CapturedModule, model_class), {})
    except TypeError as error:
        raise CaptureError(
            f"{model_class.__name__} does not allow subclasses, and a captured model is one: {error}; "
            "make it an attribute of a plain torch.nn.Module and transform that"
        ) from error
    module = cls.__new__(cls)  # without the constructor, which would run the one of the model's class
    type(module).__name__ = name
    vars(module).update(vars(fx.GraphModule(nn.Module(), fx.Graph(tracer_cls=tracer))))
    return module


def _attributes(module: fx.GraphModule) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name != "_graph"}


def _fill(module: CapturedModule, attributes: dict[str, Any], graph: fx.Graph) -> None:
    vars(module).update(attributes)
    module.graph = graph


def _origins(graph: fx.Graph) -> tuple[dict[str, Any], list[Any]]:
    """Where nodes come from: those that read by what they read, since only the others are traced in the same order."""
    reads = {str(node.target): node.meta.get(RECORD) for node in graph.find_nodes(op="get_attr")}
    return reads, [node.meta.get(RECORD) for node in graph.nodes if node.op != "get_attr"]
