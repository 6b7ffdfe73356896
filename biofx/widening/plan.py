"""Widening plan: the parameters, sizes and arguments that change when units are doubled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from biofx.model.chain import attribute
from biofx.rewrite.editor import Owners, replace_parameter

if TYPE_CHECKING:
    from biofx.widening.axis_doubling import AxisDoubling


@dataclass(eq=False)
class WideningPlan:
    """All changes of a model whose units are doubled.

    Attributes:
        doubled: the weights whose postsynaptic units are doubled.
        presynaptic: the doubling of the presynaptic axis of each weight that reads doubled units, by the weight's name.
        tensors: the doublings of other parameters and buffers, by name.
        reaching: the weights whose doubled units reach each of these tensors, by the tensor's name.
        sizes: new attributes of modules, by path.
        arguments: new arguments of nodes.
        reasons: why the units of the other weights are not doubled, by the weight's name.
    """

    doubled: frozenset[str]
    presynaptic: dict[str, AxisDoubling] = field(default_factory=dict)
    tensors: dict[str, AxisDoubling] = field(default_factory=dict)
    reaching: dict[str, frozenset[str]] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    arguments: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def apply(self, bio: fx.GraphModule, owners: Owners) -> None:
        """Make all changes apart from those of the weights."""
        for name, doubling in self.tensors.items():
            old = attribute(bio, name)
            if isinstance(old, nn.Parameter):
                replace_parameter(owners, old, doubling.apply(old.detach()))
            else:
                path, _, leaf = name.rpartition(".")
                bio.get_submodule(path)._buffers[leaf] = doubling.apply(old)
        for path, sizes in self.sizes.items():
            vars(bio.get_submodule(path)).update(sizes)
        for node, (args, kwargs) in self.arguments.items():
            node.args, node.kwargs = args, kwargs
