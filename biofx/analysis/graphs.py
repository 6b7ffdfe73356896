"""Captured models under a recording: a graph runs node by node, so that each operator is known to belong to a node."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn

from biofx.analysis.layouts import CannotFollowError, rearranged, varies
from biofx.analysis.reads import WeightRead, bias_of
from biofx.base.torch_internals import pytree
from biofx.model import weight_cache
from biofx.model.chain import attribute, chain, compute, parameter_nodes
from biofx.model.changes import reason_for_graph
from biofx.model.islands import PRESENT_FORWARD, generated_class, is_one_island
from biofx.model.provenance import is_transformed
from biofx.model.synapses import Synapses, synapses_in, synapses_of
from biofx.recording.catalog import COPIES, Kind
from biofx.recording.operations import Value
from biofx.recording.recorder import Recorder, unrecorded

if TYPE_CHECKING:
    from biofx.analysis.forms import Forms
    from biofx.recording.operations import Operation, Recording
    from biofx.weights.facts import WeightFacts

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
            from the end; none if it does not return the units of this weight, or does something else to them.
        source: position among the node's inputs of the activity that it multiplies the weight by, or None.
        source_axes: axes of that activity that run over presynaptic units, counted from the end.
        bias: position among the node's inputs of the bias that the operator adds; −1 if the node computes it, None if
            there is none.
        is_embedding: whether it looks up rows.
    """

    parameter: str
    operator: str
    units: int
    adjacent: int
    output_axes: tuple[int, ...]
    source: int | None
    source_axes: tuple[int, ...]
    bias: int | None
    is_embedding: bool


@contextlib.contextmanager
def as_recorded(
    bio: nn.Module, recorder: Recorder, dtype: torch.dtype | None = None, *, by_node: bool = False
) -> Iterator[None]:
    """Run a captured model, whoever calls it, for a recorder, which knows a weight of synapses as the parameter.

    Args:
        bio: the model. One that is not captured runs as ever.
        recorder: the recorder.
        dtype: that in which nodes read parameters, as copies that are freed after the last of them; None for their own.
        by_node: run its graph, node by node. Otherwise its Python runs, unless only the graph does what calls do.
    """
    if not is_transformed(bio):
        yield
        return
    assert isinstance(bio, fx.GraphModule)
    known = _effective_weights(bio, recorder)  # once: in all calls of a run, they are the same parameters
    python: Any = None if by_node or reason_for_graph(bio) is not None else bio.original_forward

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        if python is not None:
            return python(*args, **kwargs)
        if is_one_island(bio):  # its graph passes all arguments on
            return _run(bio, recorder, known, {"args": args, "kwargs": kwargs}, dtype)
        bound = signature.bind(bio, *args, **kwargs)
        bound.apply_defaults()
        return _run(bio, recorder, known, bound.arguments, dtype)

    # In its class, so that a forward that the user derived or assigned runs around it.
    cls = generated_class(bio)
    signature = inspect.signature(cls.forward)
    forward.__signature__ = signature  # type: ignore[attr-defined]  # inputs have their names
    with (
        patch.object(cls, "forward", forward),
        patch.object(cls, PRESENT_FORWARD, forward),
        weight_cache.substituted(known),
    ):
        yield


def _effective_weights(bio: nn.Module, recorder: Recorder) -> dict[nn.Module, Tensor]:
    """Weights by their synapses; a recorder knows them as the parameters, and forward finds leaves, as these are."""
    found: dict[nn.Module, Tensor] = {}
    for name, synapses in synapses_in(bio).items():
        with unrecorded():
            weight = synapses()
            if synapses.links:
                weight = weight.detach().requires_grad_(synapses.stored.requires_grad)
        found[synapses] = weight
        if not synapses.links:  # it is the parameter
            continue
        value = recorder.declare(weight, "parameter", name)
        coordinates = _stacked(synapses)
        if coordinates is not None:
            recorder.recording.coordinates[value] = coordinates
    return found


