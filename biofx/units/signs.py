"""Whose activity can be negative."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from biofx.chain import attribute
from biofx.dry_run import UNKNOWN, Values
from biofx.operator_kinds import Kind, Operation, Sign, argument, held_parameter
from biofx.weights.paths import Use


def signed_by(
    bio: fx.GraphModule, uses: dict[fx.Node, Use], operations: dict[fx.Node, Operation], values: Values
) -> dict[fx.Node, str]:
    """The operator by which what each use of a weight reads can be negative, or an empty string if it cannot.

    Parameters that multiply units are taken to be positive; `Units.scales` lists them.

    Args:
        bio: a transformed model.
        uses: the calls of operators on weights.
        operations: the other calls.
        values: what the nodes compute.
    """
    signs = _Signs(bio, uses, operations, values)
    result: dict[fx.Node, str] = {}
    for node in bio.graph.nodes:
        if node in uses:
            source = uses[node].call.source
            result[node] = "" if source is None or source.is_tokens else signs.found[source.node]
        signs.found[node] = signs.of(node)
        if node in operations and operations[node].changes is not None:
            signs.found[operations[node].changes] = signs.found[node]
    return result


class _Signs:
    def __init__(
        self, bio: fx.GraphModule, uses: dict[fx.Node, Use], operations: dict[fx.Node, Operation], values: Values
    ) -> None:
        self.found: dict[Any, str] = {}
        self._bio = bio
        self._uses = uses
        self._operations = operations
        self._values = values

    def of(self, node: fx.Node) -> str:
        """The operator by which the value of a node can be negative, given those of the nodes before it."""
        if node.op == "placeholder":
            return input_name(node)
        if node.op == "get_attr":
            return _sign_of_tensor(attribute(self._bio, str(node.target)))
        if node in self._uses:
            return f"{self._uses[node].call.name} without activation"
        if node.op == "output":
            return ""
        operation = self._operations[node]
        if operation.sign is Sign.ANY or self._has_negative_number(node) or self._overshoots(node):
            return operation.name
        if operation.sign is Sign.NEVER or self._is_even_power(node) or self._is_clamped(node):
            return ""
        source = next((self.found[n] for n in self._sources(node) if self.found[n]), "")
        return operation.name if source and operation.sign is Sign.ODD else source

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        operation = self._operations[node]
        if operation.key == "scaleddotproductattention":  # a weighted average
            return [argument(node, self._bio, 2, "value")]
        sources = [n for n in node.all_input_nodes if has_activation(self._values[n])]
        if operation.is_product:
            units = [n for n in sources if held_parameter(n, self._bio, self._operations) is None]
            return units or sources
        return sources

    def _is_even_power(self, node: fx.Node) -> bool:
        exponent = argument(node, self._bio, 1, "exponent")
        is_power = self._operations[node].key in ("pow", "floatpower")
        return is_power and isinstance(exponent, int | float) and exponent % 2 == 0

    def _is_clamped(self, node: fx.Node) -> bool:
        low = argument(node, self._bio, 1, "min", "min_val")
        clamps = self._operations[node].key in ("clamp", "clip", "clampmin", "hardtanh")
        return clamps and _is_number(low) and low >= 0

    def _has_negative_number(self, node: fx.Node) -> bool:
        if not self._operations[node].takes_values:
            return False
        arguments: list[Any] = [*node.args, *node.kwargs.values()]
        values = [self._values[a] if isinstance(a, fx.Node) else a for a in arguments]
        return any(_is_number(value) and value < 0 for value in values)

    def _overshoots(self, node: fx.Node) -> bool:
        operation = self._operations[node]
        return operation.kind is Kind.WINDOW and argument(node, self._bio, 3, "mode") == "bicubic"


def input_name(placeholder: fx.Node) -> str:
    """An input in words."""
    return f"input {str(placeholder.target).lstrip('*')}"


def is_activation(value: Any) -> bool:
    """Whether a value can be the activity of units."""
    return isinstance(value, Tensor) and value.is_floating_point()


def has_activation(value: Any) -> bool:
    """Whether the activity of units can be in a value."""
    return value is UNKNOWN or any(map(is_activation, pytree.tree_leaves(value)))


def _sign_of_tensor(tensor: Any) -> str:
    if isinstance(tensor, nn.Parameter):
        return "parameter"
    return "buffer" if isinstance(tensor, Tensor) and not tensor.is_complex() and bool((tensor < 0).any()) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
