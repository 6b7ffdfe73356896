"""Flow: which weights a signal passes before others, how deep each lies, and which parameters scale what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from biofx.analysis.reads import Form
from biofx.recording.catalog import PRODUCTS_OF_ENTRIES, Kind
from biofx.recording.interpreter import Interpreter
from biofx.recording.operations import Depends, Operation, Recording, Value

if TYPE_CHECKING:
    from biofx.analysis.forms import Forms

Point = str | int
"""A weight, by its name, or a place where signals meet."""


class Signal(NamedTuple):
    """What a tensor has come from since it passed weights.

    Attributes:
        point: the weight, or the place where signals of several met; None if it has passed none.
        scales: the parameters that have multiplied it, as bits.
    """

    point: Point | None
    scales: int


class Flow(Interpreter[Signal]):
    """What a signal passes between weights.

    Signals are a graph of weights and of the places where signals meet, which grows with the number of operators. Lists
    of the weights before each weight would grow with its square, because all earlier layers add to a residual stream.

    Attributes:
        depth: for each weight, the number of weights on the longest path to it, over that of the deepest one: from 0
            for the first to 1 for the last. Weights that read each other, as in a recurrent network, have one depth.
        outputs: the weights after which no signal passes another weight.
        scales: the parameters that multiply units on their way to a weight, each with the weights that they lead to.
        returned: what the model returns has come from there, without passing another weight.
    """

    def __init__(self, recording: Recording, forms: Forms) -> None:
        super().__init__()
        self._forms = forms
        self._weights_of = {read.operation: read.names for read in (*forms.reads, *forms.computed)}
        self._scaled = dict.fromkeys(chain(*self._weights_of.values()), 0)  # by weight: scales, as bits
        self._bits: dict[str, int] = {}
        self._edges: list[tuple[Point, Point]] = []
        self._met = 0
        self.interpret(recording)
        points = (self.of(value).point for value in recording.outputs)
        self.returned = frozenset(point for point in points if point is not None)
        self.depth, self.outputs = _depths(list(self._scaled), self._edges)
        self.scales: dict[str, set[str]] = {}
        scales = list(self._bits)
        for weight, bits in self._scaled.items():
            for index in _ones(bits):
                self.scales.setdefault(scales[index], set()).add(weight)

    def source(self, value: Value) -> Signal:
        """A tensor that no operator made comes from no weight."""
        return Signal(None, 0)

    def joined(self, before: Signal, written: Signal) -> Signal:
        """Memory comes from everything that is written into it."""
        return Signal(self._meeting(before.point, written.point), before.scales | written.scales)

    def after(self, operation: Operation) -> Signal:
        """What an operator's result has come from: its weights, or otherwise what its operands have."""
        signals = [self.of(value) for value in operation.operands]
        scales = 0
        for signal in signals:
            scales |= signal.scales
        here = self._weights_of.get(operation, ())
        point = self._meeting(*here) if here else self._meeting(*(signal.point for signal in signals))
        if here:
            before = dict.fromkeys(signal.point for signal in signals if signal.point is not None)
            self._edges += ((earlier, name) for name in here for earlier in before)
            for name in here:
                self._scaled[name] |= scales
            scales = 0
        for name in self._scaling(operation):
            if name in self._scaled:
                point = self._meeting(point, name)
            else:
                scales |= self._bits.setdefault(name, 1 << len(self._bits))
        return Signal(point, scales)

    def ahead(self, weight: str) -> tuple[set[str], set[Point]]:
        """The weights that a signal reaches next after a weight, and the points on its way, the weight included."""
        found: set[str] = set()
        ahead: list[Point] = [weight]
        seen: set[Point] = {weight}
        while ahead:
            for point in self._after_point.get(ahead.pop(), ()):
                if isinstance(point, str):
                    found.add(point)
                elif point not in seen:
                    seen.add(point)
                    ahead.append(point)
        return found, seen

    @cached_property
    def _after_point(self) -> dict[Point, list[Point]]:
        found: dict[Point, list[Point]] = {}
        for before, after in self._edges:
            found.setdefault(before, []).append(after)
        return found

    def _meeting(self, *points: Point | None) -> Point | None:
        """The point from which signals that come from some points continue."""
        found = dict.fromkeys(point for point in points if point is not None)
        if len(found) < 2:
            return next(iter(found), None)
        self._met += 1
        self._edges += ((point, self._met) for point in found)
        return self._met

    def _scaling(self, operation: Operation) -> Iterator[str]:
        """The parameters that multiply activity in an operator."""
        if not any(v.depends is Depends.INPUTS and v.is_activity for v in operation.operands):
            return
        factors: tuple[Value, ...] = ()
        if operation.kind is Kind.NORM:
            factors = (operation.argument("weight"),)
        elif operation.kind is Kind.MERGE and operation.name in (*PRODUCTS_OF_ENTRIES, "addcmul"):
            factors = operation.operands
        for factor in factors:
            form = self._forms.found.get(factor)
            if isinstance(form, Form) and not form.remark:
                yield form.parameter.name


def _ones(bits: int) -> Iterator[int]:
    """The positions of the bits that are set."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def _depths(weights: list[str], edges: list[tuple[Point, Point]]) -> tuple[dict[str, float], frozenset[str]]:
    """Depth by longest paths between the groups of weights that read each other, and the weights that come last."""
    import networkx  # takes 0.2 s to import

    graph: networkx.DiGraph[Point] = networkx.DiGraph()
    graph.add_nodes_from(weights)
    graph.add_edges_from(edges)
    groups = networkx.condensation(graph)
    group_of: dict[Point, int] = groups.graph["mapping"]
    with_weights = {group_of[name] for name in weights}
    order = list(networkx.topological_sort(groups))
    before: dict[int, int] = {}
    for group in order:
        before[group] = max((before[one] + (one in with_weights) for one in groups.predecessors(group)), default=0)
    leads_on: set[int] = set()  # the groups after which a signal passes another weight
    for group in reversed(order):
        if any(one in with_weights or one in leads_on for one in groups.successors(group)):
            leads_on.add(group)
    # The 0 is for models without weights: `max` of a single number fails.
    deepest = max(1, *(before[group] for group in with_weights), 0)
    depth = {name: before[group_of[name]] / deepest for name in weights}
    return depth, frozenset(name for name in weights if group_of[name] not in leads_on)
