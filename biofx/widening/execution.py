"""Execution: runs single nodes of a graph on random numbers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from biofx.base.torch_internals import pytree
from biofx.model.chain import attribute, compute
from biofx.model.islands import island_path
from biofx.widening.sizes import SIZES, doubled_sizes, own_tensors, unit_axis

if TYPE_CHECKING:
    from biofx.analysis.nodes import Nodes
    from biofx.widening.axis_doubling import AxisDoubling


class Execution:
    """Runs the nodes of one graph.

    Random numbers replace parameters, because their own values may hide a difference, as γ = 0 does.

    Attributes:
        bio: the captured model.
        nodes: its nodes in a recorded run.
    """

    def __init__(self, bio: fx.GraphModule, nodes: Nodes) -> None:
        self.bio = bio
        self.nodes = nodes
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
        return pytree.tree_map_only(Tensor, self._random_like, self.nodes.value(node))

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
        names = {id(parameter): name for name, parameter in self.bio.named_parameters()}  # one name for tied parameters
        own = own_tensors(self.bio.get_submodule(str(node.target)))
        return {names.get(id(tensor), f"{node.target}.{key}"): tensor for key, tensor in own.items()}

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

    def _random_like(self, tensor: Tensor) -> Tensor:
        """Random numbers between 0.1 and 0.9, where most functions are defined."""
        if not tensor.is_floating_point():
            return tensor
        device = next(self.bio.parameters()).device if tensor.is_meta else tensor.device
        return (0.1 + 0.8 * torch.rand(tensor.shape, generator=self._generator)).to(device, tensor.dtype)
