"""Forms: where the entries of parameters are in the tensors that a run computes from them.

A tensor in which every entry stands for one entry of a parameter is a *form* of it. It has a tensor of coordinates for
each axis of the parameter. Layout operators are executed on the coordinates; pointwise operators keep them. `reads.py`
says how an operator reads a form as its weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch

from biofx.analysis.layouts import CannotFollowError, rearranged
from biofx.analysis.reads import Form, Mixture, WeightRead, bias_of, form_of_parameter, looks_up, read_of
from biofx.recording.catalog import LAYERS, PRODUCTS_OF_ENTRIES, Kind
from biofx.recording.operations import Depends, Operation, Recording, Value


@dataclass(frozen=True, eq=False)
class OtherRead:
    """One operator that reads a parameter, but not as a weight.

    Attributes:
        operation: the operator.
        made_by: the operator that computed what it reads, if its entries stand for none of the parameter.
    """

    operation: Operation
    made_by: Operation | None


@dataclass(eq=False, repr=False)
class Forms:
    """The forms of all parameters in a recording.

    Attributes:
        recording: the recording.
        is_nonnegative: whether a tensor cannot be negative.
        reads: the operators that read a parameter as their weight.
        mixed: why a parameter's entries are not those of the weight computed from it, and the operator that
            reads that weight, by the parameter's name.
        computed: the operators whose weight is computed from parameters.
        biases: the parameters that are added to what an operator on weights returns, by the operator.
        users: other operators that read a parameter, by its name.
        found: what the entries of a tensor are: those of one parameter, or computed from several.
    """

    recording: Recording
    is_nonnegative: Callable[[Value], bool]
    reads: list[WeightRead] = field(default_factory=list)
    mixed: dict[str, tuple[str, Operation]] = field(default_factory=dict)
    computed: list[WeightRead] = field(default_factory=list)
    biases: dict[Operation, str] = field(default_factory=dict)
    users: dict[str, list[OtherRead]] = field(default_factory=dict)
    found: dict[Value, Form | Mixture] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in self.recording.parameters.values():
            if value.shape.numel():
                self.found[value] = form_of_parameter(value, self.recording.coordinates.get(value))
        for operation in self.recording.operations:
            if any(value in self.found for value in operation.operands):
                self._follow(operation)

    def _follow(self, operation: Operation) -> None:
        kind = operation.kind
        if kind is Kind.CONSTANT:
            return
        if kind in (Kind.PRODUCT, Kind.CONVOLUTION, Kind.EMBEDDING) or looks_up(operation):
            read = read_of(operation, self.found)
            if read is not None and not self._is_computation(operation, read):
                self._note_read(read)
                return
        result = self._after(operation)
        if result is None or not any(output.is_activity for output in operation.outputs):
            self._note_users(operation, operation.operands)
            return
        for output, form in zip(operation.outputs, result, strict=True):
            if output.is_activity:
                self.found[output] = form
        for value in operation.written:
            self._write(operation, value, result)

    def _write(self, operation: Operation, value: Value, made: list[Form | Mixture]) -> None:
        """Note that a tensor, and all those in whose memory it lies, have other contents now."""
        while value.view_of is not None:
            value = value.view_of
            before = [self.found[value]] if value in self.found else []
            self.found[value] = _mixture(operation, [*made, *before])
        if value.kind == "parameter":  # its readers do not read the parameters that it was computed from
            self.found[value] = replace(_mixture(operation, made), parameters=frozenset((value,)))

    def _note_users(self, operation: Operation, values: Iterable[Value]) -> None:
        for value in values:
            form = self.found.get(value)
            made_by = form.made_by if isinstance(form, Mixture) else None
            for parameter in _parameters(form) if form is not None else ():
                self.users.setdefault(parameter.name, []).append(OtherRead(operation, made_by))

    def _is_computation(self, operation: Operation, read: WeightRead) -> bool:
        """Whether an operator multiplies parameters with each other to compute a weight, and not one by activity."""
        depends = [v.depends for v in (read.source, *read.others) if v is not None]
        is_layer = operation.called in LAYERS or operation.kind is not Kind.PRODUCT
        return bool(depends) and max(depends) is not Depends.INPUTS and not is_layer

    def _note_read(self, read: WeightRead) -> None:
        operation, bias = read.operation, bias_of(read.operation)
        (self.reads if read.mixture is None else self.computed).append(read)
        for mixture in filter(None, (read.mixture, read.form.joined_with)):
            for parameter in mixture.parameters:
                self.mixed.setdefault(parameter.name, (mixture.reason, operation))
        self._note_users(operation, [v for v in operation.operands if v is not bias and v is not read.weight])
        known = self.found.get(bias) if bias is not None else None
        if isinstance(known, Form):
            self.biases[operation] = known.parameter.name

    def _after(self, operation: Operation) -> list[Form | Mixture] | None:
        """The forms of the outputs of an operator on forms; None if they are no longer weights."""
        if any(v.depends is Depends.INPUTS for v in (*operation.operands, *operation.outputs)):
            return None
        forms = [self.found[v] for v in operation.operands if v in self.found]
        main = self.found.get(operation.operands[0])
        count = len(operation.outputs)
        if operation.name in _MASKS and isinstance(main, Form):
            return [main] * count
        is_layout = operation.kind is Kind.LAYOUT and operation.name not in _FILLING
        if is_layout and isinstance(main, Form) and len(forms) == 1:
            try:
                return _laid_out(operation, main)
            except CannotFollowError:
                return None
        if operation.kind is Kind.KEEP and isinstance(main, Form) and len(forms) == 1:
            return [self._kept(operation, main)] * count
        if operation.name == "_weight_norm_interface" and isinstance(main, Form):
            return [replace(main, remark=DIRECTION), *[_mixture(operation, forms)] * (count - 1)]
        if operation.kind is Kind.MERGE and count == 1 and (merged := self._merged(operation)) is not None:
            return [merged]
        return [_mixture(operation, forms)] * count

    def _kept(self, operation: Operation, form: Form) -> Form:
        if operation.name in _COPIES or form.remark:
            return form
        if operation.name in PRODUCTS_OF_ENTRIES:
            numbers = [a for a in operation.args if isinstance(a, int | float)]
            return form if all(a > 0 for a in numbers) else replace(form, remark=_times(str(numbers[0])))
        return replace(form, remark=f"its operator reads it through {operation.called}")

    def _merged(self, operation: Operation) -> Form | None:
        """The form that continues where entries of several tensors join: the one with the most entries."""
        own = [v for v in operation.operands if isinstance(self.found.get(v), Form)]
        if not own:
            return None
        main = max(own, key=lambda v: math.prod(self.found[v].parameter.shape))  # type: ignore[union-attr]
        form = self.found[main]
        assert isinstance(form, Form)
        shape = operation.outputs[0].shape
        if tuple(torch.broadcast_shapes(main.shape, shape)) != tuple(shape):
            return None
        padded = [c.expand(shape) for c in form.coordinates]
        others = [v for v in operation.operands if v is not main and v.is_activity]
        if any(_has_other_entries(self.found.get(v), form) for v in others):
            return None
        sizes = form.parameter.shape
        computed = [v for v in others if v.depends is Depends.PARAMETERS and not isinstance(self.found.get(v), Form)]
        if computed and max(sizes, default=1) == sizes.numel() < math.prod(shape):
            return None  # a bias or a scale, of what a layer computes from parameters
        joined = [self.found[v] for v in (main, *others) if v in self.found]
        form = replace(form, coordinates=tuple(padded), joined_with=_joined_with(operation, form, joined))
        if form.remark:
            return form
        if operation.name in PRODUCTS_OF_ENTRIES:
            is_divided = operation.operands[0] is main or operation.name == "mul"
            doubtful = [v for v in others if not self._is_nonnegative(v, form.parameter)]
            numbers = [a for a in operation.args if isinstance(a, int | float)]
            if is_divided and not doubtful and all(a > 0 for a in numbers):
                return form
            factor = doubtful[0].name if doubtful and doubtful[0].name else "something"
            return replace(
                form, remark=_times(factor) if is_divided else f"its operator reads it through {operation.called}"
            )
        if operation.name in ("add", "sub", "rsub"):
            return replace(form, remark="its operator reads the sum of it and something else")
        return replace(form, remark=f"its operator reads it through {operation.called}")

    def _is_nonnegative(self, value: Value, parameter: Value) -> bool:
        """Whether a factor of a parameter's entries is never negative, or a positive norm of them, as σ is."""
        form = self.found.get(value)
        is_norm = isinstance(form, Mixture) and parameter in form.parameters and value.shape.numel() == 1
        return self.is_nonnegative(value) or (is_norm and not value.negative)


