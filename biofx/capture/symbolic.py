"""The front end `"symbolic"`: symbolic tracing, with four differences from `torch.fx.symbolic_trace`.

- `Linear`, convolutions, `Bilinear` and embeddings are traced through, so that the weight becomes a `get_attr` node
  that feeds a functional operator. Their own forward runs, so padding modes, groups and missing biases come out as
  PyTorch means them. So are weights that `torch.nn.utils.prune` and the like compute (`reparametrized.py`).
- A constant that depends on `training` keeps following `.train()` and `.eval()` of the module that it is read from
  (`ModeConstant`).
- A module whose forward cannot be traced, or does what a graph does not hold, is an island: the smallest such module is
  called as it is, and so are modules that `torch.nn` calls in one piece, such as recurrent layers. Their Python reads
  the same weights as the graph (`biofx.model`). If it comes to that, the whole model is one island.
- The result keeps the module tree of the model: its classes, attributes, buffers and the order of its state.

With `"module"`, the whole model is one island from the start: all of its Python code stays.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Set
from functools import partial
from typing import Any

from torch import nn

from biofx.base.errors import ArgumentError
from biofx.base.isolation import split_inputs
from biofx.capture.captured_module import CapturedModule, captured
from biofx.capture.checking import Run, called_with, calls_of, disagreement, forward_of, parts_of
from biofx.capture.modes import trace_modes
from biofx.capture.reparametrized import TRACEABLE_HOOKS, detach_computed_attributes, taken_hooks
from biofx.capture.tracer import KeepWhole, MustBeNone
from biofx.capture.tracing import Trace, trace_whole
from biofx.model.fingerprint import fingerprint
from biofx.model.islands import ORIGINAL_HOOKS
from biofx.model.provenance import RECORD, Record
from biofx.weights.declared import declared

AS_ASKED = 'with frontend="module", the model keeps its Python forward'


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
    is_one_island = "" in trace.tracer.whole
    detach_computed_attributes(model)
    bio = captured(model, trace.graph, is_one_island=is_one_island)
    # If the model is one island, they run when it is called, and its weights are known inside of it.
    vars(bio)[ORIGINAL_HOOKS] = taken_hooks(bio) if is_one_island else taken_hooks(bio, TRACEABLE_HOOKS)
    for name, refusal in trace.tracer.refusals.items():
        bio.add_module(name, refusal.train(model.training))
    for name, constant in trace.constants.items():
        bio.register_buffer(name, constant, persistent=False)
    record = Record(model, fingerprint(bio), trace.constants)
    record.islands = trace.tracer.whole
    if not is_one_island:
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
