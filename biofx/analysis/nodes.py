"""Nodes: what the operators in each node of a recorded graph are, together."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from biofx.base.torch_internals import pytree
from biofx.model.chain import callee
from biofx.model.islands import island_path
from biofx.recording.catalog import COPIES, Kind
from biofx.recording.operations import Recording, Value

# Of several operators in one node, the kind of the first of these says what the node does.
_ORDER = (
    Kind.UNKNOWN, Kind.PRODUCT, Kind.ATTENTION, Kind.CONVOLUTION, Kind.EMBEDDING, Kind.GATES, Kind.NORM, Kind.WRITE,
    Kind.CONCATENATE, Kind.MERGE, Kind.REDUCE, Kind.WINDOW, Kind.ALONG, Kind.KEEP, Kind.LAYOUT, Kind.CONSTANT,
)  # fmt: skip


class Nodes:
    """The nodes of a graph, as a run saw them."""

    def __init__(self, bio: fx.GraphModule, recording: Recording) -> None:
        self._bio = bio
        self._recording = recording

    def value(self, node: fx.Node) -> Any:
        """What a node computed, with a tensor on the meta device for every tensor of floating-point numbers."""
        return pytree.tree_map_only(Value, _tensor, self._recording.nodes[node], is_leaf=lambda x: isinstance(x, Value))

    def kind(self, node: fx.Node) -> Kind:
        """What a node does to units. One that calls no operator takes something apart, or asks for a size."""
        if island_path(self._bio, node) is not None:
            return Kind.UNKNOWN
        operations = self._recording.operations_of.get(node, ())
        kinds = {operation.kind for operation in operations if operation.name not in COPIES}
        if not operations:
            found = [x for x in pytree.tree_leaves(self._recording.nodes[node]) if isinstance(x, Value)]
            return Kind.LAYOUT if found else Kind.CONSTANT
        return next((kind for kind in _ORDER if kind in kinds), Kind.KEEP)

    def name(self, node: fx.Node) -> str:
        """The function that a node calls, or the class of the island."""
        path = island_path(self._bio, node)
        if path is not None:
            return type(self._bio.get_submodule(path)).__name__
        operations = self._recording.operations_of.get(node, ())
        return operations[0].called if operations else callee(node)


def _tensor(value: Value) -> Any:
    if value.is_activity or value.data is None:
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    return value.data
