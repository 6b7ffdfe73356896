"""Flow: which weights a signal passes before others, how deep each lies, and which parameters scale what it reads."""

from __future__ import annotations

from collections.abc import Iterator

from biofx.analysis.forms import Form, Forms
from biofx.recording.catalog import PRODUCTS_OF_ENTRIES, Kind
from biofx.recording.interpreter import Interpreter
from biofx.recording.operations import Depends, Operation, Recording, Value


class Flow(Interpreter[int]):
    """What a signal passes between weights.

    Attributes:
        depth: for each weight, the number of weights on the longest path to it, over that to the deepest one: from 0
            for the first to 1 for the last. Weights that read each other, as in a recurrent network, have one depth.
        outputs: the weights after which no signal passes another weight.
        scales: the parameters that multiply units on their way to a weight, each with the weights that they lead to.
    """

    def __init__(self, recording: Recording, forms: Forms) -> None:
        super().__init__()  # by tensor: the weights and scales that it has come from, as bits
        self._forms = forms
        self._names: list[str] = []
        self._bits: dict[str, int] = {}
        reads = [*forms.reads, *forms.computed]
        weights = dict.fromkeys(name for read in reads for name in read.names)
        self._weights_of: dict[Operation, list[str]] = {}
        for read in reads:
            self._weights_of.setdefault(read.operation, []).extend(read.names)
        self._before = dict.fromkeys(weights, 0)
        self.interpret(recording)
        sources = {name: self._named(bits) for name, bits in self._before.items()}
        edges = [(a, b) for b, found in sources.items() for a in found if a in weights]
        self.depth, self.outputs = _depths(list(weights), edges)
        self.scales: dict[str, set[str]] = {}
        for weight, found in sources.items():
            for name in found:
                if name not in weights:
                    self.scales.setdefault(name, set()).add(weight)

    def source(self, value: Value) -> int:
        """A tensor that no operator made comes from no weight."""
        return 0

    def joined(self, before: int, written: int) -> int:
        """What is in a memory comes from all that is written into it."""
        return before | written

    def after(self, operation: Operation) -> int:
        """What an operator's result has come from: its weights, or else what its operands have."""
        passed = 0
        for value in operation.operands:
            passed |= self.of(value)
        here = self._weights_of.get(operation, ())
        for name in here:
            self._before[name] |= passed
        passed = passed if not here else 0
        for name in (*here, *self._scaling(operation)):
            passed |= self._bit(name)
        return passed

    def _bit(self, name: str) -> int:
        if name not in self._bits:
            self._bits[name] = 1 << len(self._names)
            self._names.append(name)
        return self._bits[name]

    def _named(self, bits: int) -> list[str]:
        return [name for name in self._names if bits & self._bits[name]]

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


def _depths(weights: list[str], edges: list[tuple[str, str]]) -> tuple[dict[str, float], frozenset[str]]:
    """Depth by longest paths between the groups of weights that read each other, and the weights that come last."""
    import networkx  # takes 0.2 s to import

    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_nodes_from(weights)
    graph.add_edges_from(edges)
    groups = networkx.condensation(graph)
    before: dict[int, int] = {}
    for group in networkx.topological_sort(groups):
        sizes = [before[earlier] + 1 for earlier in groups.predecessors(group)]
        before[group] = max(sizes, default=0)
    deepest = max(1, *before.values(), 0)
    depth = {name: before[group] / deepest for name, group in groups.graph["mapping"].items()}
    last = frozenset(name for name, group in groups.graph["mapping"].items() if not groups.out_degree(group))
    return depth, last
