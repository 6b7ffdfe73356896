"""Modes: merge traces in different modes into one graph that follows `.train()` and `.eval()`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Set
from typing import Any

import torch
from torch import fx, nn

from biofx.capture.tracer import HelperModule, NotTraceable, unused_name
from biofx.capture.tracing import Trace, is_same, trace
from biofx.model.chain import modules_around
from biofx.model.control_flow import ControlFlow


class ModeSelect(HelperModule, ControlFlow):
    """Returns one of two values, depending on the mode; without it, the graph would contain that of the trace."""

    depends_on_mode = True

    def forward(self, in_training: Any, in_evaluation: Any) -> Any:
        """Return the value for the current mode."""
        return in_training if self.training else in_evaluation


def trace_modes(model: nn.Module, absent: Collection[str], islands: dict[str, str], synapses: Set[int]) -> Trace:
    """Return one graph for all modes; it has a `ModeSelect` module where traces in different modes differ.

    A model has one mode for each module, so 2ⁿ combinations. Two traces find the constants that depend on a mode. To
    find the module whose mode each depends on, the modules that read their mode are numbered (`_ranks`), and one more
    trace for each bit puts the modules with that bit into evaluation mode: the traces in which a constant changes spell
    the number of its module.
    """
    training = _trace(model, absent, islands, synapses, evaluating=())
    if not training.tracer.reads:
        return training
    modules = dict(model.named_modules())
    evaluation = _trace(model, absent, islands, synapses, evaluating=modules.values())
    ranks = _ranks([training, evaluation])
    bits = range(max(ranks.values()).bit_length())
    halves = [[modules[path] for path, rank in ranks.items() if rank >> bit & 1] for bit in bits]
    mixed = [trace(model, absent, islands, synapses, half) for half in halves]
    traces = [training, evaluation, *mixed]
    for other in traces[1:]:
        _check_same_path(model, training, other)
    _follow_modes(model, traces, ranks)
    return training


def _trace(
    model: nn.Module,
    absent: Collection[str],
    islands: dict[str, str],
    synapses: Set[int],
    evaluating: Collection[nn.Module],
) -> Trace:
    """Trace with and without gradients, which has to give the same graph.

    A comparison of outputs may miss a forward that tests for gradients, if the difference does not reach the output.
    """
    with torch.enable_grad():
        first = trace(model, absent, islands, synapses, evaluating)
    with torch.no_grad():
        second = trace(model, absent, islands, synapses, evaluating)
    if not is_same(first, second):
        steps = itertools.zip_longest(_written(first), _written(second))
        path = next(((x or y)[0] for x, y in steps if x != y), "")
        raise NotTraceable({path: "its forward does something else without gradients"})
    return first


def _written(trace: Trace) -> Iterator[tuple[str, str]]:
    """The steps of a trace as text, each with the path of the module whose forward ran."""
    for module, kind, what in trace.tracer.steps:
        yield module, f"{kind} {what.format_node() if isinstance(what, fx.Node) else what}"


def _ranks(traces: list[Trace]) -> dict[str, int]:
    """Number the modules whose mode was read by their depth among them: nested modules need different numbers."""
    paths = {path for one in traces for read in one.tracer.reads.values() for path in read}
    around = {path: itertools.accumulate(path.split("."), "{}.{}".format) for path in paths if path}
    return {path: len(paths & {"", *around.get(path, ())} - {path}) for path in paths}


def _check_same_path(model: nn.Module, a: Trace, b: Trace) -> None:
    """Raise if two traces differ in more than constants; name the module where they diverge, and others of its class.

    Others of its class most likely diverge as well, so one failed trace finds them all.
    """
    positions = [{node: i for i, node in enumerate(one.graph.nodes)} for one in (a, b)]
    for x, y in itertools.zip_longest(_calls_of(a, positions[0]), _calls_of(b, positions[1])):
        if x != y:
            diverging = (x or y)[0]
            kind = type(model.get_submodule(diverging))
            same_class = [path for path in a.tracer.reads if diverging and type(model.get_submodule(path)) is kind]
            reason = "its forward takes another path in training than in evaluation mode"
            raise NotTraceable(dict.fromkeys([diverging, *same_class], reason))


def _calls_of(trace: Trace, positions: dict[fx.Node, int]) -> Iterator[tuple[Any, ...]]:
    """The steps of a trace without constants, in a form that can be compared between traces."""
    for module, kind, what in trace.tracer.steps:
        if kind != "node":
            yield module, kind, what if kind == "enter" else _skeleton(what, positions)
        elif what in positions:  # others were merged with an earlier read of the same attribute
            arguments = _skeleton((what.args, what.kwargs), positions)
            yield module, what.op, what.target, arguments


def _skeleton(value: Any, positions: dict[fx.Node, int]) -> Any:
    """Return the part of a value that has to be the same in all modes: the nodes in it, and where; None if none."""
    if isinstance(value, fx.Node):
        return value.target if value.op == "get_attr" else positions[value]
    parts = [_skeleton(part, positions) for part in _parts(value)]
    if not any(part is not None for part in parts):
        return None
    return _shape(value), parts


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    return list(value) if isinstance(value, tuple | list) else []


def _shape(value: Any) -> tuple[Any, ...]:
    return type(value), len(_parts(value)), *(value if isinstance(value, dict) else ())


def _rebuilt(value: Any, parts: list[Any]) -> Any:
    if isinstance(value, dict):
        return type(value)(zip(value, parts, strict=True))
    return slice(*parts) if isinstance(value, slice) else type(value)(parts)


def _follow_modes(model: nn.Module, traces: list[Trace], ranks: dict[str, int]) -> None:
    """Replace the constants in which traces differ by `ModeSelect` modules, in the first trace."""
    training = traces[0]

    def by_mode(node: fx.Node, values: tuple[Any, ...], present: tuple[Any, Any]) -> fx.Node:
        code = sum((not is_equal(values[0], value)) << bit for bit, value in enumerate(values[2:]))
        path = _owner(training.tracer.reads, node, ranks, code)
        owner = model.get_submodule(path)  # whose .train() and .eval() decide
        child = unused_name(owner, "mode_select")
        owner.add_module(child, ModeSelect().train(owner.training))
        return training.graph.call_module(f"{path}.{child}".lstrip("."), present)

    def merged(node: fx.Node, values: tuple[Any, ...]) -> Any:
        if isinstance(values[0], fx.Node):
            return values[0]
        if len({_shape(value) for value in values}) == 1 and _parts(values[0]):
            parts = zip(*map(_parts, values), strict=True)
            return _rebuilt(values[0], [merged(node, part) for part in parts])
        if is_equal(values[0], values[1]):
            return values[0]
        with training.graph.inserting_before(node):
            return by_mode(node, values, (values[0], values[1]))

    for nodes in list(zip(*(other.graph.nodes for other in traces), strict=True)):
        node = nodes[0]
        if node.op == "get_attr" and node.target in training.constants:
            values = tuple(other.constants[node.target] for other in traces)
            if not is_equal(values[0], values[1]):
                name = f"{node.target}_in_evaluation"
                training.constants[name] = values[1]
                with training.graph.inserting_after(node):
                    other = training.graph.get_attr(name)
                with training.graph.inserting_after(other):
                    chosen = by_mode(node, values, (node, other))
                node.replace_all_uses_with(chosen, delete_user_cb=lambda user, chosen=chosen: user is not chosen)
        node.args = merged(node, tuple(n.args for n in nodes))
        node.kwargs = merged(node, tuple(n.kwargs for n in nodes))


def _owner(reads: dict[str, list[str]], node: fx.Node, ranks: dict[str, int], code: int) -> str:
    """Return the path of the module whose mode decides a constant of a node.

    It has the rank `code`, and one of the modules that ran when the node was created read its mode.
    """
    stack = ["", *modules_around(node)]
    owners = [owner for path in reversed(stack) for owner in reversed(reads.get(path, ()))]
    # If no reader has that rank, the innermost reader decides; without readers, the innermost module.
    return next((owner for owner in owners if ranks[owner] == code), [*owners, stack[-1]][0])


def is_equal(a: Any, b: Any) -> bool:
    """Whether two constants are equal, with type, dtype and shape."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