def _run(
    bio: fx.GraphModule,
    recorder: Recorder,
    known: Mapping[nn.Module, Tensor],
    given: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> Any:
    ends = {chain(node)[-1]: synapses_of(bio, name) for name, node in parameter_nodes(bio).items()}
    waiting = Counter(source for node in bio.graph.nodes for source in node.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    result = None
    for node in bio.graph.nodes:
        recorder.enter_node(node)
        synapses = ends.get(node)
        if synapses is not None:
            result = known[synapses]
        elif node.op == "placeholder":
            result = given[str(node.target).lstrip("*")]
        elif node.op == "get_attr":
            result = attribute(bio, str(node.target))
        else:
            result = compute(bio, node, *fx.map_arg((node.args, node.kwargs), values.__getitem__))
        if node in ends and dtype is not None:
            result = _converted(recorder, result, dtype)
        values[node] = result
        recorder.note_node(node, result)
        for source in node.all_input_nodes:
            waiting[source] -= 1
            if not waiting[source]:
                del values[source]  # free the memory
    recorder.leave_graph()
    return result


def _converted(recorder: Recorder, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if not weight.is_floating_point() or weight.dtype is dtype:
        return weight
    with unrecorded():
        other = weight.detach().to(dtype)
    recorder.know_as(weight, other)
    return other


def _stacked(synapses: Synapses) -> tuple[Tensor, ...] | None:
    """Where the entries of a weight are if its synapses lie next to each other, as each has an activation of its own.

    None if the weight has its own shape.
    """
    links = [link for link in synapses.links if link.target in (torch.flatten, torch.unflatten, torch.movedim)]
    if not links:
        return None
    shape = synapses.stored.shape
    own = torch.Size(shape[1:])
    axes = [torch.arange(n).view([-1 if i == k else 1 for i in range(len(own))]) for k, n in enumerate(own)]
    coordinates = [axis.expand(shape) for axis in axes]
    for link in links:
        coordinates = [link.target(c, *link.args) for c in coordinates]
    return tuple(coordinates)


def annotate(bio: fx.GraphModule, recording: Recording, forms: Forms, weights: Mapping[str, WeightFacts]) -> None:
    """Note at each node how it uses weights, from a run of the graph and what reads parameters in it."""
    reads: dict[fx.Node, list[WeightRead]] = {}
    for node in bio.graph.nodes:
        node.meta.pop(USES, None)
    for read in (*forms.reads, *forms.computed):
        node = read.operation.node
        if node is not None:
            reads.setdefault(node, []).append(read)
    for node, both in reads.items():
        found = [read for read in both if read.operation not in recording.again] or both
        names = dict.fromkeys(name for read in found for name in read.names)
        shows_units = len(found) == 1 and _decides(found[0], weights.get(found[0].parameter.name))
        node.meta[USES] = tuple(
            _use(node, recording, name, [r for r in found if name in r.names], shows_units) for name in names
        )


def uses_of(node: fx.Node) -> tuple[NodeUse, ...]:
    """How a node uses weights."""
    found: tuple[NodeUse, ...] = node.meta.get(USES, ())
    return found


def _decides(read: WeightRead, facts: WeightFacts | None) -> bool:
    """Whether a use is one of those that decide on its weight's signs."""
    if read.mixture is not None or facts is None or facts.axes is None:
        return True
    axes = read.axes()
    return axes is not None and facts.axes.agree(axes)


def _use(node: fx.Node, recording: Recording, name: str, reads: list[WeightRead], shows_units: bool) -> NodeUse:
    read = reads[0]
    lengths = [n for n, role in zip(read.lengths, read.roles, strict=True) if role[1]]
    axes = None if read.mixture is not None else read.axes()
    units = torch.arange(read.count(1)) if axes is None else read.postsynaptic_positions(axes)
    is_in_order = bool((units[1:] > units[:-1]).all())
    source, source_axes = _source(node, recording, read) if len(reads) == 1 and not read.others else (None, ())
    returned, bias = _returned(node, recording, read)
    return NodeUse(
        parameter=name,
        operator=shown(read.operation),
        units=len(units.unique()),
        adjacent=lengths[-1] * (read.groups if len(lengths) > 1 else 1) if lengths else 1,
        output_axes=_axes_in_order(returned, read) if shows_units and is_in_order and returned is not None else (),
        source=source,
        source_axes=source_axes,
        bias=bias,
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


def _axes_in_order(places: Tensor, read: WeightRead) -> tuple[int, ...]:
    """The axes along which numbered units lie in order; none if they do not."""
    axes = [axis for axis in range(-places.dim(), 0) if varies(places, axis)]
    if read.count(1) == 1 and read.output_axes:  # nothing varies
        single = [axis for axis in range(-places.dim(), 0) if places.shape[axis] == 1]
        return read.output_axes[-1:] if read.output_axes[-1] in single else tuple(single[-1:])
    small = places[tuple(slice(None if axis in axes else 1) for axis in range(-places.dim(), 0))]
    return tuple(axes) if torch.equal(small.flatten(), torch.arange(read.count(1))) else ()


def _source(node: fx.Node, recording: Recording, read: WeightRead) -> tuple[int | None, tuple[int, ...]]:
    """The input of a node that an operator in it multiplies by a weight, and its axes of presynaptic units."""
    position, way = _given(node, recording, read.source)
    if read.source is None or position is None:
        return None, ()
    shape = way[0].shape
    place = torch.arange(shape.numel()).view(shape)
    try:
        for value in way[1:]:
            assert value.producer is not None
            place = _moved(value.producer, place)[value.producer.outputs.index(value)]
    except CannotFollowError:
        return None, ()
    if not place.numel():  # an empty tensor shows no axis
        return None, ()
    found: list[int] = []
    for axis in read.source_axes:
        line = place.movedim(axis, -1)[tuple(n // 2 for i, n in enumerate(place.shape) if i != axis % place.dim())]
        steps = torch.unravel_index(line, shape) if line.numel() > 1 else ()
        along = [i for i, step in enumerate(steps) if bool((step != step[0]).any())]
        found += [i - len(shape) for i in along] or [axis]
    return position, tuple(found)


def _given(node: fx.Node, recording: Recording, value: Value | None) -> tuple[int | None, list[Value]]:
    """The position of the input of a node that holds the entries of a tensor, and what they are in, from there on."""
    inputs = [recording.nodes.get(n) for n in node.all_input_nodes]
    way: list[Value] = []
    while value is not None:
        way.insert(0, value)
        position = next((i for i, known in enumerate(inputs) if known is value), None)
        if position is not None:
            return position, way
        made = value.producer
        value = made.operands[0] if made is not None and made.node is node and _moves(made) and made.operands else None
    return None, way


def _moves(operation: Operation) -> bool:
    """Whether an operator does nothing but move the entries of one tensor."""
    return operation.kind is Kind.LAYOUT or operation.name in COPIES


def _moved(operation: Operation, below: Tensor) -> list[Tensor]:
    """Entries of another tensor as an operator moves them."""
    return [below] if operation.name in COPIES else rearranged(operation, below)


def _returned(node: fx.Node, recording: Recording, read: WeightRead) -> tuple[Tensor | None, int | None]:
    """Where in the result of a node the units of a weight are, in numbers, and the input that it adds to them.

    The first is None if the node does something else to the units; the second if it adds nothing, and −1 if that is not
    an input of the node.
    """
    added = [] if (own := bias_of(read.operation)) is None else [own]
    places, is_plain = {read.output: read.placed(torch.arange(read.count(1)))}, True
    for operation in recording.operations_of.get(node, ()):
        if operation is read.operation or operation.kind is Kind.CONSTANT:
            continue
        mine = [value for value in operation.operands if value in places]
        if operation.name == "add" and len(mine) == 1:
            added += [value for value in operation.operands if value not in places]
            places[operation.outputs[0]] = places[mine[0]].expand(operation.outputs[0].shape)
        elif not _moves(operation):
            is_plain = False
        elif mine:
            try:
                places.update(zip(operation.outputs, _moved(operation, places[mine[0]]), strict=True))
            except CannotFollowError:
                is_plain = False
    position = _given(node, recording, added[0])[0] if len(added) == 1 else None
    result = next((v for v in pytree.tree_leaves(recording.nodes.get(node)) if isinstance(v, Value)), None)
    bias = None if not added else -1 if position is None else position
    return places.get(result) if is_plain and result is not None else None, bias
