"""Node value: the result of a node without and with doubled units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from biofx.base.torch_internals import pytree

if TYPE_CHECKING:
    from biofx.widening.axis_doubling import AxisDoubling

NO_WEIGHTS: frozenset[str] = frozenset()


class IncompatibleError(Exception):
    """The result of a node on doubled units is not its result with doubled units."""


@dataclass(frozen=True, eq=False)
class NodeValue:
    """The result of a node.

    Attributes:
        old: the result in the original network.
        new: the result behind doubled units; the same object if no doubled units reach the node.
        doublings: the doubling that leads from each leaf of `old` to that of `new`; None for equal leaves.
        weights: the weights whose doubled units reach the node.
    """

    old: Any
    new: Any
    doublings: Sequence[AxisDoubling | None]
    weights: frozenset[str]

    @property
    def is_changed(self) -> bool:
        """Whether doubled units reach the node."""
        return self.new is not self.old

    @classmethod
    def unchanged(cls, value: Any) -> NodeValue:
        """The result of a node that no doubled units reach."""
        return cls(value, value, [None] * len(pytree.tree_leaves(value)), NO_WEIGHTS)

    @classmethod
    def doubled(cls, value: Tensor, doubling: AxisDoubling, weights: frozenset[str]) -> NodeValue:
        """A tensor whose units are doubled."""
        return cls(value, doubling.apply(value), [doubling], weights)


def weights_of(values: Iterable[NodeValue]) -> frozenset[str]:
    """The weights whose doubled units reach any of several nodes."""
    return NO_WEIGHTS.union(*(value.weights for value in values))
