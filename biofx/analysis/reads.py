"""Reads: how an operator reads a parameter as its weight, and along which axes of the parameter its units lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from biofx.analysis.layouts import compressed, once, varies
from biofx.recording.catalog import Kind
from biofx.recording.operations import Depends, Operation, Value
from biofx.weights.axes import GROUP, NEITHER, Axes, Factor, Role, factors_of

PRE: Role = (True, False)
POST: Role = (False, True)


@dataclass(frozen=True, eq=False)
class Form:
    """A tensor whose entries are those of a parameter.

    Attributes:
        parameter: the parameter's value.
        shape: the parameter's shape.
        coordinates: for each axis of the parameter, where on it an entry is, in the shape of the tensor.
        remark: why an entry may have another sign than that of the parameter, or an empty string.
        beside: what is computed from other parameters and joined with its entries, if anything.
        is_stacked: whether the synapses of a connection lie next to each other, as entries of their own.
    """

    parameter: Value
    shape: tuple[int, ...]
    coordinates: tuple[Tensor, ...]
    remark: str = ""
    beside: Mixture | None = None
    is_stacked: bool = False


@dataclass(frozen=True, eq=False)
class Mixture:
    """A tensor that is computed from parameters, with entries that stand for no single entry of theirs.

    Attributes:
        parameters: the parameters.
        made_by: the first operator after which entries stand for none of theirs.
    """

    parameters: frozenset[Value]
    made_by: Operation

    @property
    def reason(self) -> str:
        """What computes it, as a clause."""
        return f"{self.made_by.described} computes the weight that its operator reads from it"


@dataclass(frozen=True, eq=False)
class Read:
    """One operator that reads a form as its weight.

    Attributes:
        operation: the operator.
        form: the form.
        weight: the tensor that has this form.
        lengths: lengths of the form's axes, with one axis for groups and one for the units of a group.
        parts: for each of these axes the form's axis.
        coordinates: the form's coordinates in these lengths.
        roles: for each of these axes what it runs over.
        source: the activity that the operator multiplies the weight by; None if it looks up rows.
        source_axes: its axes that run over presynaptic units, in the order of the units.
        output: what the operator returns.
        output_axes: its axes that run over postsynaptic units, in the order of the units.
        groups: the number of groups into which the operator divides an axis of units.
        padding: the index of the row that takes no part in learning, if there is one.
        others: other activities that the operator multiplies.
        mixture: what is read, if its entries stand for none of a parameter: its form is that of the tensor itself.
    """

    operation: Operation
    form: Form
    weight: Value
    lengths: tuple[int, ...]
    parts: tuple[int, ...]
    coordinates: tuple[Tensor, ...]
    roles: tuple[Role, ...]
    source: Value | None
    source_axes: tuple[int, ...]
    output: Value
    output_axes: tuple[int, ...]
    groups: int = 1
    padding: int | None = None
    others: tuple[Value, ...] = ()
    mixture: Mixture | None = None

    @property
    def parameter(self) -> Value:
        """The parameter that is read."""
        return self.form.parameter

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters that are in what is read, the one whose entries it has first."""
        own = [] if self.mixture is not None else [self.parameter.name]
        mixtures = filter(None, (self.mixture, self.form.beside))
        return (*own, *sorted({parameter.name for mixture in mixtures for parameter in mixture.parameters}))

    @property
    def layout(self) -> tuple[Any, ...]:
        """What is equal for uses that have entries in the same places; while they are there, as it has their ids."""
        places = map(id, (*self.form.coordinates, *self.coordinates))
        return self.form.shape, self.form.is_stacked, self.lengths, self.parts, self.roles, *places

    def axes(self) -> Axes | None:
        """The axes of the parameter, as this operator sees them, or None if they cannot be told."""
        if not self.form.is_stacked and self._has_shared_entries():
            return None
        permuted = self._permuted()
        if permuted is not None:
            return permuted
        factors: list[Factor] = []
        for axis, length in enumerate(self.form.shape):
            found = _factors(axis, length, self.coordinates[axis], self.roles)
            if found is None:
                return None
            factors += found
        return Axes(self.form.shape, tuple(factors))

    def _has_shared_entries(self) -> bool:
        """Whether many units have the same entries, as in an expanded weight."""
        of_units = [i for i, role in enumerate(self.roles) if any(role) and self.lengths[i] > 1]
        return any(not any(varies(coordinate, i) for coordinate in self.coordinates) for i in of_units)

    def _permuted(self) -> Axes | None:
        """The axes, if the form is the parameter with its axes in another order."""
        shape = self.form.coordinates[0].shape if self.form.coordinates else ()
        places: dict[int, int] = {}
        for axis, (length, coordinate) in enumerate(zip(self.form.shape, self.form.coordinates, strict=True)):
            along = [i for i in range(len(shape)) if varies(coordinate, i)]
            if length > 1 and (len(along) != 1 or shape[along[0]] != length or not _is_in_order(coordinate, along[0])):
                return None
            if length > 1:
                places[axis] = along[0]
        if len(set(places.values())) < len(places):
            return None
        single = iter([i for i in range(len(shape)) if i not in places.values() and shape[i] == 1])
        places |= {
            axis: i for axis in range(len(self.form.shape)) if axis not in places and (i := next(single, -1)) >= 0
        }
        if len(places) != len(self.form.shape) or len(shape) != len(places):
            return None
        factors = [
            Factor(axis, self.lengths[index], *self.roles[index])
            for axis, place in sorted(places.items())
            for index, part in enumerate(self.parts)
            if part == place
        ]
        return Axes(self.form.shape, tuple(factors))

    def presynaptic_positions(self, axes: Axes) -> Tensor:
        """The parameter's presynaptic unit at each presynaptic position of this use."""
        return self._positions(axes.spread_presynaptic(torch.arange(axes.presynaptic_units)), 0)

    def postsynaptic_positions(self, axes: Axes) -> Tensor:
        """The parameter's postsynaptic unit at each postsynaptic position of this use."""
        return self._positions(axes.spread(torch.arange(axes.units)), 1)

    def _positions(self, units: Tensor, side: int) -> Tensor:
        kept = [role[side] for role in self.roles]
        index = []
        for axis, coordinate in enumerate(self.coordinates):
            for i, is_kept in enumerate(kept):
                if not is_kept:
                    coordinate = coordinate.narrow(i, 0, min(1, coordinate.shape[i]))
            index.append(coordinate if units.shape[axis] > 1 else torch.zeros((), dtype=torch.int64))
        found = units[tuple(index)] if index else units
        shape = [length if is_kept else 1 for length, is_kept in zip(self.lengths, kept, strict=True)]
        return found.expand(shape).flatten()


