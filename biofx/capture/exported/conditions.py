"""Conditions: the input shapes for which an exported graph is correct."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from biofx.base.errors import CaptureError, InputError
from biofx.capture.exported.structure import Structure, read
from biofx.capture.tracer import HelperModule

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min,
    "Min": min,
    "torch.sym_min": min,
    "max": max,
    "Max": max,
    "torch.sym_max": max,
    "abs": abs,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "math.floor": math.floor,
    "math.ceil": math.ceil,
    "math.trunc": math.trunc,
}


@dataclass(frozen=True)
class Size:
    """The length of an input along an axis."""

    leaf: int
    axis: int


@dataclass(frozen=True)
class Call:
    """A function of other expressions."""

    function: Callable[..., Any]
    operands: tuple[Any, ...]


@dataclass(frozen=True)
class Condition:
    """A condition on the shapes of inputs.

    Attributes:
        text: the condition for messages, with `{0}` for the name of the first input.
        expression: the condition as a `Call`.
    """

    text: str
    expression: Any

    def holds(self, leaves: Sequence[Tensor]) -> bool:
        """Whether the inputs satisfy the condition."""
        return bool(_value(self.expression, leaves))


def _value(expression: Any, leaves: Sequence[Tensor]) -> Any:
    if isinstance(expression, Size):
        return leaves[expression.leaf].shape[expression.axis]
    if isinstance(expression, Call):
        return expression.function(*[_value(operand, leaves) for operand in expression.operands])
    return expression


def has_length(leaf: int, axis: int, relation: Callable[..., Any], number: int) -> Condition:
    """Return a condition on the length of one axis, such as `operator.eq` and 3."""
    sign = {operator.eq: "==", operator.ge: ">=", operator.le: "<="}[relation]
    return Condition(f"{{{leaf}}}.shape[{axis}] {sign} {number}", Call(relation, (Size(leaf, axis), number)))


def parsed(guard: str, inputs: str) -> Condition:
    """Parse a guard of torch.export, such as `L['inputs'][0].size()[1] <= 16`.

    Args:
        guard: Python code.
        inputs: the name of the tuple of all input tensors in that code.

    Raises:
        CaptureError: the guard is not a condition on shapes of inputs.
    """
    sizes: list[Size] = []

    def refuse() -> CaptureError:
        return CaptureError(f"torch.export assumes {guard}, which biofx cannot check; {INSTEAD}")

    def size(node: ast.AST) -> Size | None:
        match node:
            case ast.Subscript(
                ast.Call(
                    ast.Attribute(
                        ast.Subscript(ast.Subscript(ast.Name("L"), ast.Constant(name)), ast.Constant(leaf)), "size"
                    ),
                    [],
                ),
                ast.Constant(axis),
            ) if name == inputs:
                return Size(int(leaf), int(axis))  # type: ignore[arg-type]
        return None

    def expression(node: ast.AST) -> Any:
        found = size(node)
        if found is not None:
            sizes.append(found)
            return found
        match node:
            case ast.Constant(value):
                return value
            case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
                return Call(_OPERATORS[type(op)], (expression(left), expression(right)))
            case ast.UnaryOp(op, operand) if type(op) in _OPERATORS:
                return Call(_OPERATORS[type(op)], (expression(operand),))
            case ast.Compare(left, [op], [right]) if type(op) in _OPERATORS:
                return Call(_OPERATORS[type(op)], (expression(left), expression(right)))
            case ast.BoolOp(op, values):
                return Call(_all if isinstance(op, ast.And) else _any, tuple(map(expression, values)))
            case ast.Call(function, operands) if ast.unparse(function) in _FUNCTIONS:
                return Call(_FUNCTIONS[ast.unparse(function)], tuple(map(expression, operands)))
        raise refuse()

    tree = ast.parse(guard.strip(), mode="eval").body
    condition = expression(tree)
    text = ast.unparse(tree).replace("torch.sym_", "")
    for found in sizes:
        text = text.replace(
            f"L['{inputs}'][{found.leaf}].size()[{found.axis}]", f"{{{found.leaf}}}.shape[{found.axis}]"
        )
    return Condition(text, condition)


INSTEAD = 'try frontend="module", which keeps the Python of the model, or frontend="symbolic"'


def _all(*values: Any) -> bool:
    return all(values)


def _any(*values: Any) -> bool:
    return any(values)


class CheckInputs(HelperModule):
    """Raises for inputs on which the graph may differ from the model.

    Attributes:
        arguments: the structure of each argument of forward, by its name.
        names: the name of each input tensor.
        kinds: the number of axes and the dtype of each input tensor.
        in_training: the conditions on their shapes in training mode.
        in_evaluation: the conditions on their shapes in evaluation mode.
        dtype: the dtype of the model when it was captured.
        is_named: whether the graph contains that dtype as a constant.
        like: an empty buffer, whose dtype follows conversions of the model; None if the model has no such dtype.
    """

    like: Tensor | None

    _is_impure = True  # `fx.Graph.eliminate_dead_code` keeps it, although its result is unused

    def __init__(
        self,
        arguments: dict[str, Structure],
        names: Sequence[str],
        leaves: Sequence[Tensor],
        in_training: Sequence[Condition],
        in_evaluation: Sequence[Condition],
    ) -> None:
        super().__init__()
        self.arguments = arguments
        self.names = tuple(names)
        self.kinds = tuple((leaf.dim(), leaf.dtype) for leaf in leaves)
        self.in_training = tuple(in_training)
        self.in_evaluation = tuple(in_evaluation)
        self.dtype: torch.dtype | None = None
        self.is_named = False
        self.register_buffer("like", None, persistent=False)

    def follow_dtype(self, like: Tensor, is_named: bool) -> None:
        """Expect the current dtype of the model where inputs had its dtype; raise if the graph names that dtype."""
        self.dtype, self.is_named = like.dtype, is_named
        self.like = torch.empty(0, dtype=like.dtype, device=like.device)

    def forward(self, *values: Any) -> None:
        """Check the arguments of forward.

        Raises:
            InputError: the graph is not correct for them.
        """
        own = None if self.like is None else self.like.dtype
        if self.is_named and own != self.dtype:
            raise InputError(
                f"the graph contains {self.dtype}, in which it was captured, and the model is in {own}; "
                "convert the original model, then transform it"
            )
        found = [read(self.arguments[name], value, name) for name, value in zip(self.arguments, values, strict=True)]
        leaves = [leaf for group in found for leaf in group]
        if any(isinstance(leaf, fx.Proxy) for leaf in leaves):  # the graph is traced again
            return
        for name, leaf, (rank, dtype) in zip(self.names, leaves, self.kinds, strict=True):
            if leaf.dim() != rank:
                self._refuse(f"{rank} axes of {name}, which has {leaf.dim()}", leaves)
            expected = own if dtype == self.dtype else dtype
            if leaf.dtype != expected:
                self._refuse(f"{expected} as the dtype of {name}, which is {leaf.dtype}", leaves)
        for condition in self.in_training if self.training else self.in_evaluation:
            if not condition.holds(leaves):
                self._refuse(condition.text.format(*self.names), leaves)

    def _refuse(self, expected: str, leaves: Sequence[Tensor]) -> None:
        shapes = ", ".join(f"{name} has shape {tuple(x.shape)}" for name, x in zip(self.names, leaves, strict=True))
        raise InputError(
            f"forward was captured for {expected}: {shapes}; "
            'transform the model with example_inputs of these shapes, or with frontend="module", which takes any'
        )

    def extra_repr(self) -> str:
        """The conditions in evaluation mode."""
        return ", ".join(condition.text.format(*self.names) for condition in self.in_evaluation)


def without_duplicates(conditions: Sequence[Condition]) -> list[Condition]:
    """Return the conditions without duplicates."""
    return list({condition.text: condition for condition in conditions}.values())
