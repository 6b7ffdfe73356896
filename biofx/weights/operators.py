"""Weight operators: how each operator of PyTorch consumes a weight, as a function or as a dispatcher operator.

The table is by what a node calls. An entry reads one call: which argument is the weight and which the activation, and
which of their axes, and of the output's, run over units.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from biofx.chain import callee
from biofx.weights.axes import GROUP, NEITHER, Role

PRE: Role = (True, False)
POST: Role = (False, True)
BATCH, TIMES, SIDE, LENGTH = "batch", "times", "side", "length"


@dataclass(frozen=True)
class Source:
    """An activation that an operator on a weight reads.

    Attributes:
        node: the node that computes it.
        axes: its axes that run over presynaptic units, in the order of the units.
        like: its shape: lengths that the weight asks for, and names of free ones.
        is_tokens: whether it holds integers, each of which stands for a presynaptic unit that is active alone.
    """

    node: Any
    axes: tuple[int, ...]
    like: tuple[int | str, ...]
    is_tokens: bool = False


@dataclass(frozen=True)
class Call:
    """One call of an operator on a weight.

    Attributes:
        name: the operator's name in tables.
        node: the call.
        weight: the argument that is the weight.
        bias: the argument that is the bias, or None.
        sources: the activations that it reads; none of an operator inside of an island is known.
        lengths: lengths of the weight's axes, with one axis for groups and one for the units of a group.
        axes: for each of them the axis of the weight.
        roles: for each of them what it runs over.
        output_axes: axes of the output that run over postsynaptic units, in the order of the units.
        groups: the number of groups into which an axis of units is divided.
        padding: the index of the row that takes no part in learning, if there is one.
    """

    name: str
    node: fx.Node
    weight: fx.Node
    bias: Any
    sources: tuple[Source, ...]
    lengths: tuple[int, ...]
    axes: tuple[int, ...]
    roles: tuple[Role, ...]
    output_axes: tuple[int, ...]
    groups: int = 1
    padding: int | None = None

    @property
    def postsynaptic(self) -> tuple[int, ...]:
        """Positions in `lengths` that run over postsynaptic units."""
        return tuple(i for i, role in enumerate(self.roles) if role[1])

    @property
    def presynaptic(self) -> tuple[int, ...]:
        """Positions in `lengths` that run over presynaptic units."""
        return tuple(i for i, role in enumerate(self.roles) if role[0])

    @property
    def units(self) -> int:
        """Number of postsynaptic units that the output has."""
        return math.prod(self.lengths[i] for i in self.postsynaptic)

    @property
    def adjacent(self) -> int:
        """Number of units that lie beside each other on the last of the output's axes of units."""
        *outer, last = self.postsynaptic
        return self.lengths[last] * (self.groups if outer else 1)

    @property
    def source(self) -> Source | None:
        """The activation, if there is one only."""
        return self.sources[0] if len(self.sources) == 1 else None

    def without_group(self, index: int) -> Call | None:
        """The same call if one of its group axes does not tell units apart, or None if it has no axis of its own."""
        source = self.source
        if self.groups > 1 or source is None or self.roles[index] != GROUP:
            return None
        before, after = self.presynaptic.index(index), self.postsynaptic.index(index)
        axes = (*source.axes[:before], *source.axes[before + 1 :])
        return replace(
            self,
            sources=(replace(source, axes=axes),),
            roles=(*self.roles[:index], NEITHER, *self.roles[index + 1 :]),
            output_axes=(*self.output_axes[:after], *self.output_axes[after + 1 :]),
        )


@dataclass(frozen=True)
class Refusal:
    """Why an operator's weight is left alone.

    Attributes:
        reason: a clause with the parameter as "it".
        is_final: whether another use of the parameter does not make it a weight either.
    """

    reason: str
    is_final: bool = True