DIRECTION = "it is stored as a direction, and its length, which may become negative, apart"
_MASKS = frozenset(["tril", "triu"])  # layouts that multiply entries by 0 or 1
_FILLING = frozenset(["constant_pad_nd", "diag_embed", "_pad_packed_sequence"])  # layouts that add entries
_COPIES = frozenset(["alias", "detach", "clone", "_to_copy", "lift_fresh", "contiguous", "native_dropout"])


def _times(factor: str) -> str:
    return f"its operator reads it times {factor}, which may be negative"


def _laid_out(operation: Operation, form: Form) -> list[Form | Mixture]:
    """The forms of the outputs of a layout operator on a form."""
    moved = [rearranged(operation, coordinate) for coordinate in form.coordinates]
    return [replace(form, coordinates=tuple(m[i] for m in moved)) for i in range(len(operation.outputs))]


def _parameters(form: Form | Mixture) -> frozenset[Value]:
    """The parameters in a tensor."""
    if isinstance(form, Mixture):
        return form.parameters
    return frozenset((form.parameter,)).union(form.joined_with.parameters if form.joined_with else ())


def _mixture(operation: Operation, forms: Iterable[Form | Mixture]) -> Mixture:
    parameters = frozenset[Value]().union(*map(_parameters, forms))
    known = next((form for form in forms if isinstance(form, Mixture)), None)
    return Mixture(parameters, known.made_by if known else operation)


def _joined_with(operation: Operation, form: Form, joined: Iterable[Form | Mixture]) -> Mixture | None:
    """What is computed from other parameters and joined with a form; None if nothing is."""
    mixture = _mixture(operation, joined)
    others = mixture.parameters - {form.parameter}
    return replace(mixture, parameters=others) if others else None


def _has_other_entries(other: Form | Mixture | None, form: Form) -> bool:
    """Whether a tensor has entries of a form's parameter, in another layout."""
    if not isinstance(other, Form) or other.parameter is not form.parameter:
        return False
    return not all(map(torch.equal, other.coordinates, form.coordinates))
