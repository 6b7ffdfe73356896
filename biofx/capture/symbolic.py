"""The front end `"symbolic"`: symbolic tracing, with four differences from `torch.fx.symbolic_trace`.

- `Linear`, convolutions, `Bilinear` and embeddings are not leaf modules: their weight becomes a `get_attr` node that
  feeds a functional operator. Their own forward is traced, so padding modes, groups and missing biases are handled
  as in PyTorch. Weights that `torch.nn.utils.prune` and the like compute are traced as well (`reparametrized.py`).
- A constant that depends on `training` follows `.train()` and `.eval()` of the module that it was read from
  (`ModeSelect`).
- A module whose forward cannot be traced, or does what a graph cannot represent, is an island: an untraced submodule,
  as small as possible, whose Python forward is called. So are leaf modules with weights, such as recurrent layers.
  Islands read the same effective weights as the graph (`biofx.model`). In the worst case, the model is one island.
- The result keeps the module tree of the model: its classes, attributes, buffers and the order of its state.

The front end `"module"` does not trace: the model is one island, and all of its Python code stays.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from biofx.analysis.understanding import call
from biofx.base.isolation import split_inputs
from biofx.capture.captured_module import CapturedModule, captured
from biofx.capture.equivalence import Run, compared_submodules, disagreement, first_calls, forward_of
from biofx.capture.modes import trace_modes
from biofx.capture.outside_variables import OutsideVariables
from biofx.capture.reparametrized import TRACEABLE_HOOKS, detach_computed_attributes, pop_computing_hooks
from biofx.capture.tracer import MustBeNone, NotTraceable, memory_key
from biofx.capture.tracing import Trace, trace_as_island
from biofx.model.chain import attribute
from biofx.model.islands import ORIGINAL_HOOKS, WHOLE_MODEL
from biofx.model.provenance import record_of
from biofx.weights.declared import declared

NOT_TRACED = 'with frontend="module", the model keeps its Python forward'


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    synapses: Collection[str] | None = None,
    run: Run | None = None,
) -> CapturedModule:
    """Trace as much of a model as possible into a graph module that takes over its module tree.

    Args:
        model: a checked model (see `check_model`); its submodules become those of the result.
        example_inputs: arguments of forward. An argument that they do not contain, and whose default is None, is traced
            as None; the graph raises if a caller passes it.
        synapses: names of the parameters that are weights; None: those that the classes of modules declare.
        run: runs the model on some inputs. A module whose graph differs from its Python there becomes an island.

    Returns:
        A graph module with the class, tree, state, mode, attributes and hooks of the model.

    Raises:
        CaptureError: the class of the model does something that the result cannot inherit.
    """
    trace = _trace(model, _absent(model, *split_inputs(example_inputs)), _ids(model, synapses), run)
    return _assembled(model, trace)


def capture_as_island(model: nn.Module) -> CapturedModule:
    """Return a graph module in which the model is one island; see `capture`."""
    return _assembled(model, trace_as_island(NOT_TRACED))


def _ids(model: nn.Module, synapses: Collection[str] | None) -> Set[int]:
    chosen = declared(model)[0] if synapses is None else synapses
    return {id(parameter) for name, parameter in model.named_parameters() if name in chosen}


def _assembled(model: nn.Module, trace: Trace) -> CapturedModule:
    is_one_island = "" in trace.tracer.islands
    _clone_constants(trace)
    detach_computed_attributes(model)
    bio = captured(model, trace.graph, trace.constants, is_one_island=is_one_island)
    # The graph computes what traceable hooks compute, so they must not run when the model is called; `original_forward`
    # runs them. If the model is one island, it runs all of them, inside of the weight cache.
    vars(bio)[ORIGINAL_HOOKS] = pop_computing_hooks(bio) if is_one_island else pop_computing_hooks(bio, TRACEABLE_HOOKS)
    for name, refusal in trace.tracer.refusals.items():
        bio.add_module(name, refusal.train(model.training))
    record = record_of(bio)
    record.islands = trace.tracer.islands
    if not is_one_island:
        record.traced = ("", *trace.traced)
        record.followed = tuple(_followed(model, trace))
    return bio


def _followed(model: nn.Module, trace: Trace) -> Iterator[str]:
    """The tensors in attributes of which the graph reads the present values, everywhere."""
    known = {WHOLE_MODEL, *trace.constants, *(name for name, _ in (*model.named_parameters(), *model.named_buffers()))}
    for name in dict.fromkeys(str(node.target) for node in trace.graph.find_nodes(op="get_attr")):
        value = None if name in known else attribute(model, name)
        if isinstance(value, Tensor) and memory_key(value) not in trace.tracer.computed:
            yield name


def _clone_constants(trace: Trace) -> None:
    """Clone the constants of forward in each call: a caller may write into what it gets."""
    for node in trace.graph.find_nodes(op="get_attr"):
        if node.target in trace.constants:
            with trace.graph.inserting_after(node):
                clone = trace.graph.call_method("clone", (node,))
            node.replace_all_uses_with(clone, delete_user_cb=lambda user, clone=clone: user is not clone)


def _absent(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Return the names of the optional arguments that a call does not pass."""
    signature = inspect.signature(type(model).forward)
    try:
        given = signature.bind_partial(model, *args, **kwargs).arguments
    except TypeError:  # a decorator takes other arguments
        return set()
    optional = {name for name, parameter in signature.parameters.items() if parameter.default is None}
    # A model that was captured before refuses these itself.
    refused = {child.argument for child in model.children() if isinstance(child, MustBeNone)}
    return {name for name in optional - refused if given.get(name) is None}


