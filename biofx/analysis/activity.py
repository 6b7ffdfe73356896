"""Activity: for each tensor of a run, the operator that may have made it negative, or none."""

from __future__ import annotations

from biofx.recording.catalog import BOUNDS, COPIES, PRODUCTS_OF_ENTRIES, Kind, Sign, sign_of
from biofx.recording.interpreter import Interpreter
from biofx.recording.operations import Depends, Operation, Recording, Value

_SUMS = frozenset(("add", "sub", "rsub", "neg"))  # of one activity with what does not depend on inputs

WEIGHTED = (Kind.PRODUCT, Kind.CONVOLUTION, Kind.EMBEDDING)


class Activity(Interpreter[str]):
    """Why each tensor of a run can be negative when an operator reads it; empty if it cannot.

    Parameters that multiply activity are taken to be positive; `Units.scales` lists them. What is computed from a
    parameter in another way is not.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._read: dict[tuple[Operation, Value], str] = {}
        self._users: dict[Value, list[Operation]] = {}
        self.interpret(recording)

    def read(self, operation: Operation, value: Value) -> str:
        """Why an operand can be negative when an operator reads it."""
        return self._read.get((operation, value), "")

    def inverted(self, value: Value) -> str:
        """The operator that turns over the sign of a tensor before it meets another activity, wherever it does.

        Empty if none does, or not in every use: a leak subtracts from a tensor a part of the same tensor.
        """
        pending, seen, found = [(value, "")], {value}, ""
        while pending:
            current, by = pending.pop()
            users = self._users.get(current, ())
            ends = [] if users else [by]
            for operation in users:
                now = by if not _turns_over(operation, current) else "" if by else operation.called
                if not _passes_on(operation, current):
                    ends.append(now)
                elif operation.outputs[0] not in seen:
                    seen.add(operation.outputs[0])
                    pending.append((operation.outputs[0], now))
            if not all(ends):
                return ""
            found = next(iter(ends), found)
        return found

    def source(self, value: Value) -> str:
        """Why a tensor that no operator made can be negative."""
        if not value.is_activity:
            return ""
        words = {"input": f"input {value.name}", "parameter": "parameter", "unknown": "a tensor that no operator made"}
        return words.get(value.kind, value.kind if value.negative else "")

    def joined(self, before: str, written: str) -> str:
        """Why memory can be negative after a write into a part of it."""
        return before or written

    def after(self, operation: Operation) -> str:
        """Why an operator's result can be negative."""
        for value in operation.operands:
            self._read[operation, value] = self.of(value)
            self._users.setdefault(value, []).append(operation)
        is_activity = any(value.is_activity for value in (*operation.outputs, *operation.written))
        return self._after(operation) if is_activity else ""

    def _after(self, operation: Operation) -> str:
        output = operation.outputs[0] if operation.outputs else None
        if output is not None and operation.depends is Depends.NOTHING:
            return operation.called if output.negative else ""
        if operation.kind in WEIGHTED and any(v.depends is Depends.PARAMETERS for v in operation.operands):
            return f"{operation.called} without activation"
        sign = sign_of(operation.name)
        if sign is Sign.ANY or _has_negative_number(operation) or _is_complex(operation):
            return operation.called
        if sign is Sign.NEVER or _is_even_power(operation) or _is_clamped(operation):
            return ""
        source = next((found for v in _sources(operation) if (found := self.of(v))), "")
        return operation.called if source and sign is Sign.ODD else source


def _turns_over(operation: Operation, value: Value) -> bool:
    """Whether an operator negates or subtracts one of its operands, or multiplies it by a negative number."""
    if operation.name in ("neg", "rsub"):
        return operation.operands[0] is value
    if operation.name in ("add", "sub") and operation.argument("other") is value:
        factor = operation.numbers.get("alpha", 1)
        return (factor < 0) is (operation.name == "add")
    return operation.name in PRODUCTS_OF_ENTRIES and _has_negative_number(operation)


def _passes_on(operation: Operation, value: Value) -> bool:
    """Whether an operator moves, scales or negates a tensor, or adds to it what does not depend on inputs."""
    is_kept = operation.kind is Kind.LAYOUT or operation.name in COPIES | PRODUCTS_OF_ENTRIES | _SUMS
    is_linear = operation.operands[0] is value or operation.name in _SUMS | {"mul"}
    others = [v for v in operation.operands if v is not value and v.depends is Depends.INPUTS]
    return is_kept and is_linear and bool(operation.outputs) and not others


def _sources(operation: Operation) -> list[Value]:
    """The operands whose signs matter."""
    operands = [v for v in operation.operands if v.is_activity]
    if operation.kind is Kind.ATTENTION:  # a weighted average
        return [operation.argument("value")]
    if operation.kind is Kind.KEEP:
        return operands[:1]
    if operation.name in PRODUCTS_OF_ENTRIES:
        return [v for v in operands if not _is_scale(v)] or operands
    return operands


def _is_even_power(operation: Operation) -> bool:
    exponent = operation.argument("exponent")
    return operation.name == "pow" and isinstance(exponent, int | float) and exponent % 2 == 0


def _is_clamped(operation: Operation) -> bool:
    low = operation.argument("min") if operation.name.startswith("clamp") else operation.argument("min_val")
    return operation.name in ("clamp", "clamp_min", "hardtanh") and isinstance(low, int | float) and low >= 0


def _has_negative_number(operation: Operation) -> bool:
    """Whether a number among the arguments makes a result negative: below 0, or a weight beyond the second operand."""
    numbers = operation.numbers
    if operation.name == "lerp" and numbers.get("weight", 0) > 1:
        return True
    return any(number < 0 for name, number in numbers.items() if name not in BOUNDS)


def _is_complex(operation: Operation) -> bool:
    """Whether an operator computes complex numbers, whose parts have signs of their own."""
    moves = operation.kind in (Kind.LAYOUT, Kind.CONCATENATE, Kind.WRITE) or operation.name in COPIES
    return not moves and any(output.dtype.is_complex for output in operation.outputs)


def _is_scale(value: Value) -> bool:
    """Whether a factor is a parameter itself, moved, copied or times a positive number: one of `Units.scales`."""
    while value.producer is not None:
        made = value.producer
        is_kept = made.kind is Kind.LAYOUT or made.name in COPIES | PRODUCTS_OF_ENTRIES
        if not is_kept or len([v for v in made.operands if v.is_activity]) > 1 or _has_negative_number(made):
            return False
        value = made.operands[0]
    return value.kind == "parameter"
