"""Capture: from a module to a graph in which every weight is a node of its own.

The front end `"symbolic"` is symbolic tracing with four differences from `torch.fx.symbolic_trace`:

- `Linear`, convolutions, `Bilinear` and embeddings are traced through, so that the weight becomes a `get_attr` node
  that feeds a functional operator. Their own forward runs, so padding modes, groups and missing biases come out as
  PyTorch means them. So are weights that `torch.nn.utils.prune` and the like compute (`reparametrized.py`).
- A constant that depends on `training` keeps following `.train()` and `.eval()` of the module that it is read from
  (`ByMode`).
- A module whose forward cannot be traced, or does what a graph does not hold, is an island: the smallest such module is
  called as it is, and so are modules that `torch.nn` calls in one piece, such as recurrent layers. Their Python reads
  the same weights as the graph (`biofx.model`). If it comes to that, the whole model is one island.
- The result keeps the module tree of the model: its classes, attributes, buffers and the order of its state.

With `"module"`, the whole model is one island from the start: all of its Python code stays. For `"export"`, see
`exported`.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Set
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from biofx.capture.captured_module import RESERVED, CapturedModule, captured
from biofx.capture.checking import Run, called_with, calls_of, disagreement, forward_of, parts_of
from biofx.capture.modes import trace_modes
from biofx.capture.reparametrized import TRACEABLE_HOOKS, detach_computed_attributes, taken_hooks
from biofx.capture.tracer import KeepWhole, MustBeNone
from biofx.capture.tracing import Trace, trace_whole
from biofx.errors import ArgumentError
from biofx.fingerprint import fingerprint
from biofx.islands import ORIGINAL_HOOKS
from biofx.provenance import RECORD, Record
from biofx.trial import split_inputs
from biofx.weights.declared import declared

SHARDED = {"FSDPModule", "FullyShardedDataParallel"}  # by name: importing torch.distributed.fsdp takes long
AS_ASKED = 'with frontend="module", the model keeps its Python forward'


def check_module(model: Any) -> None:
    """Refuse what is no module, or wraps one.

    Raises:
        ArgumentError: says what to give instead.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ArgumentError(f"model is the class {model.__name__}; transform an instance, {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got an instance of {type(model).__name__}")
    if "_orig_mod" in model._modules:
        raise ArgumentError("model comes from torch.compile; transform the original module, then compile the result")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ArgumentError(f"model is wrapped in {type(model).__name__}; transform model.module, then wrap the result")


def check(model: Any) -> None:
    """Refuse what cannot be captured, before anything is copied.

    Raises:
        ArgumentError: not a module, a wrapped or sharded module, one without Python, one whose parameters have no
            values yet, or one with an attribute that the result needs for itself.
    """
    check_module(model)
    for path, module in model.named_modules():
        where = path or "model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ArgumentError(
                f"{where} is a TorchScript module, which has no Python forward; use the original module"
            )
        if not SHARDED.isdisjoint(cls.__name__ for cls in type(module).__mro__):
            raise ArgumentError(
                f"{where} is sharded (FSDP); transform the model before that, then shard the result. "
                "There, what passes do in forward and backward works; rules at optimizer.step() need whole weights"
            )
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


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    synapses: Collection[str] | None = None,
    run: Run | None = None,
) -> CapturedModule:
    """Trace what can be traced of a model into a graph module that takes over its module tree.

    Args:
        model: a checked model (see `check`); its submodules become those of the result.
        example_inputs: arguments of forward. An argument whose default is None, and which they do not contain, is None
            for the graph: it takes the path without it, and says so to a caller who passes it.
        synapses: names of the parameters that are synapses; None: those of which the classes of modules say so.
        run: runs the model on inputs on which its graph has to compute what its Python does. Modules of which that does
            not hold become islands.

    Returns:
        A graph module with the class, tree, state, mode, attributes and hooks of the model.

    Raises:
        CaptureError: the class of the model does something that the result cannot inherit.
    """
    trace = _trace_what_can_be(model, _absent(model, example_inputs), _ids(model, synapses), run)
    return _assembled(model, trace)


def capture_whole(model: nn.Module) -> CapturedModule:
    """A graph module in which the whole model is one island; see `capture`."""
    return _assembled(model, trace_whole(AS_ASKED))


def _ids(model: nn.Module, synapses: Collection[str] | None) -> Set[int]:
    chosen = declared(model)[0] if synapses is None else synapses
    return {id(parameter) for name, parameter in model.named_parameters() if name in chosen}


