"""Graphs under a recording: a captured graph runs node by node, so that each operator is known to belong to a node."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from biofx.analysis.forms import Forms, Read
from biofx.analysis.layouts import varies
from biofx.analysis.recording import Depends, Operation, Recorder, Recording, Value
from biofx.analysis.units import UnitAnalysis
from biofx.chain import attribute, chain, compute, parameter_nodes
from biofx.errors import ArgumentError
from biofx.provenance import Slot, inserted

USES = "biofx_uses"  # key in `node.meta`


@dataclass(frozen=True)
class NodeUse:
    """How a node of a captured graph uses a weight; kept in `node.meta`.

    Attributes:
        parameter: the weight's name.
        operator: the operator's name in tables.
        units: number of postsynaptic units that the node returns.
        adjacent: number of units that lie next to each other on the last axis of units.
        output_axes: axes of what the node returns that run over postsynaptic units, in the order of the units, counted
            from the end; none if it does not return the units of this weight.
        source: position among the node's inputs of the activity that it multiplies the weight by, or None.
        source_axes: axes of that activity that run over presynaptic units, counted from the end.
        bias: name of the bias that the operator adds, or None.
        is_embedding: whether it looks up rows.
    """

    parameter: str
    operator: str
    units: int
    adjacent: int
    output_axes: tuple[int, ...]
    source: int | None
    source_axes: tuple[int, ...]
    bias: str | None
    is_embedding: bool


@contextlib.contextmanager
def as_recorded_graph(bio: fx.GraphModule, recorder: Recorder) -> Iterator[None]:
    """Let a captured graph run node by node, whoever calls it, for a recorder.

    At the end of its chain, the weight that passes compute is known as the parameter.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _run(bio, recorder, bound_to_graph(bio, args, kwargs))

    signature = inspect.signature(bio.forward)
    forward.__signature__ = signature  # type: ignore[attr-defined]  # inputs have their names
    vars(bio)["forward"] = forward
    try:
        yield
    finally:
        del vars(bio)["forward"]


