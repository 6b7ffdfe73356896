"""Tracing: one run of a forward that becomes a graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from biofx.capture.explanation import describe
from biofx.capture.reparametrized import computed_names
from biofx.capture.stores import add_store
from biofx.capture.tracer import KeepWhole, Tracer, merge_reads
from biofx.capture.watching import watched
from biofx.model.islands import WHOLE_MODEL, call_python

if TYPE_CHECKING:
    from biofx.base.isolation import Change


@dataclass(frozen=True)
class Trace:
    """One run of forward: its graph, the constants that it made, and what the tracer noted."""

    graph: fx.Graph
    constants: dict[str, Any]
    tracer: Tracer


def trace(
    model: nn.Module,
    absent: Collection[str],
    whole: dict[str, str],
    synapses: Set[int],
    evaluating: Collection[nn.Module],
) -> Trace:
    """Run forward once, with some modules in evaluation mode and the others in training mode.

    Args:
        model: the model; nothing in it changes.
        absent: optional arguments that are None.
        whole: modules to call as they are, each with the reason.
        synapses: ids of the parameters that get chains.
        evaluating: the modules in evaluation mode.

    Raises:
        KeepWhole: a module does what a graph does not hold.
    """
    first = Tracer(absent, whole, synapses)
    with _in_modes(model, set(evaluating)), watched(model, first) as before:
        result = _traced(model, first)
        computed = computed_names(model)
        changes = [change for change in before.changes() if change[:2] not in computed]
        if changes:
            _add_stores(model, result, changes, Tracer(absent, whole, synapses))
    return result


@contextmanager
def _in_modes(model: nn.Module, evaluating: Collection[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode, and the others into training mode, for a while."""
    modes = [(vars(module), module.training, module not in evaluating) for module in model.modules()]
    for attributes, _, mode in modes:
        attributes["training"] = mode
    try:
        yield
    finally:
        for attributes, mode, _ in modes:
            attributes["training"] = mode


def _traced(model: nn.Module, tracer: Tracer) -> Trace:
    own = set(vars(model))
    try:
        graph = tracer.trace(model)
    except (Exception, KeepWhole) as error:
        reasons = error.reasons if isinstance(error, KeepWhole) else {"": describe(error)}
        raise KeepWhole(tracer.found or reasons) from error
    if tracer.found:
        raise KeepWhole(tracer.found)
    made = {name: vars(model).pop(name) for name in vars(model).keys() - own if name.startswith("_tensor_constant")}
    read = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr"))
    return Trace(graph, {name: made[name] for name in read if name in made}, tracer)


def _add_stores(model: nn.Module, first: Trace, changes: Sequence[Change], again: Tracer) -> None:
    """Let a graph store what forward stores, which is all that it does with it if a second run has the same graph."""
    reasons = {c.path: f"its forward changes the attribute {c.name}, which a graph does not do" for c in changes}
    text, output = str(first.graph), first.graph.output_node()
    try:
        with watched(model, again):
            second = _traced(model, again)
            second.graph.lint()
        if not all(c.is_assigned for c in changes) or not is_same(first, second) or str(first.graph) != text:
            raise KeepWhole(reasons)
        with first.graph.inserting_before(output):
            for change in changes:
                value = getattr(model.get_submodule(change.path), change.name)
                if not any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(value)):
                    raise KeepWhole(reasons)  # a constant, which is a flag for somebody
                node = add_store(first.tracer, change.path, change.name, first.tracer.create_arg(value))
                first.tracer.steps.append((change.path, "node", node))
        merge_reads(first.graph)
    except (Exception, KeepWhole) as error:
        raise KeepWhole(reasons) from error


def is_same(first: Trace, second: Trace) -> bool:
    """Whether two runs have the same graph."""
    constants = zip(first.constants.values(), second.constants.values(), strict=False)
    return (
        str(first.graph) == str(second.graph)
        and first.constants.keys() == second.constants.keys()
        and all(torch.equal(a, b) for a, b in constants)
    )


def trace_whole(reason: str) -> Trace:
    """A graph in which the model is one island: it runs no forward, and takes all arguments as they come."""
    graph = fx.Graph(tracer_cls=Tracer)
    args, kwargs = graph.placeholder("*args"), graph.placeholder("**kwargs")
    module = graph.get_attr(WHOLE_MODEL)
    graph.output(graph.call_function(call_python, (module, args, kwargs)))
    return Trace(graph, {}, Tracer(whole={"": reason}))
