"""The plan of a widening: what becomes wider, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from biofx.model.chain import attribute
from biofx.rewrite.editor import Owners, replace_parameter

if TYPE_CHECKING:
    from biofx.widening.twins import Twins


@dataclass(eq=False)
class Widening:
    """What becomes wider.

    Attributes:
        doubled: the weights whose postsynaptic units are doubled.
        columns: how the presynaptic axis of the weights that read doubled units becomes wider, by the weight's name.
        tensors: how other parameters and buffers do, by name.
        met: the weights whose units meet each of those, by its name.
        sizes: new attributes of modules, by path.
        arguments: new arguments of nodes.
        left: why the units of the other weights are not doubled, by the weight's name.
    """

    doubled: frozenset[str]
    columns: dict[str, Twins] = field(default_factory=dict)
    tensors: dict[str, Twins] = field(default_factory=dict)
    met: dict[str, frozenset[str]] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    arguments: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def apply(self, bio: fx.GraphModule, places: Owners) -> None:
        """Make everything wider apart from the weights."""
        for name, twins in self.tensors.items():
            old = attribute(bio, name)
            if isinstance(old, nn.Parameter):
                replace_parameter(places, old, twins.widen(old.detach()))
            else:
                path, _, leaf = name.rpartition(".")
                bio.get_submodule(path)._buffers[leaf] = twins.widen(old)
        for path, sizes in self.sizes.items():
            vars(bio.get_submodule(path)).update(sizes)
        for node, (args, kwargs) in self.arguments.items():
            node.args, node.kwargs = args, kwargs
