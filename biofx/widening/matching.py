"""Matching: whether the result of a node on doubled units is its original result with doubled units."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from biofx.base.torch_internals import pytree
from biofx.recording.catalog import Kind
from biofx.widening.axis_doubling import (
    AxisDoubling,
    adjacent_twins,
    doubled_labels,
    doubling_from_labels,
    labels,
    resized_axes,
)

if TYPE_CHECKING:
    from biofx.widening.execution import Execution

Arguments = tuple[Any, Any]  # positional ones and those by keyword
REARRANGING = (Kind.LAYOUT, Kind.CONCATENATE)

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


def match(
    execution: Execution,
    node: fx.Node,
    inputs: Mapping[fx.Node, NodeValue],
    arguments: Arguments,
    results: tuple[Any, Any],
    weights: frozenset[str],
) -> NodeValue:
    """The value of a node.

    Args:
        execution: runs the node.
        node: the node.
        inputs: the values of the nodes that it reads.
        arguments: its arguments behind doubled units.
        results: its results in the original network and behind doubled units.
        weights: the weights whose doubled units reach it.

    Raises:
        IncompatibleError: the new result is not the old one with doubled units.
    """
    old, new = results
    before, spec = pytree.tree_flatten(old)
    after, spec_after = pytree.tree_flatten(new)
    if spec != spec_after:
        raise IncompatibleError
    for index in _unread(node, old):
        after[index] = before[index]
    is_rearranged = execution.kind(node) in REARRANGING
    likely = (_rearranged(execution, node, inputs, arguments) if is_rearranged else None) or [None] * len(before)
    known = [doubling for source in node.all_input_nodes for doubling in inputs[source].doublings]
    doublings = [_doubling(a, b, [first, *known]) for a, b, first in zip(before, after, likely, strict=True)]
    for index, (value, doubling) in enumerate(zip(before, doublings, strict=True)):
        if isinstance(value, Tensor):  # an exact copy, so that rounding does not accumulate from node to node
            after[index] = value if doubling is None else doubling.apply(value)
    is_same = all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(before, after, strict=True))
    return NodeValue(old, old if is_same else pytree.tree_unflatten(after, spec), doublings, weights)


def _doubling(old: Any, new: Any, likely: list[AxisDoubling | None]) -> AxisDoubling | None:
    """The doubling that leads from one leaf of a result to another: a likely one, or adjacent twins; None if equal."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor) or is_close(old, new):
        return None
    axes = resized_axes(old, new)
    if len(axes) != 1:
        raise IncompatibleError
    for doubling in (*likely, adjacent_twins(old.shape[axes[0]])):
        if doubling is None or doubling.size != old.shape[axes[0]]:
            continue
        if doubling.is_uniform:
            doubling = doubling.on(axes[0])
        if doubling.axis == axes[0] and is_close(doubling.apply(old), new) and doubling.is_in_order():
            return doubling
    raise IncompatibleError


def _rearranged(
    execution: Execution, node: fx.Node, inputs: Mapping[fx.Node, NodeValue], arguments: Arguments
) -> list[AxisDoubling | None]:
    """The doublings in the result of a node that only moves entries, which is executed on labels of the entries."""
    old_inputs: dict[fx.Node, Any] = {}
    new_inputs: dict[fx.Node, Any] = {}
    count = 0
    for source in node.all_input_nodes:
        leaves, spec = pytree.tree_flatten(inputs[source].old)
        old, new = list(leaves), pytree.tree_leaves(inputs[source].new)
        for index, (leaf, doubling) in enumerate(zip(leaves, inputs[source].doublings, strict=True)):
            if isinstance(leaf, Tensor) and (doubling is not None or leaf.is_floating_point()):
                old[index] = labels(leaf.shape, count + 1, leaf.device)
                new[index] = old[index] if doubling is None else doubled_labels(old[index], doubling)
                count += leaf.numel()
        old_inputs[source], new_inputs[source] = pytree.tree_unflatten(old, spec), pytree.tree_unflatten(new, spec)
    try:
        before = execution.run(node, *fx.map_arg((node.args, node.kwargs), old_inputs.__getitem__))
        after = execution.run(node, *fx.map_arg(arguments, new_inputs.__getitem__))
    except Exception:  # noqa: BLE001 - not every operator accepts labels, which are of another dtype
        return []
    pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
    return [doubling_from_labels(a, b) if isinstance(a, Tensor) else None for a, b in pairs]


def _unread(node: fx.Node, value: Any) -> set[int]:
    """The positions in a node's tuple of tensors that no node reads, such as the indices of a maximum."""
    if not isinstance(value, tuple) or not all(isinstance(x, Tensor) for x in value):
        return set()
    if any(user.target is not operator.getitem or not isinstance(user.args[1], int) for user in node.users):
        return set()
    return set(range(len(value))) - {user.args[1] % len(value) for user in node.users if user.users}  # type: ignore[operator]


def is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of one operator."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b) or not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    tolerance = torch.finfo(a.dtype).eps ** 0.75
    gap = (a - b).abs().max()
    if not bool(gap.isfinite()):
        finite = a.isfinite() & b.isfinite()
        is_same_or_finite = (a == b) | (a.isnan() & b.isnan()) | finite
        a, b = (torch.where(finite, x, 0) for x in (a, b))
        return bool(is_same_or_finite.all()) and is_close(a, b)
    return bool(gap <= tolerance * a.abs().max())
