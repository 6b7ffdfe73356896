"""Reads: how an operator reads a parameter as its weight, and along which axes of the parameter its units lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from biofx.analysis.layouts import compressed, once, varies
from biofx.recording.catalog import Kind
from biofx.recording.operations import Depends, Operation, Value
from biofx.weights.axes import GROUP, Axes, Factor, Role


@dataclass(frozen=True, eq=False)
class Form:
    """A tensor whose entries are those of a parameter.

    Attributes:
        parameter: the parameter's value.
        shape: the parameter's shape.
        coordinates: for each axis of the parameter, where on it an entry is, in the shape of the tensor.
        remark: why an entry may have another sign than that of the parameter, or an empty string.
        joined_with: what is computed from other parameters and joined with its entries, if anything.
        is_stacked: whether the synapses of a connection lie next to each other, as entries of their own.
    """

    parameter: Value
    shape: tuple[int, ...]
    coordinates: tuple[Tensor, ...]
    remark: str = ""
    joined_with: Mixture | None = None
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
class WeightRead:
    """One operator that reads a form as its weight.

    Attributes:
        operation: the operator.
        weight: the tensor that it reads.
        form: the form of that tensor.
        lengths: lengths of the tensor's axes, with one axis for groups and one for the units of a group.
        parts: for each of these axes the tensor's axis.
        roles: for each of these axes what it runs over.
        source: the activity that the operator multiplies the weight by; None if it looks up rows.
        source_axes: its axes that run over presynaptic units, in the order of the units, counted from the end.
        output_axes: the same of the axes of the result and postsynaptic units.
        groups: the number of groups into which the operator divides an axis of units.
        padding: the index of the row that takes no part in learning, if there is one.
        others: other activities that the operator multiplies.
        mixture: what is read, if its entries stand for none of a parameter: its form is that of the tensor itself.
    """

    operation: Operation
    weight: Value
    form: Form
    lengths: tuple[int, ...]
    parts: tuple[int, ...]
    roles: tuple[Role, ...]
    source: Value | None
    source_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    groups: int
    padding: int | None
    others: tuple[Value, ...]
    mixture: Mixture | None

    @property
    def output(self) -> Value:
        """What the operator returns."""
        return self.operation.outputs[0]

    @cached_property
    def coordinates(self) -> tuple[Tensor, ...]:
        """The form's coordinates in the lengths of the axes."""
        if self.lengths == tuple(self.weight.shape):
            return self.form.coordinates
        return tuple(compressed(coordinate.reshape(self.lengths)) for coordinate in self.form.coordinates)

    def count(self, side: int) -> int:
        """The number of presynaptic positions (side 0) or postsynaptic ones (side 1)."""
        return math.prod(n for n, role in zip(self.lengths, self.roles, strict=True) if role[side])

    @property
    def parameter(self) -> Value:
        """The parameter that is read."""
        return self.form.parameter

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters that are in what is read, the one whose entries it has first."""
        own = [] if self.mixture is not None else [self.parameter.name]
        mixtures = filter(None, (self.mixture, self.form.joined_with))
        return (*own, *sorted({parameter.name for mixture in mixtures for parameter in mixture.parameters}))

    def axes(self) -> Axes | None:
        """The axes of the parameter, as this operator sees them, or None if they are unknown."""
        if not self.form.is_stacked and self._has_shared_entries():
            return None
        singles = iter([axis for axis, length in enumerate(self.weight.shape) if length == 1])
        factors: list[Factor] = []
        for axis, length in enumerate(self.form.shape):
            found = self._factors(axis, length, singles)
            if found is None:
                return None
            factors += found
        return Axes(self.form.shape, tuple(factors))

    def _has_shared_entries(self) -> bool:
        """Whether many units have the same entries, as in an expanded weight."""
        of_units = [i for i, role in enumerate(self.roles) if any(role) and self.lengths[i] > 1]
        return any(not any(varies(coordinate, i) for coordinate in self.coordinates) for i in of_units)

    def _factors(self, axis: int, length: int, singles: Iterator[int]) -> list[Factor] | None:
        """How an axis of the parameter is divided among the axes of its form, from the coordinates on it.

        Coordinates cannot identify axes of length 1, so these are taken in order from `singles`.
        """
        coordinate = self.coordinates[axis]
        along = [i for i in range(coordinate.dim()) if varies(coordinate, i)]
        if not along and length > 1:  # one index was selected: each has units of its own, as in a group
            return [Factor(axis, length, *GROUP)]
        parts = {self.parts[i] for i in along} or {next(singles, -1)}
        beside = [i for i, part in enumerate(self.parts) if part in parts and self.lengths[i] == 1]
        single = [Factor(axis, 1, *self.roles[i]) for i in beside]
        if len({self.roles[i] for i in along}) < 2:
            return [*(Factor(axis, length, *self.roles[i]) for i in along[:1]), *single] or [Factor(axis, length)]
        (small,) = once(coordinate)
        origin = small[(0,) * small.dim()]
        lines = {
            i: small[tuple(slice(None) if i == j else slice(0, 1) for j in range(small.dim()))] - origin for i in along
        }
        if not torch.equal(sum(lines.values(), origin), small):  # each axis contributes independently of the others
            return None
        pieces: list[tuple[int, int, Role]] = []  # first step, end, and role, from the inner axis to the outer one
        for i, line in lines.items():
            values = line.unique()
            step = int(values[1] - values[0])
            if not torch.equal(values, step * torch.arange(len(values))):
                return None
            pieces.append((step, step * len(values), self.roles[i]))
        pieces.sort()
        bounds = [1, *(start for start, _, _ in pieces[1:]), length]
        if any(b % a for a, b in pairwise(bounds)) or any(end > bounds[i + 1] for i, (_, end, _) in enumerate(pieces)):
            return None
        sizes = [b // a for a, b in pairwise(bounds)]
        return [*(Factor(axis, n, *role) for n, (_, _, role) in zip(sizes, pieces, strict=True)), *single][::-1]

    def placed(self, numbers: Tensor) -> Tensor:
        """Numbers of the postsynaptic units where they are in what the operator returns, expanded along other axes."""
        shape = self.output.shape
        axes = [axis % len(shape) for axis in self.output_axes]
        order = sorted(range(len(axes)), key=axes.__getitem__)
        full = [length if axis in axes else 1 for axis, length in enumerate(shape)]
        return numbers.reshape([shape[axis] for axis in axes]).permute(order).reshape(full).expand(shape)

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


def form_of_parameter(value: Value, known: tuple[Tensor, ...] | None) -> Form:
    """The form of a parameter itself; `known` has the coordinates of the connections, if it is split into synapses."""
    if known is not None:
        shape = tuple(int(c.max()) + 1 if c.numel() else 0 for c in known)
        return Form(value, shape, tuple(map(compressed, known)), is_stacked=True)
    rank = len(value.shape)
    axes = [torch.arange(n).view([-1 if i == axis else 1 for i in range(rank)]) for axis, n in enumerate(value.shape)]
    return Form(value, tuple(value.shape), tuple(axis.expand(value.shape) for axis in axes))


def read_of(operation: Operation, found: Mapping[Value, Form | Mixture]) -> WeightRead | None:
    """How an operator reads a form, or what is computed from parameters in another way, as its weight."""
    for name, source, equation in _ways(operation):
        weight = operation.argument(name)
        known = found.get(weight) if isinstance(weight, Value) else None
        if known is not None and not (operation.kind is Kind.LAYOUT and isinstance(known, Mixture)):
            return _read(operation, weight, known, operation.argument(source) if source else None, equation)
    return None


def looks_up(operation: Operation) -> bool:
    """Whether inputs select rows of a tensor, as in an embedding."""
    if operation.name == "index":
        first, *others = operation.argument("indices")
        is_rows = isinstance(first, Value) and first.dtype is not torch.bool and not any(others)
        return is_rows and first.depends is Depends.INPUTS
    if operation.name == "index_select":
        return operation.argument("dim") == 0 and operation.argument("index").depends is Depends.INPUTS
    return False


# Ways in which operators read weights: the names of the weight and of the activity among their arguments, and what they
# compute, in the notation of einsum: with a word for each axis of the weight, of the activities and of the result, a
# letter for each factor of an axis, g for groups, and a star for all axes that are left.
_Way = tuple[str, str, str]
_MATRICES = "i o, n i -> n o", "o i, i n -> o n"
_GROUPS = "g i o, g n i -> g n o", "g o i, g i n -> g o n"
_SUMS = "g i o, g n i -> n o", "g o i, g i n -> o n"
_VECTORS = "o i, i -> o", "i, n i -> n"


def _either(first: str, second: str, equations: tuple[str, str]) -> tuple[_Way, _Way]:
    """Either of two operands is the weight; if both may be, the first one is."""
    return (first, second, equations[0]), (second, first, equations[1])


_WAYS: dict[str, tuple[_Way, ...]] = {
    "mm": _either("mat2", "self", _MATRICES),
    "addmm": _either("mat2", "mat1", _MATRICES),
    "bmm": _either("mat2", "self", _GROUPS),
    "baddbmm": _either("batch2", "batch1", _GROUPS),
    "addbmm": _either("batch2", "batch1", _SUMS),
    "mv": _either("self", "vec", _VECTORS),
    "addmv": _either("mat", "vec", _VECTORS),
    "dot": _either("tensor", "self", ("i, i ->", "i, i ->")),
    "_trilinear": (("i2", "i1", "o i j, * i, * j -> * o"),),
}


def _ways(operation: Operation) -> tuple[_Way, ...]:
    if operation.kind is Kind.CONVOLUTION:
        weight = "gi o *" if operation.argument("transposed") else "go i *"
        return (("weight", "input", f"{weight}, n gi * -> n go *"),)
    if operation.kind is Kind.EMBEDDING or looks_up(operation):
        name = "weight" if operation.kind is Kind.EMBEDDING else "self"
        units = " ".join("abcdefhjklm"[: len(operation.argument(name).shape) - 1])
        return ((name, "", f"i {units}, i -> * {units}"),)
    return _WAYS.get(operation.name, ())


def _words(text: str, rank: int) -> list[str]:
    """The letters of each axis."""
    words = text.split()
    return [axis for word in words for axis in (["*"] * (rank - len(words) + 1) if word == "*" else [word])]


def _read(
    operation: Operation, weight: Value, known: Form | Mixture, source: Value | None, equation: str
) -> WeightRead:
    form = known if isinstance(known, Form) else form_of_parameter(weight, None)
    given, _, returned = equation.partition("->")
    first, *activities = given.split(",")
    groups = int(operation.argument("groups")) if operation.kind is Kind.CONVOLUTION else 1
    letters, lengths, parts = list[str](), list[int](), list[int]()
    for axis, (word, length) in enumerate(zip(_words(first, len(weight.shape)), weight.shape, strict=True)):
        is_batch = word == "g" and not any(varies(coordinate, axis) for coordinate in form.coordinates)
        letters += "*" if is_batch else word
        lengths += [length] if len(word) == 1 else [groups if letter == "g" else length // groups for letter in word]
        parts += [axis] * len(word)
    padding = operation.argument("padding_idx") if operation.kind is Kind.EMBEDDING else None

    def axes(text: str, value: Value | None) -> tuple[int, ...]:
        words = _words(text, len(value.shape) if value is not None else 1)
        return tuple(
            i - len(words) for i, word in enumerate(words) if not set(letters).isdisjoint(word) and word != "*"
        )

    return WeightRead(
        operation, weight, form, tuple(lengths), tuple(parts),
        roles=tuple((x in "".join(activities) and x != "*", x in returned and x != "*") for x in letters),
        source=source,
        source_axes=axes(activities[0], source) if source is not None else (),
        output_axes=axes(returned, operation.outputs[0]),
        groups=groups,
        padding=padding if padding is not None and padding >= 0 else None,
        others=(operation.argument("i3"),) if activities[1:] else (),
        mixture=known if isinstance(known, Mixture) else None,
    )  # fmt: skip


def bias_of(operation: Operation) -> Value | None:
    """The bias that an operator on weights adds."""
    name = {"addmm": "self", "baddbmm": "self", "addmv": "self", "convolution": "bias"}.get(operation.name)
    found = operation.argument(name) if name else None
    return found if isinstance(found, Value) else None
