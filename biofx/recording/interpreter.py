"""The interpreter: sends what is known of tensors through a recording, operator by operator.

A recording is straight-line code: loops, branches and calls have happened. So an interpreter is one loop over it. A
domain answers three questions: what is known of a tensor that no operator made, what is known of an operator's result,
and what is known of memory after something was written into a part of it. This interpreter is for domains that know one
thing of a tensor as a whole: why its activity can be negative (`Activity`), and which weights a signal has passed
(`Flow`).

Two domains know something of every entry, and so have a memory of their own, in which a view is a view: the numbers of
units (`UnitAnalysis`), which are sent through it again until they are settled, and the coordinates of parameters
(`Forms`). They share the operators' kinds (`catalog`), the execution of layout operators on entries (`layouts`), and
the rules by kind (`rules`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from biofx.recording.operations import Operation, Recording, Value

Known = TypeVar("Known")


class Interpreter(ABC, Generic[Known]):
    """What is known of each tensor of a run."""

    def __init__(self) -> None:
        self._known: dict[Value, Known] = {}

    @abstractmethod
    def source(self, value: Value) -> Known:
        """What is known of a tensor that no operator of the run made."""

    @abstractmethod
    def after(self, operation: Operation) -> Known:
        """What is known of everything that an operator returns and writes; `of` returns that of its operands."""

    @abstractmethod
    def joined(self, before: Known, written: Known) -> Known:
        """What is known of memory into a part of which something is written."""

    def interpret(self, recording: Recording) -> None:
        """Go through a recording."""
        for operation in recording.operations:
            made = self.after(operation)
            for output in operation.outputs:
                self._known[output] = made
            for value in operation.written:
                self._write(value, made)

    def of(self, value: Value) -> Known:
        """What is known of a tensor now."""
        if value not in self._known:
            self._known[value] = self.source(value)
        return self._known[value]

    def _write(self, value: Value, made: Known) -> None:
        below: Value | None = value
        while below is not None:
            is_whole = below is value and below.view_of is None
            self._known[below] = made if is_whole else self.joined(self.of(below), made)
            below = below.view_of
