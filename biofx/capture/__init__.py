"""Capture: from a module to a graph in which every weight is a node of its own.

Symbolic tracing with four differences from `torch.fx.symbolic_trace`:

- `Linear`, convolutions, `Bilinear` and embeddings are traced through, so that the weight becomes a `get_attr` node
  that feeds a functional operator. Their own forward runs, so padding modes, groups and missing biases come out as
  PyTorch means them. So are weights that `torch.nn.utils.prune` and the like compute (`reparametrized.py`).
- A constant that depends on `training` keeps following `.train()` and `.eval()` of the module that it is read from
  (`ByMode`).
- A module whose forward does what a graph does not hold is called as it is (`KeepWhole`): another path in training than
  in evaluation, `torch.no_grad()`, random numbers that do not depend on the input.
- The result keeps the module tree of the model: its classes, attributes, buffers and the order of its state.
"""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from biofx.capture.captured_module import RESERVED, CapturedModule, captured
from biofx.capture.modes import trace_modes
from biofx.capture.reparametrized import detach_computed_attributes, drop_computing_hooks
from biofx.capture.tracer import KeepWhole, MustBeNone, Trace
from biofx.errors import ArgumentError, CaptureError
from biofx.provenance import RECORD, Record

MAKE_SUBMODULE = "Move that part of forward into a submodule of its own, which is then called as it is."
TRACE_WITHOUT_VALUES = (
    "Forward is traced once, without values: move what needs them into a function that is registered with "
    "torch.fx.wrap, which the graph calls as it is; an argument that is no tensor, such as a flag, belongs in a "
    "wrapper module that passes it."
)


def check(model: Any) -> None:
    """Refuse what cannot be captured, before anything is copied.

    Raises:
        ArgumentError: not a module, a wrapped module, one whose parameters have no values yet, or one with an attribute
            that the result needs for itself.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ArgumentError(f"model is the class {model.__name__}; transform an instance, {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got an instance of {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError("model is a TorchScript module, which has no Python forward; transform the original module")
    if "_orig_mod" in model._modules:
        raise ArgumentError("model comes from torch.compile; transform the original module, then compile the result")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ArgumentError(f"model is a {type(model).__name__}; transform model.module, then wrap the result")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ArgumentError(f"{name} is lazy and has no shape yet; call the model once, then transform it")
        if tensor.is_meta:
            raise ArgumentError(f"{name} is on the meta device and has no values; use model.to_empty(device=...) first")
    if "forward" in vars(model):
        raise ArgumentError("model.forward was replaced on the instance, and only its class can be traced; subclass it")
    _check_names(model)


def _check_names(model: nn.Module) -> None:
    own = {*vars(model), *dir(type(model)), *model._parameters, *model._buffers, *model._modules}
    taken = own & ({RECORD} if isinstance(model, fx.GraphModule) else {RECORD, *RESERVED})
    if taken:
        name = min(taken)
        user = "the record of biofx" if name == RECORD else "the torch.fx.GraphModule that the result is"
        raise ArgumentError(f'model has an attribute "{name}", a name that {user} needs; rename it')


def capture(model: nn.Module, example_inputs: Any = None) -> CapturedModule:
    """Trace a model into a graph module that takes over its module tree.

    Args:
        model: a checked model (see `check`); its submodules become those of the result.
        example_inputs: arguments of forward. An argument whose default is None, and which they do not contain, is None
            for the graph: it takes the path without it, and says so to a caller who passes it.

    Returns:
        A graph module with the class, tree, state, mode, attributes and hooks of the model.

    Raises:
        CaptureError: forward cannot be traced; names the module and the line.
    """
    trace = _trace_what_can_be(model, _absent(model, example_inputs))
    for node in trace.graph.find_nodes(op="get_attr"):
        if node.target in trace.constants:
            node.target = f"{RECORD}.{node.target}"
    detach_computed_attributes(model)
    bio = captured(model, trace.graph)
    drop_computing_hooks(bio)
    for name, refusal in trace.tracer.refusals.items():
        bio.add_module(name, refusal.train(model.training))
    record = Record([name for name, _ in model.named_parameters()], trace.constants)
    record.kept_whole = trace.tracer.whole
    bio.add_module(RECORD, record.train(model.training))
    return bio


def _absent(model: nn.Module, example_inputs: Any) -> set[str]:
    signature = inspect.signature(type(model).forward)
    args, kwargs = split_inputs(example_inputs)
    try:
        given = signature.bind_partial(model, *args, **kwargs).arguments
    except TypeError as error:
        raise ArgumentError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error
    optional = {name for name, parameter in signature.parameters.items() if parameter.default is None}
    refused = {child.argument for child in model.children() if isinstance(child, MustBeNone)}  # captured before
    return {name for name in optional - refused if given.get(name) is None}


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as arguments of a call: a tuple is positional, a dict by keyword, anything else is the first."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def _trace_what_can_be(model: nn.Module, absent: Collection[str]) -> Trace:
    """Trace with the modules kept whole that turn out not to fit into a graph, one more with each attempt."""
    whole: dict[str, str] = {}
    while True:
        try:
            return trace_modes(model, absent, whole)
        except KeepWhole as error:
            path = error.path
            while path in whole:  # something outside of it made it do that
                path = path.rpartition(".")[0]
            if not path:
                raise CaptureError(_explain(model, error)) from error
            whole = {inner: reason for inner, reason in whole.items() if not inner.startswith(f"{path}.")}
            whole[path] = error.reason
        except Exception as error:
            raise CaptureError(_explain(model, error)) from error


def _explain(model: nn.Module, error: Exception) -> str:
    """Say which module and which line stopped the trace, and what to do."""
    names = {module: name for name, module in model.named_modules()}
    owner, users_line, any_line = model, "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        package = frame.f_globals.get("__name__", "")
        if package.startswith(("torch.fx", "biofx")):
            continue
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, nn.Module) and candidate in names:
            owner = candidate
        file = frame.f_code.co_filename
        any_line = f"\n  at {file}:{number}: {linecache.getline(file, number).strip()}"
        if not package.startswith("torch"):
            users_line = any_line
    line = users_line or any_line
    if isinstance(error, KeepWhole):
        return f"{type(model).__name__} computes something else when traced: {error}{line}\n  {MAKE_SUBMODULE}"
    described = f'"{names[owner]}" ({type(owner).__name__})' if names[owner] else type(model).__name__
    return f"{described} cannot be traced: {error}{line}\n  {TRACE_WITHOUT_VALUES}"