def _trace(model: nn.Module, absent: Collection[str], synapses: Set[int], run: Run | None) -> Trace:
    """Trace a model again and again, with the modules that could not be traced as islands.

    If something runs the model, graph and Python have to agree on that run.
    """
    islands: dict[str, str] = {}
    children = {module: set(module._modules) for module in model.modules()}
    outside = OutsideVariables(dict(model.named_modules()))
    while True:
        try:
            with ExitStack() as after:
                after.callback(outside.restore)
                trace = trace_modes(model, absent, islands, synapses)
                _refuse_effects(model, trace, outside)
            if run is None or (found := _disagreement(model, trace, run, outside.tensors)) is None:
                return trace
            raise NotTraceable(_differing(model, trace, run, found, synapses, outside.tensors))
        except NotTraceable as error:
            _remove_helpers(children)
            for path, reason in error.reasons.items():
                while path in islands:  # it already is one, so the cause is in a module around it
                    path = path.rpartition(".")[0]
                if not path:
                    return trace_as_island(reason)
                islands = {inner: why for inner, why in islands.items() if not inner.startswith(f"{path}.")}
                islands[path] = reason


def _refuse_effects(model: nn.Module, trace: Trace, outside: OutsideVariables) -> None:
    """Raise if forward changed a variable outside of the model, or drew from a random number generator there."""
    effect = outside.effect()
    if effect is None:
        return
    name, what = effect
    reading = [path for path in trace.traced if OutsideVariables({path: model.get_submodule(path)}).reads(name)]
    raise NotTraceable(dict.fromkeys(reading or [""], f"its forward {what}, which a graph cannot represent"))


def _differing(
    model: nn.Module, trace: Trace, run: Run, found: str, synapses: Set[int], outside: Sequence[Tensor]
) -> dict[str, str]:
    """Return the smallest modules whose graphs differ from their Python, with the differences; otherwise the model."""
    given = first_calls(model, iter(trace.traced), run)
    result: dict[str, str] = {}
    for path in reversed(trace.traced):  # inner modules come after those around them
        if path not in given or any(inner.startswith(f"{path}.") for inner in result):
            continue
        module, (args, kwargs) = model.get_submodule(path), given[path]
        children = {child: set(child._modules) for child in module.modules()}
        inside = {inner.removeprefix(f"{path}."): why for inner, why in trace.tracer.islands.items()
                  if inner.startswith(f"{path}.")}  # fmt: skip
        try:
            alone = trace_modes(module, _absent(module, args, kwargs), inside, synapses)
            difference = _disagreement(module, alone, call(args, kwargs), outside)
        except NotTraceable:
            continue
        finally:
            _remove_helpers(children)
        if difference is not None:
            result[path] = difference
    return result or {"": found}


def _disagreement(model: nn.Module, trace: Trace, run: Run, outside: Sequence[Tensor]) -> str | None:
    graph, by_mode = partial(forward_of, model, trace), bool(trace.tracer.reads)
    return disagreement(model, run, graph, None, by_mode, compared_submodules(trace), outside)


def _remove_helpers(children: Mapping[nn.Module, Set[str]]) -> None:
    """Remove the helper modules of a failed trace, given the names of the children before it."""
    for module, names in children.items():
        for name in module._modules.keys() - names:
            del module._modules[name]
