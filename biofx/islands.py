"""Islands: modules whose own Python forward is called from the graph, with their weights rewritten inside.

In the graph, an island is one call of `call_island`. It gets the ends of the chains of the weights inside it, and runs
the module while each of these weights reads as the end of its chain (`members.py`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from biofx.analysis.recorder import unrecorded
from biofx.errors import CaptureError
from biofx.members import Place, effective_weights, is_lost, present, present_weights

WHOLE = "whole_model"  # what the graph of a model that is one island reads: the model itself
ORIGINAL_CLASS = "_biofx_class"  # where such a model keeps the class whose forward it runs
ORIGINAL_HOOKS = "_biofx_hooks"  # where it keeps the hooks that compute a weight before that forward

_modes: weakref.WeakKeyDictionary[nn.Module, set[bool]] = weakref.WeakKeyDictionary()  # in which an island has run


def call_island(module: Any, weights: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
    """Run the Python forward of a module on given weights; one node in the graph.

    Args:
        module: the module, or a model that is one island.
        weights: the tensors that the operators inside receive, by the names of the parameters in the module.
        args: positional arguments of its forward.
        kwargs: keyword arguments.

    Raises:
        CaptureError: forward changes one of the weights in place, which would be forgotten.
    """
    if any(isinstance(value, fx.Proxy) for value in (*weights.values(), args, kwargs)):
        return _node(module, weights, args, kwargs)
    values: dict[Place, Any] = {(id(module), ""): True}
    for name, weight in weights.items():
        path, _, key = name.rpartition(".")
        values[id(module.get_submodule(path)), key] = weight
    with no_lost_changes(module, weights), present_weights(values):
        return module.original_forward(*args, **kwargs) if is_whole(module) else module(*args, **kwargs)


def run_python(bio: Any, args: Any, kwargs: Any) -> Any:
    """Run the Python forward of a transformed model on its effective weights, instead of its graph.

    Raises:
        CaptureError: forward changes one of the weights in place, which would be forgotten.
    """
    if is_running(bio):
        return bio.original_forward(*args, **kwargs)
    weights, values = effective_weights(bio)
    with no_lost_changes(bio, weights), present_weights({**values, (id(bio), ""): True}):
        return bio.original_forward(*args, **kwargs)


@contextlib.contextmanager
def no_lost_changes(module: Any, weights: Mapping[str, Any]) -> Iterator[None]:
    """Refuse that Python changes weights that are computed, in the block."""
    copies, has_failed = _copies(module, weights), True
    try:
        yield
        has_failed = False
    finally:
        _refuse_lost_changes(module, weights, copies, has_failed)


def _copies(module: nn.Module, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """What weights are, in the first run of an island in its mode: a forward that changes some does so every time."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack():
        return {}
    modes = _modes.setdefault(module, set())
    if module.training in modes:
        return {}
    with unrecorded():
        copies = {name: w.detach().clone() for name, w in weights.items() if type(w) is Tensor}
    if copies:  # else no weight is computed, and no change is lost
        modes.add(module.training)
    return copies


def _refuse_lost_changes(
    module: nn.Module, weights: Mapping[str, Any], copies: Mapping[str, Tensor], has_failed: bool
) -> None:
    """Refuse a forward that changes weights that are computed; PyTorch may have refused it in its own words."""
    for name, copy in copies.items():
        path, _, key = name.rpartition(".")
        stored = copy if has_failed else vars(module.get_submodule(path))["_parameters"][key]
        with unrecorded():
            is_forgotten = is_lost(weights[name], copy, stored)
        if is_forgotten:
            _modes.pop(module)
            raise CaptureError(
                f"the forward of {type(module).__name__} changes {name}, and such a change would be lost, "
                "as the weight is computed from its synapses at every call; transform the model with "
                f"exclude=['*{name}']"
            )


def _node(module: nn.Module, weights: Mapping[str, Any], args: Any, kwargs: Any) -> fx.Proxy:
    """The call under a tracer, whichever: it stays one node."""
    tracer = next(value for value in (*weights.values(), args, kwargs) if isinstance(value, fx.Proxy)).tracer
    path = WHOLE if is_whole(module) else tracer.path_of_module(module)  # type: ignore[attr-defined]
    target = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_function", call_island, (target, dict(weights), args, kwargs), {})


def is_island(node: fx.Node) -> bool:
    """Whether a node calls an island."""
    return node.op == "call_function" and node.target is call_island


def island_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The calls of islands, in graph order."""
    return (node for node in graph.nodes if is_island(node))


def island_path(node: fx.Node) -> str:
    """Path of the module that a node calls as an island; empty for the model itself."""
    module = node.args[0]
    assert isinstance(module, fx.Node)
    return "" if module.target == WHOLE else str(module.target)


def island_weights(node: fx.Node) -> dict[str, fx.Node]:
    """The nodes that compute the weights of an island, by the names of the parameters in it."""
    return dict(node.args[1])  # type: ignore[arg-type]


def described(path: str) -> str:
    """An island in words, by its path."""
    return f"the island {path}" if path else "the model, which is one island"


def is_whole(model: nn.Module) -> bool:
    """Whether a model is one island."""
    return ORIGINAL_CLASS in vars(model)


def is_running(island: nn.Module) -> bool:
    """Whether an island runs in this thread."""
    return (id(island), "") in present.values