def _is_in_order(coordinate: Tensor, axis: int) -> bool:
    line = coordinate.movedim(axis, 0).reshape(coordinate.shape[axis], -1)[:, 0]
    return torch.equal(line, torch.arange(len(line)))


def _factors(axis: int, length: int, coordinate: Tensor, roles: Sequence[Role]) -> list[Factor] | None:
    """How an axis of a parameter is divided among the axes of a form, from the coordinates on it."""
    along = [i for i in range(coordinate.dim()) if varies(coordinate, i)]
    if not along:  # where one index of an axis was selected, each index has units of its own, as in a group
        ones = [role for i, role in enumerate(roles) if coordinate.shape[i] == 1]
        return [Factor(axis, length, *(GROUP if length > 1 else ones[0] if ones else NEITHER))]
    kinds = {roles[i] for i in along}
    if len(kinds) == 1:
        return [Factor(axis, length, *kinds.pop())]
    (small,) = once(coordinate)
    origin = small[(0,) * small.dim()]
    lines = {
        i: small[tuple(slice(None) if i == j else slice(0, 1) for j in range(small.dim()))] - origin for i in along
    }
    if not torch.equal(sum(lines.values(), origin), small):  # each axis adds what it adds, whatever the others do
        return None
    pieces = []
    for i, line in lines.items():
        values = line.unique()
        step = int(values[1] - values[0])
        if not torch.equal(values, step * torch.arange(len(values))):
            return None
        pieces.append((step, step * len(values), roles[i]))
    return factors_of(axis, length, sorted(pieces))


