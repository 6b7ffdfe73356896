"""Execution: what the nodes of a graph are, by a recorded run, and what they return for random numbers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from biofx.base.torch_internals import pytree
from biofx.model.chain import attribute, callee, compute
from biofx.model.islands import island_path
from biofx.recording.catalog import COPIES, Kind
from biofx.recording.operations import Recording, Value
from biofx.widening.sizes import SIZES, doubled_sizes, own_tensors, unit_axis

if TYPE_CHECKING:
    from biofx.widening.axis_doubling import AxisDoubling

# Of several operators in one node, the kind of the first of these says what the node does.
_ORDER = (
    Kind.UNKNOWN, Kind.PRODUCT, Kind.ATTENTION, Kind.CONVOLUTION, Kind.EMBEDDING, Kind.GATES, Kind.NORM, Kind.WRITE,
    Kind.CONCATENATE, Kind.MERGE, Kind.REDUCE, Kind.WINDOW, Kind.ALONG, Kind.KEEP, Kind.LAYOUT, Kind.CONSTANT,
)  # fmt: skip


class Execution:
    """Runs the nodes of one graph.

    Random numbers replace parameters, because their own values may hide a difference, as γ = 0 does.

    Attributes:
        bio: the captured model.
    """

    def __init__(self, bio: fx.GraphModule, recording: Recording) -> None:
        self.bio = bio
        self._recording = recording
        self._names = {id(parameter): name for name, parameter in bio.named_parameters()}  # one for tied parameters
        self._random: dict[int, Tensor] = {}  # by the parameter's id
        self._generator = torch.Generator().manual_seed(0)
        self._in_islands = {
            id(tensor)
            for path in (island_path(bio, node) for node in bio.graph.nodes)
            for module in ([] if path is None else [bio.get_submodule(path)])
            for tensor in (*module.parameters(), *module.buffers())
        }

    def run(self, node: fx.Node, args: Any, kwargs: Any, doubling: AxisDoubling | None = None) -> Any:
        """The result of a node; with a doubling, that of its module with doubled parameters."""
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))  # it may change them in place
        if node.op == "call_module":
            return self._module(node, doubling)(*args, **kwargs)
        return compute(self.bio, node, args, kwargs)

    def attribute(self, node: fx.Node) -> Any:
        """The value of a `get_attr` node."""
        return self._randomised(attribute(self.bio, str(node.target)))

    def recorded(self, node: fx.Node) -> Any:
        """Random numbers of the shapes that a node returned when the model was recorded."""
        return pytree.tree_map_only(
            Value, self._random_like, self._recording.nodes[node], is_leaf=lambda x: isinstance(x, Value)
        )

    def kind(self, node: fx.Node) -> Kind:
        """What a node does to units. One that calls no operator takes something apart, or asks for a size."""
        if island_path(self.bio, node) is not None:
            return Kind.UNKNOWN
        operations = self._recording.operations_of.get(node, ())
        kinds = {operation.kind for operation in operations if operation.name not in COPIES}
        if not operations:
            found = [x for x in pytree.tree_leaves(self._recording.nodes[node]) if isinstance(x, Value)]
            return Kind.LAYOUT if found else Kind.CONSTANT
        return next((kind for kind in _ORDER if kind in kinds), Kind.KEEP)

    def name(self, node: fx.Node) -> str:
        """The function that a node calls, or the class of the island."""
        path = island_path(self.bio, node)
        if path is not None:
            return type(self.bio.get_submodule(path)).__name__
        operations = self._recording.operations_of.get(node, ())
        return operations[0].called if operations else callee(node)

    def is_in_island(self, tensor: Tensor) -> bool:
        """Whether an untraced submodule holds a tensor. Its Python may depend on the size, so the size is fixed."""
        return id(tensor) in self._in_islands

    def has_unit_parameters(self, node: fx.Node) -> bool:
        """Whether a node calls a module with a parameter per unit, whose size may change."""
        if node.op != "call_module":
            return False
        module = self.bio.get_submodule(str(node.target))
        is_fixed = any(self.is_in_island(tensor) for tensor in own_tensors(module).values())
        return not is_fixed and any(size in vars(module) for size in SIZES)

    def unit_tensors(self, node: fx.Node) -> dict[str, Tensor]:
        """The parameters and buffers of such a module, by name; empty for other nodes."""
        if not self.has_unit_parameters(node):
            return {}
        own = own_tensors(self.bio.get_submodule(str(node.target)))
        return {self._names.get(id(tensor), f"{node.target}.{key}"): tensor for key, tensor in own.items()}

    def _module(self, node: fx.Node, doubling: AxisDoubling | None) -> nn.Module:
        module = self.bio.get_submodule(str(node.target))
        if not self.has_unit_parameters(node):
            return module
        result = copy.deepcopy(module)
        for key, tensor in own_tensors(module).items():
            value = self._randomised(tensor)
            axis = None if doubling is None else unit_axis(value, doubling)
            if doubling is not None and axis is not None:
                value = doubling.on(axis).apply(value)
            setattr(result, key, nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value)
        vars(result).update({} if doubling is None else doubled_sizes(module, doubling))
        return result

    def _randomised(self, value: Any) -> Any:
        if not isinstance(value, nn.Parameter):
            return value
        if id(value) not in self._random:
            self._random[id(value)] = self._random_like(value)
        return self._random[id(value)]

    def _random_like(self, like: Tensor | Value) -> Tensor:
        """Random numbers between 0.1 and 0.9, where most functions are defined; integers and masks stay unchanged."""
        if not like.dtype.is_floating_point:
            known = like.data if isinstance(like, Value) else like
            return torch.empty(like.shape, dtype=like.dtype, device="meta") if known is None else known
        device = like.device if isinstance(like, Tensor) else next(self.bio.parameters()).device
        return (0.1 + 0.8 * torch.rand(like.shape, generator=self._generator)).to(device, like.dtype)