def bound_to_graph(bio: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the name of the placeholder.

    Raises:
        ArgumentError: the arguments do not fit.
    """
    try:
        bound = inspect.signature(type(bio).forward, follow_wrapped=False).bind(bio, *args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"example_inputs do not fit {type(bio).__name__}.forward: {error}") from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _run(bio: fx.GraphModule, recorder: Recorder, given: dict[str, Any]) -> Any:
    nodes = parameter_nodes(bio)
    ends = {chain(node)[-1]: name for name, node in nodes.items()}
    waiting = Counter(source for node in bio.graph.nodes for source in node.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    result = None
    for node in bio.graph.nodes:
        recorder.enter_node(node)
        values[node] = result = _value(bio, node, given, values)
        name = ends.get(node)
        if name is not None and node.op != "get_attr" and isinstance(result, Tensor):
            value = recorder.declare(result, "parameter", name)
            coordinates = _stacked(nodes[name], bio.get_parameter(name).shape)
            if coordinates is not None:
                recorder.recording.coordinates[value] = coordinates
        recorder.note_node(node, result)
        for source in node.all_input_nodes:
            waiting[source] -= 1
            if not waiting[source]:
                del values[source]  # free the memory
    recorder.leave_graph()
    return result


def _value(bio: fx.GraphModule, node: fx.Node, given: dict[str, Any], values: dict[fx.Node, Any]) -> Any:
    if node.op == "placeholder":
        return given[str(node.target).lstrip("*")]
    if node.op == "get_attr":
        return attribute(bio, str(node.target))
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    return compute(bio, node, args, kwargs)


def _stacked(node: fx.Node, shape: torch.Size) -> tuple[Tensor, ...] | None:
    """Where the entries of a weight are if its synapses lie next to each other, as each has an activation of its own.

    None if the weight has its own shape.
    """
    links = [n for n in chain(node) if (origin := inserted(n)) is not None and origin.slot is Slot.SUM]
    layout = [
        n for n in links if n.op == "call_function" and n.target in (torch.flatten, torch.unflatten, torch.movedim)
    ]
    if not layout:
        return None
    own = torch.Size(shape[1:])
    axes = [torch.arange(n).view([-1 if i == k else 1 for i in range(len(own))]) for k, n in enumerate(own)]
    coordinates = [axis.expand(shape) for axis in axes]
    for link in layout:
        coordinates = [link.target(c, *link.args[1:], **link.kwargs) for c in coordinates]  # type: ignore[operator]
    return tuple(coordinates)


def annotate(bio: fx.GraphModule, recording: Recording, forms: Forms, analysis: UnitAnalysis) -> None:
    """Note at each node how it uses weights."""
    reads: dict[fx.Node, dict[str, list[Read]]] = {}
    for node in bio.graph.nodes:
        node.meta.pop(USES, None)
    for read in forms.reads:
        node = read.operation.node
        if node is not None:
            reads.setdefault(node, {}).setdefault(read.parameter.name, []).append(read)
    for node, by_weight in reads.items():
        node.meta[USES] = tuple(
            _use(node, recording, forms, analysis, name, found, alone=len(by_weight) == 1)
            for name, found in by_weight.items()
        )


def uses_of(node: fx.Node) -> tuple[NodeUse, ...]:
    """How a node uses weights."""
    found: tuple[NodeUse, ...] = node.meta.get(USES, ())
    return found


def _use(
    node: fx.Node,
    recording: Recording,
    forms: Forms,
    analysis: UnitAnalysis,
    name: str,
    reads: list[Read],
    *,
    alone: bool,
) -> NodeUse:
    read = reads[0]
    lengths = [n for n, role in zip(read.lengths, read.roles, strict=True) if role[1]]
    units = len(analysis.units_of(read).unique())
    source, axes = _source(node, recording, read) if len(reads) == 1 and not read.others else (None, ())
    biases = [forms.biases[r.operation] for r in reads if r.operation in forms.biases] or _added(recording, node, forms)
    return NodeUse(
        parameter=name,
        operator=shown(read.operation),
        units=units,
        adjacent=lengths[-1] * (read.groups if len(lengths) > 1 else 1) if lengths else 1,
        output_axes=_output_axes(node, analysis, read) if alone and len(reads) == 1 else (),
        source=source,
        source_axes=axes,
        bias=biases[0] if biases else None,
        is_embedding=read.source is None,
    )


SHOWN = {"multi_head_attention_forward": "attention", "rnn_tanh": "rnn", "rnn_relu": "rnn"}


def shown(operation: Operation) -> str:
    """The name of an operator on weights in tables."""
    if operation.name == "convolution":
        space = len(operation.outputs[0].shape) - 2
        return f"conv{'_transpose' if operation.argument('transposed') else ''}{space}d"
    name = operation.called.removesuffix("_cell")
    return SHOWN.get(name, name)


def _output_axes(node: fx.Node, analysis: UnitAnalysis, read: Read) -> tuple[int, ...]:
    """The axes of what a node returns on which the weight's units are."""
    numbers = analysis.outputs.get(node)
    expected = analysis.numbers.classes(analysis.units_of(read))
    if numbers is None or not numbers.dim():
        return ()
    axes = [axis for axis in range(numbers.dim()) if varies(numbers, axis)]
    if not axes and len(expected) == 1 and bool((numbers == expected).all()):  # one unit: nothing varies
        axes = [axis % numbers.dim() for axis in read.output_axes[-1:] if axis < 0] or [min(1, numbers.dim() - 1)]
        return tuple(axis - numbers.dim() for axis in axes)
    others = [axis for axis in range(numbers.dim()) if axis not in axes]
    small = numbers.permute(*axes, *others).reshape([*[numbers.shape[a] for a in axes], -1])
    if not small.numel() or not torch.equal(analysis.numbers.classes(small[..., 0].flatten()), expected):
        return ()
    return tuple(axis - numbers.dim() for axis in axes)


def _source(node: fx.Node, recording: Recording, read: Read) -> tuple[int | None, tuple[int, ...]]:
    """The input of a node that an operator in it multiplies by a weight."""
    if read.source is None:
        return None, ()
    given = [recording.nodes.get(n) for n in node.all_input_nodes]
    value: Value | None = read.source
    while value is not None:
        for position, known in enumerate(given):
            if known is value:
                axes = tuple(a if a < 0 else a - len(read.source.shape) for a in read.source_axes)
                return position, axes
        made = value.producer
        same = made is not None and made.node is node
        value = (
            next((v for v in made.operands if v.depends is Depends.INPUTS and v.is_activity), None) if same else None
        )  # type: ignore[union-attr]
    return None, ()


def _added(recording: Recording, node: fx.Node, forms: Forms) -> list[str]:
    """The parameters of one axis that a node adds to what its operator on weights returns."""
    found = []
    for operation in recording.operations_of.get(node, ()):
        if operation.name == "add" and operation.depends is Depends.INPUTS:
            found += [v.name for v in operation.operands if v.kind == "parameter" and len(v.shape) == 1]
    return found
