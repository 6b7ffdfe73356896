"""Recordings: what is recorded of one run of a model.

Everything that biofx knows about a model is read off such a recording: which parameters are synapses, along which axes,
whose units they read, how deep they are, and whether activity can be negative.
"""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biofx.recording.catalog import Kind, argument_positions, number_arguments

if TYPE_CHECKING:
    from torch import fx


class Depends(enum.IntEnum):
    """What the numbers in a tensor depend on, not counting its shape."""

    NOTHING = 0
    PARAMETERS = 1
    INPUTS = 2


@dataclass(eq=False, slots=True, repr=False)
class Value:
    """A tensor of the run.

    Attributes:
        index: its place in the order in which tensors appeared.
        shape: its shape.
        stride: its strides, empty if it has none.
        dtype: its dtype.
        kind: `"parameter"`, `"buffer"`, `"input"`, `"constant"` (an attribute of a module), `"unknown"` (a tensor that
            no operator of the run made, such as one that came from numpy) or `"result"`.
        name: of a parameter, buffer, attribute or input.
        depends: what its numbers depend on, when the run ended.
        view_of: the value whose memory it shares, if an operator made it as a view.
        producer: the operator that made it.
        data: the numbers of integers and booleans, on the CPU, unless there are too many.
        is_inside: whether a module of the model made it, or it was made of something that one did.
        negative: whether it has negative numbers; known of tensors that depend on nothing, and of single numbers.
    """

    index: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    name: str = ""
    depends: Depends = Depends.NOTHING
    view_of: Value | None = None
    producer: Operation | None = None
    data: Tensor | None = None
    is_inside: bool = False
    negative: bool = False

    def __repr__(self) -> str:
        return f"<{self.kind} {self.index} {self.name} {tuple(self.shape)}>"

    @property
    def is_activity(self) -> bool:
        """Whether its numbers can be the activity of units."""
        return self.dtype.is_floating_point or self.dtype.is_complex


@dataclass(eq=False, slots=True, repr=False)
class Operation:
    """One call of a dispatcher operator.

    Attributes:
        operator: the operator.
        name: its name without namespace, overload and the underscore of in-place operators.
        kind: what it does to the units of its operands.
        args: its positional arguments, with values for tensors.
        kwargs: its keyword arguments.
        outputs: the tensors that it returned, in order.
        called: the function of PyTorch that the model called.
        path: the module whose forward called it.
        place: file and line of the call in the model's source, if there is one.
        node: the node of a captured graph that it belongs to.
        operands: the tensors among its arguments.
        written: those of them that it changes in place.
        depends: what its results depend on.
    """

    operator: Any
    name: str
    kind: Kind
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Value, ...]
    called: str
    path: str
    place: tuple[str, int] | None
    node: fx.Node | None
    operands: tuple[Value, ...]
    written: tuple[Value, ...]
    depends: Depends

    def __repr__(self) -> str:
        return f"<{self.located}: {self.name}>"

    def argument(self, name: str) -> Any:
        """An argument by its name in the operator's schema; its default, or None, if it was not given."""
        position, default = argument_positions(self.operator).get(name, (len(self.args), None))
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers among its arguments that take part as entries do, by their names in the operator's schema."""
        given = {name: self.argument(name) for name in number_arguments(self.operator)}
        return {n: x for n, x in given.items() if isinstance(x, int | float) and not isinstance(x, bool)}

    @property
    def described(self) -> str:
        """The function that was called, and the module in which."""
        return f"{self.called} in {self.path}" if self.path else self.called

    @property
    def located(self) -> str:
        """The same, with the line of source."""
        return f"{self.described} ({os.path.basename(self.place[0])}:{self.place[1]})" if self.place else self.described


@dataclass(eq=False, repr=False)
class Recording:
    """One run of a model, or several after each other.

    Attributes:
        operations: the operators, in order.
        parameters: the values of parameters, by the first name.
        coordinates: for parameters in another layout than their own, where on each of their axes an entry is.
        inputs: the values of inputs.
        outputs: the tensors that the model returned.
        first_call: the arguments of the model's first call; None if its forward was not called.
        nodes: what the nodes of a captured graph computed, with values for tensors; empty if there is no graph.
        operations_of: the operators of each node.
        decisions: where Python saw numbers that depend on inputs: other inputs may take other paths there.
        changed: what changed a parameter in place, by the parameter's name; None if its data was assigned.
        listed: what computed with a parameter that forward took from `parameters()`, by the parameter's name.
        again: the operators of another run, in training mode, for weights that the first one left unused.
        strangers: the ids of tensors that were there before the run, and that belong neither to the model nor to its
            inputs.
        strange_memory: keys of the memory in which they lie.
        asked: the parameters of which Python asked for more than the numbers (see `Questions`).
    """

    operations: list[Operation] = field(default_factory=list)
    parameters: dict[str, Value] = field(default_factory=dict)
    coordinates: dict[Value, tuple[Tensor, ...]] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    first_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    nodes: dict[fx.Node, Any] = field(default_factory=dict)
    operations_of: dict[fx.Node, list[Operation]] = field(default_factory=dict)
    decisions: list[Operation] = field(default_factory=list)
    changed: dict[str, Operation | None] = field(default_factory=dict)
    listed: dict[str, Operation] = field(default_factory=dict)
    again: set[Operation] = field(default_factory=set)
    strangers: set[int] = field(default_factory=set)
    strange_memory: set[int] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)

    def attributes_read(self) -> set[str]:
        """The names of attributes whose tensors operators took, which are neither parameters nor buffers."""
        return {v.name for operation in self.operations for v in operation.operands if v.kind == "constant"}


def depends_of(value: Value) -> Depends:
    """What the numbers in a tensor depend on now: those of a view are in the tensor below it."""
    depends = value.depends
    while value.view_of is not None:
        value = value.view_of
        depends = max(depends, value.depends)
    return depends