@dataclass(frozen=True)
class _Asked:
    """One question to the table: does this call consume that node as its weight?"""

    node: fx.Node
    weight: fx.Node
    shape: tuple[int, ...]
    is_learned: Callable[[Any], bool]
    names: tuple[str, ...]

    def __call__(self, names: str, default: Any = None) -> Any:
        """An argument by its name, or by one of several names separated by `|`."""
        alternatives = names.split("|")
        for name in alternatives:
            if name in self.node.kwargs:
                return self.node.kwargs[name]
        position = next((self.names.index(name) for name in alternatives if name in self.names), None)
        return self.node.args[position] if position is not None and position < len(self.node.args) else default

    def call(
        self,
        name: str,
        roles: Sequence[Role],
        sources: Sequence[Source],
        output_axes: Sequence[int],
        bias: Any = None,
        **others: Any,
    ) -> Call:
        """The call of an operator with one axis of the weight for each role."""
        axes = tuple(range(len(self.shape)))
        return Call(
            name, self.node, self.weight, bias, tuple(sources), self.shape, axes, tuple(roles), tuple(output_axes),
            **others,
        )  # fmt: skip


Reader = Callable[[_Asked], Call | Refusal | None]


def is_operator(node: fx.Node) -> bool:
    """Whether a node calls an operator of the table."""
    return node.target in (_METHODS if node.op == "call_method" else _TABLE)


def read(
    node: fx.Node, weight: fx.Node, shape: Sequence[int], is_learned: Callable[[Any], bool]
) -> Call | Refusal | None:
    """How a node consumes another as its weight, or None if it does not.

    Args:
        node: a node of the graph.
        weight: one of its inputs.
        shape: the weight's shape, as in the original model.
        is_learned: whether a node depends on parameters, and not on the model's inputs, so that it is no activation.
    """
    entry = _METHODS.get(str(node.target)) if node.op == "call_method" else None
    if node.op == "call_function":
        entry = _TABLE.get(node.target)
    if entry is None:
        return None
    reader, names = entry
    return reader(_Asked(node, weight, tuple(shape), is_learned, names))


def _linear(asked: _Asked) -> Call | None:
    if asked("weight") is not asked.weight or not asked.shape:
        return None
    *units, n_in = asked.shape  # a weight of one axis belongs to one unit
    source = Source(asked("input|self"), (-1,), (BATCH, TIMES, n_in))
    return asked.call("linear", [*[POST] * len(units), PRE], [source], [-1] * len(units), asked("bias"))