def form_of_parameter(value: Value, known: tuple[Tensor, ...] | None) -> Form:
    """The form of a parameter itself; `known` has the coordinates of the connections, if it is split into synapses."""
    if known is not None:
        shape = tuple(int(c.max()) + 1 if c.numel() else 0 for c in known)
        return Form(value, shape, tuple(map(compressed, known)), is_stacked=True)
    rank = len(value.shape)
    axes = [torch.arange(n).view([-1 if i == axis else 1 for i in range(rank)]) for axis, n in enumerate(value.shape)]
    return Form(value, tuple(value.shape), tuple(axis.expand(value.shape) for axis in axes))


def _form(value: Value, known: Form | Mixture) -> Form:
    """The form of a tensor; that of itself, if its entries are those of no parameter."""
    return known if isinstance(known, Form) else form_of_parameter(value, None)


def reads_of(operation: Operation, found: dict[Value, Form | Mixture]) -> Iterator[Read]:
    """How an operator reads forms as weights, and what is computed from parameters in other ways."""
    if operation.name == "_trilinear":
        yield from _trilinear(operation, found)
        return
    if looks_up(operation) and isinstance(form := found.get(operation.operands[0]), Form):
        rank = len(form.coordinates[0].shape)
        axes = tuple(range(1 - rank, 0))
        yield _read(
            operation, operation.operands[0], form, (PRE, *[POST] * (rank - 1)), None, (), operation.outputs[0], axes
        )
        return
    for name, others in _OPERANDS.get(operation.name, ()):
        weight, source = operation.argument(name), operation.argument(others)
        form = found.get(weight) if isinstance(weight, Value) else None
        if form is None or (
            isinstance(source, Value) and source in found and name != _WEIGHT.get(operation.name, name)
        ):
            continue
        read = _described(operation, weight, _form(weight, form), name, source)
        yield replace(read, mixture=form) if isinstance(form, Mixture) else read


def looks_up(operation: Operation) -> bool:
    """Whether inputs select rows of a tensor, as in an embedding."""
    if operation.name == "index":
        first, *others = operation.argument("indices")
        is_rows = isinstance(first, Value) and first.dtype is not torch.bool and not any(others)
        return is_rows and first.depends is Depends.INPUTS
    if operation.name == "index_select":
        return operation.argument("dim") == 0 and operation.argument("index").depends is Depends.INPUTS
    return False


# The operands that may be weights, each with the operand that is the activity then.
_OPERANDS: dict[str, tuple[tuple[str, str], ...]] = {
    "mm": (("mat2", "self"), ("self", "mat2")),
    "bmm": (("mat2", "self"), ("self", "mat2")),
    "addmm": (("mat2", "mat1"), ("mat1", "mat2")),
    "baddbmm": (("batch2", "batch1"), ("batch1", "batch2")),
    "addbmm": (("batch2", "batch1"), ("batch1", "batch2")),
    "mv": (("self", "vec"), ("vec", "self")),
    "addmv": (("mat", "vec"), ("vec", "mat")),
    "dot": (("tensor", "self"), ("self", "tensor")),
    "convolution": (("weight", "input"),),
    "mkldnn_convolution": (("weight", "input"),),
    "embedding": (("weight", "indices"),),
    "_embedding_bag": (("weight", "indices"),),
    "_embedding_bag_forward_only": (("weight", "indices"),),
}
_WEIGHT = {"mm": "mat2", "bmm": "mat2", "addmm": "mat2", "baddbmm": "batch2", "mv": "self"}  # if both are parameters