def _assembled(model: nn.Module, trace: Trace) -> CapturedModule:
    is_whole = "" in trace.tracer.whole
    detach_computed_attributes(model)
    bio = captured(model, trace.graph, is_whole=is_whole)
    # If the model is one island, they run when it is called, and its weights are known inside of it.
    vars(bio)[ORIGINAL_HOOKS] = taken_hooks(bio) if is_whole else taken_hooks(bio, TRACEABLE_HOOKS)
    for name, refusal in trace.tracer.refusals.items():
        bio.add_module(name, refusal.train(model.training))
    for name, constant in trace.constants.items():
        bio.register_buffer(name, constant, persistent=False)
    record = Record(model, fingerprint(bio), trace.constants)
    record.islands = trace.tracer.whole
    if not is_whole:
        record.traced = ("", *dict.fromkeys(what for _, kind, what in trace.tracer.steps if kind == "enter"))
    vars(bio)[RECORD] = record
    return bio


def _absent(model: nn.Module, example_inputs: Any) -> set[str]:
    return _absent_of(model, *split_inputs(example_inputs))


def _absent_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """The optional arguments that a call does not give."""
    signature = inspect.signature(type(model).forward)
    try:
        given = signature.bind_partial(model, *args, **kwargs).arguments
    except TypeError as error:
        raise ArgumentError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error
    optional = {name for name, parameter in signature.parameters.items() if parameter.default is None}
    refused = {child.argument for child in model.children() if isinstance(child, MustBeNone)}  # captured before
    return {name for name in optional - refused if given.get(name) is None}


def _trace_what_can_be(
    model: nn.Module, absent: Collection[str], synapses: Set[int], run: Run | None, whole: dict[str, str] | None = None
) -> Trace:
    """Trace with those modules as islands that turn out not to fit into a graph; if need be, the model itself.

    Args:
        model: the model.
        absent: optional arguments that are None.
        synapses: ids of the parameters that get chains.
        run: runs the model on inputs on which graph and Python have to agree; None: nobody knows any.
        whole: modules that are called as they are, each with the reason.
    """
    whole = dict(whole or {})
    children = {module: set(module._modules) for module in model.modules()}
    while True:
        try:
            trace = trace_modes(model, absent, whole, synapses)
            found = None if run is None else _disagreement(model, trace, run)
            if found is None:
                return trace
            raise KeepWhole(_differing(model, trace, run, found, synapses))
        except KeepWhole as error:
            _drop_stand_ins(children)
            for path, reason in error.reasons.items():
                while path in whole:  # something outside of it made it do that
                    path = path.rpartition(".")[0]
                if not path:
                    return trace_whole(reason)
                whole = {inner: why for inner, why in whole.items() if not inner.startswith(f"{path}.")}
                whole[path] = reason


def _differing(model: nn.Module, trace: Trace, run: Run | None, found: str, synapses: Set[int]) -> dict[str, str]:
    """The smallest modules whose graphs differ from their Python, each with the difference; if none does, the model."""
    assert run is not None
    traced = dict.fromkeys(what for _, kind, what in trace.tracer.steps if kind == "enter")
    given = calls_of(model, iter(traced), run)
    result: dict[str, str] = {}
    for path in reversed(traced):  # inner modules come after those around them
        if path not in given or any(inner.startswith(f"{path}.") for inner in result):
            continue
        module, (args, kwargs) = model.get_submodule(path), given[path]
        children = {child: set(child._modules) for child in module.modules()}
        inside = {inner.removeprefix(f"{path}."): why for inner, why in trace.tracer.whole.items()
                  if inner.startswith(f"{path}.")}  # fmt: skip
        try:
            alone = trace_modes(module, _absent_of(module, args, kwargs), inside, synapses)
            difference = _disagreement(module, alone, called_with(args, kwargs))
        except KeepWhole:
            continue
        finally:
            _drop_stand_ins(children)
        if difference is not None:
            result[path] = difference
    return result or {"": found}


def _disagreement(model: nn.Module, trace: Trace, run: Run) -> str | None:
    graph, by_mode = partial(forward_of, model, trace), bool(trace.tracer.reads)
    return disagreement(model, run, graph, by_mode=by_mode, parts=parts_of(trace))


def _drop_stand_ins(children: Mapping[nn.Module, Set[str]]) -> None:
    """Take from modules what a trace that is of no use gave to them."""
    for module, names in children.items():
        for name in module._modules.keys() - names:
            del module._modules[name]