def _convolution(asked: _Asked) -> Call | None:
    if asked("weight") is not asked.weight:
        return None
    transposed = bool(asked("transposed", "transpose" in callee(asked.node)))
    first, second, *kernel = asked.shape
    space, groups = len(kernel), asked("groups", 1)
    roles = [GROUP, *((PRE, POST) if transposed else (POST, PRE)), *[NEITHER] * space]
    n_in = first if transposed else second * groups
    return Call(
        name=f"conv{'_transpose' if transposed else ''}{space}d",
        node=asked.node,
        weight=asked.weight,
        bias=asked("bias"),
        sources=(Source(asked("input"), (-1 - space,), (BATCH, n_in, *[SIDE] * space)),),
        lengths=(groups, first // groups, second, *kernel),
        axes=(0, 0, *range(1, 2 + space)),
        roles=tuple(roles),
        output_axes=(-1 - space,),
        groups=groups,
    )


def _product(asked: _Asked, left: str = "input", right: str = "other|mat2|vec") -> Call | Refusal | None:
    """Products of matrices: x @ W, with presynaptic units on the last axis but one of W, and W @ x, the other way."""
    operands = asked(left), asked(right)
    if asked.weight not in operands:
        return None
    is_right = operands[1] is asked.weight
    activation = operands[0 if is_right else 1]
    name = callee(asked.node).rpartition(".")[2]
    if asked.is_learned(activation):
        return Refusal(f"{name} multiplies it with what depends on parameters only, not with an activation", False)
    batch, n_in = asked.shape[:-2], asked.shape[-2 if is_right and len(asked.shape) > 1 else -1]
    # A batch axis of length 1 is stretched, so that it tells no units apart.
    outer = [GROUP if length > 1 else NEITHER for length in batch]
    grouped = [axis - len(asked.shape) for axis, role in enumerate(outer) if role == GROUP]
    axis = -1 if is_right or name == "mv" else -2
    source = Source(activation, (*grouped, axis), _operand_of_product(name, is_right, batch, n_in))
    if len(asked.shape) == 1:  # the weights of one unit, for which the output has no axis
        return asked.call(name, [PRE], [source], [])
    return asked.call(name, [*outer, *((PRE, POST) if is_right else (POST, PRE))], [source], [*grouped, axis])


def _operand_of_product(name: str, is_left: bool, batch: Sequence[int], n_in: int) -> tuple[int | str, ...]:
    """The shape of an activation; only matmul takes one with more axes than its name says."""
    if name == "mv" and not is_left:
        return (n_in,)
    if batch:
        return (*batch, LENGTH, n_in) if is_left else (*batch, n_in, LENGTH)
    if name in ("matmul", "imatmul"):
        return (BATCH, TIMES, n_in) if is_left else (BATCH, n_in, LENGTH)
    return (BATCH, n_in) if is_left else (n_in, LENGTH)


def _sum_of_product(asked: _Asked) -> Call | Refusal | None:
    """The product in addmm and baddbmm, and their bias."""
    found = _product(asked, "mat1|batch1", "mat2|batch2")
    if not isinstance(found, Call):
        return found
    factor = asked("alpha", 1)
    if not isinstance(factor, int | float) or factor <= 0:
        return Refusal(f"{found.name} multiplies it with {factor}, not with a number above 0")
    return replace(found, bias=asked("input"))


def _einsum(asked: _Asked) -> Call | Refusal | None:
    equation, *operands = asked.node.args
    if len(operands) > 0 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or operands.count(asked.weight) != 1:
        return Refusal("einsum takes it in a form that biofx cannot read", False)
    inputs, output = _parsed(equation)
    if len(inputs) != len(operands) or inputs.count("") or any(len(set(labels)) < len(labels) for labels in inputs):
        return Refusal(f"einsum with {equation!r} takes diagonals or scalars, which biofx does not follow", False)
    mine = inputs[operands.index(asked.weight)]
    others = [(n, labels) for n, labels in zip(operands, inputs, strict=True) if n is not asked.weight]
    if _REST in mine or len(mine) != len(asked.shape):
        return Refusal(f"einsum with {equation!r} leaves its axes open", False)
    if not others or any(asked.is_learned(node) for node, _ in others):
        return Refusal("einsum multiplies it with what depends on parameters only, not with an activation", False)
    read = {label for _, labels in others for label in labels}
    roles = [(label in read, label in output) for label in mine]
    pre = [label for label in mine if label in read]
    lengths = dict(zip(mine, asked.shape, strict=True))
    free = iter([BATCH, *[LENGTH] * len(equation)])
    like = {label: lengths[label] if label in lengths else next(free) for label in sorted(read - {_REST})}
    like[_REST] = TIMES
    sources = []
    for node, labels in others:
        axes = tuple(_position(labels, label) for label in pre if label in labels)
        sources.append(Source(node, axes, tuple(like[label] for label in labels)))
    return asked.call("einsum", roles, sources, [_position(output, label) for label in mine if label in output])


_REST = "…"  # stands for the ellipsis of an equation


def _parsed(equation: str) -> tuple[list[str], str]:
    """The labels of each operand and of the output."""
    left, arrow, output = equation.replace(" ", "").replace("...", _REST).partition("->")
    inputs = left.split(",")
    if not arrow:
        once = sorted(label for label in set(left) if left.count(label) == 1 and label.isalpha())
        output = (_REST if _REST in left else "") + "".join(once)
    return inputs, output


def _position(labels: str, label: str) -> int:
    """The axis of a label: counted from the end, unless axes that are left open lie there."""
    index = labels.index(label)
    return index if _REST in labels[index:] else index - len(labels)


def _bilinear(asked: _Asked) -> Call | None:
    if asked("weight") is not asked.weight:
        return None
    _, *lengths = asked.shape
    nodes = [asked("input1"), asked("input2")]
    sources = [Source(node, (-1,), (BATCH, TIMES, n)) for node, n in zip(nodes, lengths, strict=True)]
    return asked.call("bilinear", [POST, PRE, PRE], sources, [-1], asked("bias"))


def _embedding(asked: _Asked) -> Call | Refusal | None:
    if asked("weight") is not asked.weight:
        return None
    name = "embedding_bag" if "bag" in callee(asked.node) else "embedding"
    if asked("max_norm") is not None:
        return Refusal(f"{name} changes it in forward, as max_norm is set")
    if asked("sparse", False):
        return Refusal(f"{name} gives it a sparse gradient, and rules act on every entry")
    if asked("scale_grad_by_freq", False):
        return Refusal(f"{name} divides its gradient by the frequency of tokens, which is a learning rule of its own")
    like = (LENGTH,) if name == "embedding_bag" and asked("offsets") is not None else (BATCH, LENGTH)
    source = Source(asked("input|indices"), (), like, is_tokens=True)
    in_tuple = name == "embedding_bag" and isinstance(asked.node.target, torch._ops.OpOverload)
    padding = asked("padding_idx")
    padding = None if padding is None or padding < 0 else int(padding)
    return asked.call(name, [PRE, POST], [source], [] if in_tuple else [-1], padding=padding)


def _recurrent(asked: _Asked) -> Call | None:
    """A weight of a recurrent layer or cell, all of whose steps are one call: nobody sees what its units return."""
    given = asked("params|w_ih"), asked("w_hh")
    held = given[0] if isinstance(given[0], list | tuple) else given
    if asked.weight not in held or len(asked.shape) != 2:
        return None
    return asked.call(callee(asked.node).partition("_")[0].partition(".")[0], [POST, PRE], [], [])


_CONV = "input weight bias stride padding dilation groups"
_CONV_TRANSPOSE = "input weight bias stride padding output_padding groups dilation"
_EMBEDDING = "weight indices padding_idx scale_grad_by_freq sparse"
_BAG = "weight indices offsets scale_grad_by_freq mode sparse per_sample_weights include_last_offset padding_idx"
_BAG_OF_F = (
    "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights include_last_offset "
    "padding_idx"
)
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_aten = torch.ops.aten
_ROWS: list[tuple[Reader, str, list[Any]]] = [
    (_linear, "input weight bias", [F.linear, _aten.linear.default]),
    (_convolution, _CONV, [F.conv1d, F.conv2d, F.conv3d]),
    (_convolution, _CONV, [_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default]),
    (_convolution, _CONV, [_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding]),
    (_convolution, _CONV_TRANSPOSE, [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]),
    (
        _convolution,
        _CONV_TRANSPOSE,
        [_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input],
    ),
    (
        _convolution,
        "input weight bias stride padding dilation transposed output_padding groups",
        [torch.convolution, _aten.convolution.default],
    ),
    (_product, "input other", [torch.matmul, operator.matmul, operator.imatmul, _aten.matmul.default]),
    (_product, "input mat2", [torch.mm, torch.bmm, _aten.mm.default, _aten.bmm.default]),
    (_product, "input vec", [torch.mv, _aten.mv.default]),
    (_sum_of_product, "input mat1 mat2", [torch.addmm, _aten.addmm.default]),
    (_sum_of_product, "input batch1 batch2", [torch.baddbmm, _aten.baddbmm.default]),
    (_einsum, "equation operands", [torch.einsum, _aten.einsum.default]),
    (_bilinear, "input1 input2 weight bias", [F.bilinear, _aten.bilinear.default]),
    (
        _embedding,
        "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
        [F.embedding],
    ),
    (_embedding, _EMBEDDING, [torch.embedding, _aten.embedding.default]),
    (_embedding, _BAG_OF_F, [F.embedding_bag]),
    (_embedding, _BAG, [_aten.embedding_bag.default, _aten.embedding_bag.padding_idx, _aten._embedding_bag.default]),
    (_recurrent, "input hx params", [getattr(_aten, name).input for name in RECURRENT]),
    (_recurrent, "input hx params", [getattr(torch, name) for name in RECURRENT]),
    (_recurrent, "input hx w_ih w_hh", [getattr(torch, f"{name}_cell") for name in RECURRENT]),
    (
        _recurrent,
        "input hx w_ih w_hh",
        [_aten.lstm_cell.default, _aten.gru_cell.default, _aten.rnn_tanh_cell.default, _aten.rnn_relu_cell.default],
    ),
]
_TABLE: dict[Any, tuple[Reader, tuple[str, ...]]] = {
    target: (reader, tuple(names.split())) for reader, names, targets in _ROWS for target in targets
}
_METHODS = {
    function.__name__: _TABLE[function]
    for function in (torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm)
} | {"__matmul__": _TABLE[torch.matmul]}
