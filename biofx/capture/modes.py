"""Modes: one graph that follows `.train()` and `.eval()`, from traces in different modes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Set
from typing import Any

import torch
from torch import fx, nn

from biofx.capture.tracer import KeepWhole, StandIn, unused_name
from biofx.capture.tracing import Trace, is_same, trace


class ModeConstant(StandIn):
    """One of two constants, chosen by `training`: stands where tracing would have baked the mode in."""

    def __init__(self, train: Any, eval: Any) -> None:  # noqa: A002 - the two modes are called train and eval
        super().__init__()
        for name, value in (("in_training", train), ("in_evaluation", eval)):
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def forward(self) -> Any:
        """The constant for the current mode."""
        return self.in_training if self.training else self.in_evaluation

    def extra_repr(self) -> str:
        """Both constants."""
        return f"train={self.in_training!r}, eval={self.in_evaluation!r}"


def trace_modes(model: nn.Module, absent: Collection[str], whole: dict[str, str], synapses: Set[int]) -> Trace:
    """One graph for all modes: where traces in different modes differ in a constant, it has a `ModeConstant` module."""
    training = _trace(model, absent, whole, synapses, evaluating=())
    if not training.tracer.reads:
        return training
    modules = dict(model.named_modules())
    evaluation = _trace(model, absent, whole, synapses, evaluating=modules.values())
    ranks = _ranks([training, evaluation])
    # Which module does a constant depend on? A trace for each bit of the ranks tells, with half of them in evaluation.
    bits = range(max(ranks.values()).bit_length())
    halves = [[modules[path] for path, rank in ranks.items() if rank >> bit & 1] for bit in bits]
    mixed = [trace(model, absent, whole, synapses, half) for half in halves]
    traces = [training, evaluation, *mixed]
    for other in traces[1:]:
        _check_same_path(model, training, other)
    _follow_modes(model, traces, ranks)
    return training


def _trace(
    model: nn.Module,
    absent: Collection[str],
    whole: dict[str, str],
    synapses: Set[int],
    evaluating: Collection[nn.Module],
) -> Trace:
    """Trace with and without gradients, which has to make the same graph.

    That forward asks for them would show in no run in which what it does with the answer is silent.
    """
    with torch.enable_grad():
        first = trace(model, absent, whole, synapses, evaluating)
    with torch.no_grad():
        second = trace(model, absent, whole, synapses, evaluating)
    if not is_same(first, second):
        steps = itertools.zip_longest(_written(first), _written(second))
        parting = next(((x or y)[0] for x, y in steps if x != y), "")
        raise KeepWhole({parting: "its forward does something else without gradients"})
    return first


def _written(trace: Trace) -> Iterator[tuple[str, str]]:
    """What happened in a trace, each with the module whose forward ran."""
    for module, kind, what in trace.tracer.steps:
        yield module, f"{kind} {what.format_node() if isinstance(what, fx.Node) else what}"


def _ranks(traces: list[Trace]) -> dict[str, int]:
    """The modules whose mode was read: each with the number of those around it, so that nested ones differ."""
    paths = {path for one in traces for read in one.tracer.reads.values() for path in read}
    around = {path: itertools.accumulate(path.split("."), "{}.{}".format) for path in paths if path}
    return {path: len(paths & {"", *around.get(path, ())} - {path}) for path in paths}


def _check_same_path(model: nn.Module, a: Trace, b: Trace) -> None:
    """Find the smallest module whose forward runs when two traces of a model part, and others like it."""
    positions = [{node: i for i, node in enumerate(one.graph.nodes)} for one in (a, b)]
    for x, y in itertools.zip_longest(_path_of(a, positions[0]), _path_of(b, positions[1])):
        if x != y:
            parting = (x or y)[0]
            kind = type(model.get_submodule(parting))
            alike = [path for path in a.tracer.reads if parting and type(model.get_submodule(path)) is kind]
            reason = "its forward takes another path in training than in evaluation mode"
            raise KeepWhole(dict.fromkeys([parting, *alike], reason))


def _path_of(trace: Trace, positions: dict[fx.Node, int]) -> Iterator[tuple[Any, ...]]:
    for module, kind, what in trace.tracer.steps:
        if kind != "node":
            yield module, kind, what if kind == "enter" else _skeleton(what, positions)
        elif what in positions:  # else it was merged with another read
            arguments = _skeleton((what.args, what.kwargs), positions)
            yield module, what.op, what.target, arguments


def _skeleton(value: Any, positions: dict[fx.Node, int]) -> Any:
    """The part of a value that has to be the same in all modes: where there are nodes, and which; else None."""
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
    """Make the first of several traces, which differ in constants only, read those from `ModeConstant` modules."""
    training = traces[0]

    def by_mode(node: fx.Node, values: tuple[Any, ...]) -> fx.Node:
        code = sum((not is_equal(values[0], value)) << bit for bit, value in enumerate(values[2:]))
        path = _owner(training.tracer.reads, node, ranks, code)
        owner = model.get_submodule(path)  # whose .train() and .eval() decide
        child = unused_name(owner, "mode_constant")
        owner.add_module(child, ModeConstant(values[0], values[1]).train(owner.training))
        with training.graph.inserting_before(node):
            return training.graph.call_module(f"{path}.{child}".lstrip("."))

    def merged(node: fx.Node, values: tuple[Any, ...]) -> Any:
        if isinstance(values[0], fx.Node):
            return values[0]
        if len({_shape(value) for value in values}) == 1 and _parts(values[0]):
            parts = zip(*map(_parts, values), strict=True)
            return _rebuilt(values[0], [merged(node, part) for part in parts])
        return values[0] if is_equal(values[0], values[1]) else by_mode(node, values)

    for nodes in list(zip(*(other.graph.nodes for other in traces), strict=True)):
        node = nodes[0]
        if node.op == "get_attr" and node.target in training.constants:
            values = tuple(other.constants[node.target] for other in traces)
            if not is_equal(values[0], values[1]):
                node.replace_all_uses_with(by_mode(node, values))
                training.graph.erase_node(node)
                del training.constants[node.target]
        node.args = merged(node, tuple(n.args for n in nodes))
        node.kwargs = merged(node, tuple(n.kwargs for n in nodes))


def _owner(reads: dict[str, list[str]], node: fx.Node, ranks: dict[str, int], code: int) -> str:
    """The module whose mode a constant of a node depends on: one with rank `code` whose mode was read around there."""
    running = ["", *(path for path, _ in node.meta.get("nn_module_stack", {}).values())]
    owners = [owner for path in reversed(running) for owner in reversed(reads.get(path, ()))]
    return next((owner for owner in owners if ranks[owner] == code), [*owners, running[-1]][0])


def is_equal(a: Any, b: Any) -> bool:
    """Whether two constants are equal, with type, dtype and shape."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
