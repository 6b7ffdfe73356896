"""Conditions: the input shapes for which an exported graph is correct."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from biofx.base.errors import CaptureError, InputError
from biofx.capture.exported.structure import Structure, read
from biofx.capture.tracer import HelperModule

INSTEAD = 'try frontend="module", which keeps the Python of the model, or frontend="symbolic"'

# The names in guards of torch.export, which writes `torch.sym_min` for `min`
_NAMES: dict[str, Any] = {
    "min": min,
    "Min": min,
    "max": max,
    "Max": max,
    "abs": abs,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "math": math,
}
_SIZE = re.compile(r"L\['leaves'\]\[(\d+)\]\.size\(\)\[(\d+)\]")


class Condition:
    """A condition on the shapes of inputs.

    Attributes:
        text: the condition as Python code, with `{0}` for the first input.
        holds: tells whether the inputs satisfy the condition.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        code = re.sub(r"\{(\d+)\}", r"leaves[\1]", text)
        # Made once: torch.compile can follow the function, but no call of `eval`.
        self.holds: Callable[[Sequence[Tensor]], bool] = eval(f"lambda leaves: {code}", dict(_NAMES))

    def __reduce__(self) -> tuple[Any, ...]:
        return Condition, (self.text,)  # pickle cannot save the function


def text_of(guard: str) -> str:
    """The text of a condition, from a guard of torch.export, such as `L['leaves'][0].size()[1] <= 16`.

    Raises:
        CaptureError: the guard is not a condition on shapes of inputs.
    """
    code = ast.unparse(ast.parse(guard.strip(), mode="eval")).replace("torch.sym_", "")
    text = _SIZE.sub(r"{\1}.shape[\2]", code)
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}  # it reads `{0}` as a set
    if not names <= _NAMES.keys():
        raise CaptureError(f"torch.export assumes {guard}, which biofx cannot check; {INSTEAD}")
    return text


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