def bias_of(operation: Operation) -> Value | None:
    """The bias that an operator on weights adds."""
    name = {"addmm": "self", "baddbmm": "self", "addmv": "self", "convolution": "bias"}.get(operation.name)
    found = operation.argument(name) if name else None
    return found if isinstance(found, Value) else None


def _described(operation: Operation, weight: Value, form: Form, name: str, source: Value) -> Read:
    output = operation.outputs[0]
    if operation.kind is Kind.CONVOLUTION:
        return _convolution(operation, weight, form, source, output)
    if operation.kind is Kind.EMBEDDING:
        rank, bag = len(form.coordinates[0].shape), operation.name != "embedding"
        padding = operation.argument("padding_idx")
        axes = tuple(range(1 - rank, 0)) if not bag else (-1,)
        known = padding if padding is not None and padding >= 0 else None
        return _read(operation, weight, form, (PRE, *[POST] * (rank - 1)), None, (), output, axes, padding=known)
    rank = len(form.coordinates[0].shape) if form.coordinates else 0
    is_right = name in ("mat2", "batch2", "vec", "tensor")
    if rank == 1:
        return _read(operation, weight, form, (PRE,), source, (-1,), output, ())
    if operation.name in ("mv", "addmv"):
        return _read(operation, weight, form, (POST, PRE), source, (-1,), output, (-1,))
    axis = -1 if is_right else -2
    roles: list[Role] = [PRE, POST] if is_right else [POST, PRE]
    batch = [0] if rank == 3 and any(varies(c, 0) for c in form.coordinates) else []
    roles = [GROUP if batch else NEITHER, *roles] if rank == 3 else roles
    sums_over_batch = operation.name == "addbmm"
    if sums_over_batch and batch:
        roles[0] = PRE
    return _read(
        operation,
        weight,
        form,
        tuple(roles),
        source,
        (*batch, axis),
        output,
        (*([] if sums_over_batch else batch), axis),
    )


def _convolution(operation: Operation, weight: Value, form: Form, source: Value, output: Value) -> Read:
    transposed = bool(operation.argument("transposed"))
    groups = int(operation.argument("groups"))
    first, second, *kernel = form.coordinates[0].shape
    lengths = (groups, first // groups, second, *kernel)
    coordinates = tuple(c.reshape(lengths) if groups > 1 else c.unsqueeze(0) for c in form.coordinates)
    roles = (GROUP, *((PRE, POST) if transposed else (POST, PRE)), *[NEITHER] * len(kernel))
    read = _read(operation, weight, form, roles, source, (1,), output, (1,), groups)
    return replace(
        read, lengths=lengths, parts=(0, *range(len(lengths) - 1)), coordinates=tuple(map(compressed, coordinates))
    )


def _trilinear(operation: Operation, found: dict[Value, Form | Mixture]) -> Iterator[Read]:
    """`bilinear`, which multiplies a weight (out, in1, in2) by two activities."""
    first, weight, second = (operation.argument(f"i{i}") for i in (1, 2, 3))
    known = found.get(weight)
    if known is None:
        return
    form = _form(weight, known)
    coordinates = tuple(c.squeeze(0) for c in form.coordinates) if form.coordinates[0].dim() == 4 else form.coordinates
    form = replace(form, coordinates=coordinates)
    output = operation.outputs[0]
    read = _read(operation, weight, form, (POST, PRE, PRE), first, (-1,), output, (-1,), others=(second,))
    yield replace(read, mixture=known) if isinstance(known, Mixture) else read


def _read(
    operation: Operation,
    weight: Value,
    form: Form,
    roles: Sequence[Role],
    source: Value | None,
    source_axes: tuple[int, ...],
    output: Value,
    output_axes: tuple[int, ...],
    groups: int = 1,
    padding: int | None = None,
    others: tuple[Value, ...] = (),
) -> Read:
    lengths = tuple(form.coordinates[0].shape) if form.coordinates else ()
    return Read(
        operation, form, weight, lengths, tuple(range(len(lengths))), form.coordinates, tuple(roles), source,
        source_axes,
        output, output_axes, groups, padding, others,
    )  # fmt: skip
