"""Tracing: run a forward once and record its graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from biofx.base.torch_internals import pytree
from biofx.capture.assignments import add_assignment
from biofx.capture.explanation import explain
from biofx.capture.monitoring import monitored
from biofx.capture.reparametrized import computed_names
from biofx.capture.tracer import NotTraceable, Tracer, merge_reads
from biofx.model.islands import island_graph

if TYPE_CHECKING:
    from biofx.base.isolation import Change


@dataclass(frozen=True)
class Trace:
    """The result of one trace.

    Attributes:
        graph: the graph.
        constants: tensors that forward created, by the name under which the graph reads them.
        tracer: the tracer, with its findings.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    tracer: Tracer

    @property
    def traced(self) -> list[str]:
        """The paths of the submodules whose forward was traced, in the order of their first calls."""
        return list(dict.fromkeys(what for _, kind, what in self.tracer.steps if kind == "enter"))


def trace(
    model: nn.Module,
    absent: Collection[str],
    islands: dict[str, str],
    synapses: Set[int],
    evaluating: Collection[nn.Module],
) -> Trace:
    """Trace a model, with some modules in evaluation mode and the others in training mode.

    Args:
        model: the model; it does not change.
        absent: optional arguments that are None.
        islands: paths of modules that are not traced through, each with the reason.
        synapses: ids of the parameters that get chains.
        evaluating: the modules in evaluation mode.

    Raises:
        NotTraceable: a module does what a graph cannot represent.
    """
    first = Tracer(absent, islands, synapses)
    with _in_modes(model, set(evaluating)), monitored(model, first) as before:
        result = _run_once(model, first)
        computed, changed = computed_names(model), [*before.changes()]
        by_hooks = _values(model, [change for change in changed if change[:2] in computed])
        changes = [change for change in changed if change[:2] not in computed]
        if changes:
            _add_assignments(model, result, changes, Tracer(absent, islands, synapses))
        _keep(result, by_hooks)
    return result


@contextmanager
def _in_modes(model: nn.Module, evaluating: Collection[nn.Module]) -> Iterator[None]:
    """Put some modules into evaluation mode and the others into training mode while the block runs."""
    modes = [(vars(module), module.training, module not in evaluating) for module in model.modules()]
    for attributes, _, mode in modes:
        attributes["training"] = mode
    try:
        yield
    finally:
        for attributes, mode, _ in modes:
            attributes["training"] = mode


def _run_once(model: nn.Module, tracer: Tracer) -> Trace:
    own = set(vars(model))
    try:
        graph = tracer.trace(model)
    except (Exception, NotTraceable) as error:
        reasons = error.reasons if isinstance(error, NotTraceable) else {"": explain(error)}
        raise NotTraceable(tracer.failures or reasons) from error
    if tracer.failures:
        raise NotTraceable(tracer.failures)
    made = {name: vars(model).pop(name) for name in vars(model).keys() - own if name.startswith("_tensor_constant")}
    read = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr"))
    return Trace(graph, {name: made[name] for name in read if name in made}, tracer)


def _add_assignments(model: nn.Module, first: Trace, changes: Sequence[Change], again: Tracer) -> None:
    """Add the attribute assignments of a forward to its graph.

    A graph can only represent attributes that forward writes but never reads. So forward is traced again after the
    first trace wrote them: if it reads one, the second graph differs, or the trace fails.
    """
    reasons = {c.path: f"its forward changes the attribute {c.name}, which a graph cannot represent" for c in changes}
    lines = lines_of(first.graph)
    try:
        with monitored(model, again):
            second = _run_once(model, again)
            second.graph.lint()
        # A forward that computes with an attribute gets a proxy of the first trace, and adds nodes to the first graph.
        if not all(c.is_assigned for c in changes) or not is_same(first, second) or lines_of(first.graph) != lines:
            raise NotTraceable(reasons)
        values = _values(model, changes)
        if not all(any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(each)) for each in values.values()):
            raise NotTraceable(reasons)  # a constant, such as a flag or a counter
        _keep(first, values)
    except (Exception, NotTraceable) as error:
        raise NotTraceable(reasons) from error


def _values(model: nn.Module, changes: Sequence[Change]) -> dict[tuple[str, str], Any]:
    """The values of changed attributes, by the path of the module and the name."""
    return {(path, name): getattr(model.get_submodule(path), name) for path, name, _ in changes}


def _keep(trace: Trace, values: Mapping[tuple[str, str], Any]) -> None:
    """Let a graph assign values of its trace to attributes, given by the path of the module and the name."""
    with trace.graph.inserting_before(trace.graph.output_node()):
        for (path, name), value in values.items():
            node = add_assignment(trace.tracer, path, name, trace.tracer.create_arg(value))
            trace.tracer.steps.append((path, "node", node))
    merge_reads(trace.graph)


def lines_of(graph: fx.Graph) -> list[str | None]:
    """A line of text for each node; the text of a graph takes time that grows with its square."""
    return [node.format_node() for node in graph.nodes]


def is_same(first: Trace, second: Trace) -> bool:
    """Whether two traces have the same graph and constants."""
    constants = zip(first.constants.values(), second.constants.values(), strict=False)
    return (
        lines_of(first.graph) == lines_of(second.graph)
        and first.constants.keys() == second.constants.keys()
        and all(torch.equal(a, b) for a, b in constants)
    )


def trace_as_island(reason: str) -> Trace:
    """Return a trace in which the model is one island: no forward runs."""
    return Trace(island_graph(Tracer), {}, Tracer(islands={"": reason}))
