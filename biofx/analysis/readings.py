"""Unit readings: whose units each weight reads, and why that is unknown for some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biofx.analysis.numbers import NOBODY
from biofx.analysis.unit_analysis import Orientation, UnitAnalysis, maker_of
from biofx.recording.catalog import COPIES, Kind
from biofx.recording.operations import Depends, Recording

if TYPE_CHECKING:
    from biofx.analysis.activity import Activity
    from biofx.analysis.reads import WeightRead


@dataclass(frozen=True, eq=False)
class PresynapticUnits:
    """What a weight reads.

    Attributes:
        numbers: the unit behind each presynaptic position, int64, shape (presynaptic_units,). A position that reads
            several units has one of them.
        classes: the number that stands for all units that need one sign with it, in the same shape.
        signed_by: the operator that can make their activity negative, or an empty string if none can.
        inverted_by: the operator that subtracts or negates what the weight's operator returns, or an empty string.
        remark: why the units are unknown, so that the positions are units of their own; empty if they are known.
        sources: the numbers of all units that reach the positions, also where the units are unknown.
        is_free: for each position, whether it reads the network's inputs or constants only.
        returns: for each postsynaptic unit of the weight, the position at which the weight reads it again, as recurrent
            weights do; −1 if it does not.
    """

    numbers: Tensor
    classes: Tensor
    signed_by: str
    inverted_by: str
    remark: str
    sources: Tensor
    is_free: Tensor
    returns: Tensor


class UnitReadings:
    """What weights read, once the numbers of units have been sent to them.

    Attributes:
        units: the numbers of units.
    """

    def __init__(self, recording: Recording, units: UnitAnalysis, activity: Activity) -> None:
        self._recording = recording
        self.units = units
        self._activity = activity
        self._numbers = units.numbers
        self._neural = torch.zeros(0, dtype=torch.bool)
        self._found: dict[str, PresynapticUnits] = {}

    def of(self, name: str) -> PresynapticUnits:
        """What a weight reads."""
        if name not in self._found:
            self._found[name] = self._read(name)
        return self._found[name]

    def _read(self, name: str) -> PresynapticUnits:
        orientation = self.deciding(name)
        rows = self.units.rows(orientation)
        remark = self._why_not_judged(name, orientation, rows)
        first = orientation.reads[0]
        reads = ((r.operation, r.source) for r in orientation.reads if r.source is not None)
        signed = next(filter(None, (self._activity.read(operation, source) for operation, source in reads)), "")
        inverted = next(filter(None, (self._activity.inverted(each.output) for each in orientation.reads)), "")
        axes = orientation.axes
        count = axes.presynaptic_units if axes is not None else len(self.units.columns[first])
        sources = rows[rows != NOBODY].unique() if rows is not None else torch.zeros(0, dtype=torch.int64)
        if first.source is None and not remark:
            numbers = self._numbers.numbers_for((name, "tokens"), f"tokens of {name}", "input", count)
        elif remark or rows is None:
            numbers = self._numbers.numbers_for((name, "positions"), f"positions of {name}", "shared", count)
        else:
            numbers = rows.amax(1)
            if bool((numbers == NOBODY).any()):
                own = self._numbers.numbers_for((name, "constants"), f"constants read by {name}", "constant", count)
                numbers = torch.where(numbers == NOBODY, own, numbers)
        is_free = torch.ones(count, dtype=torch.bool) if first.source is None else ~self._is_neural[numbers]
        returns = self._returns(name, orientation, rows)
        classes = self._numbers.classes(numbers)
        return PresynapticUnits(numbers, classes, signed, inverted, remark, sources, is_free & (not remark), returns)

    def deciding(self, name: str) -> Orientation:
        """The uses of a weight that decide on its signs: those that read units, if others read tokens or inputs."""
        return next(iter(self._of_units(name)), self.units.orientations[name][0])

    def _of_units(self, name: str) -> list[Orientation]:
        many = self.units.orientations[name]
        if len(many) == 1:
            return many
        return [o for o in many if o.axes is None or not self._is_free(self.units.rows(o)).all()]

    def _is_free(self, rows: Tensor | None) -> Tensor:
        """For each row, whether it holds inputs and constants only."""
        if rows is None:
            return torch.ones(1, dtype=torch.bool)
        return ~self._is_neural[self._numbers.classes(rows)].any(1)

    @property
    def _is_neural(self) -> Tensor:
        """By number: whether a unit of the network is in its class."""
        if len(self._neural) != len(self._numbers):
            inputs = [i for i, p in enumerate(self._numbers.populations) if p.origin in ("input", "constant")]
            neural = ~torch.isin(self._numbers.owner(), torch.tensor(inputs))
            classes = self._numbers.classes(torch.arange(len(self._numbers)))
            of_class = torch.zeros(len(self._numbers), dtype=torch.bool)
            of_class[classes[neural]] = True
            self._neural = of_class[classes]
        return self._neural

    def _returns(self, name: str, orientation: Orientation, rows: Tensor | None) -> Tensor:
        """Where a weight reads its own postsynaptic units again."""
        if orientation.axes is None:
            return torch.zeros(0, dtype=torch.int64)
        own = self.units.own(name, orientation)
        found = torch.full((len(own),), -1)
        if rows is None or sum(len(o.reads) for o in self.units.orientations[name]) < 2:
            return found  # what is used once comes before what it makes
        positions = torch.arange(len(rows))[:, None].expand_as(rows).flatten()
        for part in self._numbers.parts_of(rows.flatten()) if len(own) else ():
            is_own = (part >= own[0]) & (part <= own[-1])
            found[part[is_own] - own[0]] = positions[is_own]
        return found

    def _why_not_judged(self, name: str, orientation: Orientation, rows: Tensor | None) -> str:
        first = orientation.reads[0]
        deciding = self._of_units(name)
        remark = next((r.form.remark for o in deciding for r in o.reads if r.form.remark), "")
        if len(deciding) > 1:
            kinds = ", ".join(dict.fromkeys(f"{o.reads[0].operation.called} ({o.axes})" for o in deciding))
            return f"units read it along several of its axes, so all its entries would need one sign: {kinds}"
        if orientation.axes is None:
            return f"which of its axes run over units is lost on the way to {first.operation.called}"
        if any(read.others for read in orientation.reads):
            return f"{first.operation.called} multiplies several activities, so no unit acts with the sign of a weight"
        if remark:
            return remark
        if rows is None:
            return self._why_rows_act(first)
        if not rows.shape[1]:
            return "the run gives it nothing to read, such as an expert without tokens; give other example_inputs"
        if self._numbers.mix_positions(rows):
            return "reads different units by the same synapses"
        owner = self._numbers.owner()
        origins = {self._numbers.populations[i].origin for i in owner[rows].unique().tolist()}
        if "foreign" in origins:
            return "reads a tensor that no operator of the run made, such as one from numpy or another thread"
        if len(rows) > 1 and len(self._numbers.classes(rows.amax(1)).unique()) == 1 and len(rows.amax(1).unique()) > 1:
            return "what it reads is read by other weights along other axes, so that all its units would need one sign"
        state = self._carried_state(rows)
        if state:
            return (
                f"it reads input {state}, which looks like a state that is carried from call to call; "
                "give example_inputs a function that runs the model for several steps"
            )
        return ""

    def _why_rows_act(self, read: WeightRead) -> str:
        """Why rows that inputs look up act on units as weights; empty if they are activity, as in an embedding."""
        if len(read.weight.shape) < 3:
            return ""
        rows = {read.output}
        for operation in self._recording.operations:
            own = rows.intersection(operation.operands)
            if own and (operation.kind is Kind.LAYOUT or operation.name in COPIES):
                rows.update(operation.outputs)
            elif own and operation.kind is Kind.PRODUCT:
                others = [v for v in operation.operands if v not in rows and self.units.is_of_network(v)]
                if others:
                    return f"inputs choose which of its parts {operation.called} multiplies units by"
        return ""

    def _carried_state(self, rows: Tensor) -> str:
        """The input that looks like a state, if a weight reads it and no unit of the network."""
        if not bool(self._is_free(rows).all()):
            return ""
        inputs = [v for v in self._recording.inputs if v.is_activity]
        shapes = [v.shape for v in self._recording.outputs if v.depends is Depends.INPUTS]
        read = set(self._numbers.owner()[rows].unique().tolist())
        for value in inputs[1:]:  # the first input is data; a state comes after it, and is returned in the same shape
            if value.shape in shapes and self._numbers.population_of(maker_of(value)) in read:
                return value.name
        return ""
