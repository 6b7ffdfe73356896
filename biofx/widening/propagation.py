"""Propagation: where doubled units lead in a graph, and what has to become wider for them.

Random numbers go through the graph node by node, without and with doubled units. If the second result of a node is the
first one with doubled units, the node is compatible. If not, it is tried again with wider parameters, a wider module
or scaled sizes among its arguments. If nothing helps, the units that reach it cannot be doubled.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from biofx.base.torch_internals import pytree
from biofx.model.chain import attribute, module_of
from biofx.model.control_flow import control_flow_of, describe_control_flow
from biofx.model.islands import island_path
from biofx.recording.catalog import Kind
from biofx.widening.axis_doubling import AxisDoubling, adjacent_twins, is_same_doubling
from biofx.widening.matching import NO_WEIGHTS, REARRANGING, Arguments, IncompatibleError, NodeValue, match, weights_of
from biofx.widening.plan import WideningPlan
from biofx.widening.sizes import doubled_sizes, scaled_arguments, unit_axis

if TYPE_CHECKING:
    from biofx.analysis.sites import Call, WeightSite
    from biofx.widening.execution import Execution

MOST_OPERANDS = 4  # of a node, for which all subsets of doubled operands are tried


class Propagation:
    """One run through the graph, with the units of certain weights doubled.

    Attributes:
        plan: what becomes wider.
        failures: weights whose units cannot be doubled, with the reason.
        read: the weights whose doubled units are read by a weight.
    """

    def __init__(
        self,
        bio: fx.GraphModule,
        sites: dict[str, WeightSite],
        doubled: frozenset[str],
        fixed: dict[str, str],
        opaque: Collection[str],
        execution: Execution,
    ) -> None:
        self.plan = WideningPlan(doubled)
        self.failures: list[tuple[frozenset[str], str]] = []
        self.read: set[str] = set()
        self._bio = bio
        self._sites = sites
        self._uses = {call.node: (site, call) for site in sites.values() for call in site.calls}
        self._fixed = fixed
        self._opaque = opaque
        self._execution = execution
        self._values: dict[fx.Node, NodeValue] = {}
        self._constant: set[fx.Node] = set()  # nodes computed from parameters and buffers only
        self._agreed: dict[str, tuple[AxisDoubling | None, frozenset[str]]] = {}  # by the name of a tensor

    def run(self) -> None:
        """Compute the values of all nodes."""
        waiting = Counter(source for node in self._bio.graph.nodes for source in node.all_input_nodes)
        for node in self._bio.graph.nodes:
            self._values[node] = self._value(node)
            for source in node.all_input_nodes:
                waiting[source] -= 1
                has_tensor = any(isinstance(x, Tensor) for x in pytree.tree_leaves(self._values[source].old))
                if not waiting[source] and source not in self._constant and has_tensor:
                    self._values[source] = NodeValue.unchanged(None)  # frees the memory

    def _value(self, node: fx.Node) -> NodeValue:
        changed = self._changed(node)
        if node.op == "output":
            for value in changed.values():
                self._fail(value.weights, "its units are the model's output")
            return NodeValue.unchanged(None)
        if node in self._uses:
            return self._weight_operator(*self._uses[node])
        old = self._old_result(node)
        result = NodeValue.unchanged(old)
        if changed and (unseen := self._unseen(node)) is not None:
            self._fail(weights_of(changed.values()), f"its units reach {unseen}")
        elif changed:
            try:
                result = self._compatible(node, old)
            except IncompatibleError:
                result = self._partly_compatible(node, old)
        for name in self._execution.unit_tensors(node):
            wanted = self.plan.tensors.get(name) if result.is_changed else None
            self._require_agreement(name, wanted, result.weights, self._name(node))
        return result

    def _unseen(self, node: fx.Node) -> str | None:
        """Describe a part that may do something else in other runs than in this one, in evaluation mode; else None."""
        island, found = island_path(self._bio, node), control_flow_of(self._bio, node)
        if island is not None:
            return f"the untraced submodule {island} ({self._execution.name(node)}), whose Python may depend on them"
        depends_on_mode = found is not None and found.depends_on_mode
        return describe_control_flow(self._bio, node) if depends_on_mode else None

    def _changed(self, node: fx.Node) -> dict[fx.Node, NodeValue]:
        """The nodes that a node reads and that doubled units reach, with their values."""
        return {n: value for n in node.all_input_nodes if (value := self._values[n]).is_changed}

    def _old_result(self, node: fx.Node) -> Any:
        """The result of a node in the original network."""
        if node.op == "get_attr":
            self._constant.add(node)
            return self._execution.attribute(node)
        if node.op != "placeholder":
            tensors = {n for n in node.all_input_nodes if isinstance(self._values[n].old, Tensor)}
            if tensors and tensors <= self._constant:
                self._constant.add(node)
            try:
                old_inputs = fx.map_arg((node.args, node.kwargs), lambda n: self._values[n].old)
                return self._execution.run(node, *old_inputs)
            except Exception:  # noqa: BLE001 - an operator may refuse random numbers
                pass
        return self._execution.recorded(node)

    def _fail(self, weights: frozenset[str], reason: str) -> None:
        """Record that the units of weights cannot be doubled.

        A failure that involves units which failed before is not recorded: it may disappear together with the first.
        """
        if weights and all(weights.isdisjoint(earlier) for earlier, _ in self.failures):
            self.failures.append((weights, reason))

    def _require_agreement(
        self, tensor: str, wanted: AxisDoubling | None, weights: frozenset[str], reader: str
    ) -> None:
        """Require all uses of a tensor to double it in the same way, because it is stored once."""
        earlier, earlier_weights = self._agreed.setdefault(tensor, (wanted, weights))
        if not is_same_doubling(earlier, wanted):
            self._fail(earlier_weights | weights, f"its units are read by {reader}, which reads others as well")

    # --- operators on weights ----------------------------------------------------------------------------------

    def _weight_operator(self, site: WeightSite, call: Call) -> NodeValue:
        own = self.plan.doubled & {site.name}
        changed = self._changed(call.node)
        old = self._execution.recorded(call.node)
        if call.source is None or site.name in self._opaque:
            self._fail(weights_of(changed.values()), f"its units are read by {site.name}, and {self._fixed[site.name]}")
            return NodeValue.unchanged(old)
        channel = call.use.output_axes[0] % old.dim()
        expected = {call.source, call.bias} if own else {call.source}
        others = weights_of(value for n, value in changed.items() if n not in expected)
        self._fail(others, f"its units are read by {site.name} in addition to its activation")
        source, presynaptic = self._values[call.source], None
        doubling = source.doublings[0]
        if doubling is not None:
            axis = call.use.source_axes[0] % source.old.dim()
            if doubling.is_uniform and doubling.axis < axis == channel and call.use.operator != "einsum":
                # The operator treats these units as a batch and keeps their axis.
                if own:
                    self._fail(own, "it acts on each of many units by itself, and those are doubled")
                return NodeValue.doubled(old, doubling, source.weights)
            if doubling.is_uniform and doubling.axis == axis:
                presynaptic = self._presynaptic(site, doubling, source.weights)
            else:
                self._fail(source.weights, f"its units are read by {site.name} along other axes than that of units")
        self._require_agreement(site.name, presynaptic, source.weights, site.name)
        if presynaptic is not None:
            self.plan.presynaptic[site.name] = presynaptic
            self.read |= source.weights
        return self._doubled_operator(site, call, own, old, channel) if own else NodeValue.unchanged(old)

    def _doubled_operator(
        self, site: WeightSite, call: Call, own: frozenset[str], old: Tensor, channel: int
    ) -> NodeValue:
        """The value of an operator whose postsynaptic units are doubled."""
        doubled, bias, weights = adjacent_twins(site.units), call.bias, own
        if call.computes_bias:
            self._fail(weights, "its bias cannot be doubled")
        elif bias is not None:
            is_vector = self._values[bias].old.dim() == 1
            is_on_units = is_vector and (channel == old.dim() - 1 or call.use.operator.startswith("conv"))
            if is_on_units:
                for _ in self._with_doubled_constants(call.node, [bias], doubled, own):
                    break
            weights |= self._values[bias].weights
            if not is_on_units or not is_same_doubling(self._values[bias].doublings[0], doubled):
                self._fail(weights, "its bias cannot be doubled")
        return NodeValue.doubled(old, doubled.on(channel), weights)

    def _presynaptic(self, site: WeightSite, doubling: AxisDoubling, weights: frozenset[str]) -> AxisDoubling | None:
        """The doubling of the presynaptic axis of a weight; None if it cannot be doubled."""
        result = doubling.on(0)
        if site.name in self._fixed:
            reason = f", and {self._fixed[site.name]}"
        elif not torch.equal(result.source * site.groups // result.size, _groups(len(result.source), site.groups)):
            reason = ", whose groups are not all doubled in the same way"
        else:
            return result
        self._fail(weights, f"its units are read by {site.name}{reason}")
        return None

    # --- other nodes -------------------------------------------------------------------------------------------

    def _compatible(self, node: fx.Node, old: Any) -> NodeValue:
        """The value of a node that reads doubled units; raises `IncompatibleError` if no attempt succeeds."""
        changed = [*self._changed(node).values()]
        # Sizes do not enter the result of the node, unless they are all that is changed: then it makes a tensor.
        weights = weights_of([value for value in changed if any(value.doublings)] or changed)
        # Complete doublings come first: a partial one is right only for an axis that inputs share with units.
        for may_be_partial in (False, True):
            for arguments, doubling in self._attempts(node, weights):
                found = self._attempt(node, arguments, doubling, old, weights)
                if found is None or not (
                    may_be_partial or all(d is None or bool(d.sign.all()) for d in found.doublings)
                ):
                    continue
                if arguments[0] is not node.args:
                    self.plan.arguments[node] = arguments
                if doubling is not None:
                    self._plan_module(node, doubling, weights)
                return found
        raise IncompatibleError

    def _attempt(
        self, node: fx.Node, arguments: Arguments, doubling: AxisDoubling | None, old: Any, weights: frozenset[str]
    ) -> NodeValue | None:
        """The value of a node with these arguments and its module doubled like this; None if it is not compatible."""
        try:
            args, kwargs = fx.map_arg(arguments, lambda n: self._values[n].new)
            new = self._execution.run(node, args, kwargs, doubling)
        except Exception:  # noqa: BLE001 - whatever a node raises for sizes that it does not expect
            return None
        try:
            return match(self._execution, node, self._values, arguments, (old, new), weights)
        except IncompatibleError:
            return None

    def _partly_compatible(self, node: fx.Node, old: Any) -> NodeValue:
        """The value of a node that is compatible only if some of its operands are not doubled: as few as possible."""
        changed = self._changed(node)
        why = self._why_incompatible(node)
        for count in range(1, len(changed) if len(changed) <= MOST_OPERANDS else 1):
            for chosen in itertools.combinations(changed, count):
                weights = weights_of([changed[n] for n in chosen])
                if not weights.isdisjoint(weights_of([changed[n] for n in changed if n not in chosen])):
                    continue
                self._values |= {n: NodeValue.unchanged(changed[n].old) for n in chosen}
                try:
                    result = self._compatible(node, old)
                except IncompatibleError:
                    continue
                finally:
                    self._values |= changed
                self._fail(weights, why)
                return result
        self._fail(weights_of(changed.values()), why)
        return NodeValue.unchanged(old)

    def _attempts(self, node: fx.Node, weights: frozenset[str]) -> Iterator[tuple[Arguments, AxisDoubling | None]]:
        """The arguments of a node, and the doubling of its module, to try: from no change to wider parameters."""
        present = (node.args, node.kwargs)
        known = (doubling for n in node.all_input_nodes for doubling in self._values[n].doublings)
        doubling = next((d for d in known if d is not None and d.is_uniform), None)
        if doubling is not None and self._execution.has_unit_parameters(node):
            yield present, doubling
        yield present, None
        if doubling is None:
            return
        has_sizes = self._execution.kind(node) in (*REARRANGING, Kind.NORM)
        factor = Fraction(len(doubling.source), doubling.size)
        scaled = list(scaled_arguments(present, factor)) if has_sizes else []
        yield from ((arguments, None) for arguments in scaled)
        for _ in self._with_doubled_constants(node, node.all_input_nodes, doubling, weights):
            yield from ((arguments, None) for arguments in (present, *scaled))

    def _with_doubled_constants(
        self, node: fx.Node, operands: Sequence[fx.Node], doubling: AxisDoubling, weights: frozenset[str]
    ) -> Iterator[None]:
        """Double the parameters among the operands of a node: on the last axis of that size, then on the first.

        Each item is one attempt. A caller that stops at an item keeps it; going on to the next one undoes it.
        """
        chains = [chain for operand in operands if (chain := self._constant_chain(operand, node))]
        for which in (-1, 0) if chains else ():
            saved, plan = {n: self._values[n] for chain in chains for n in chain}, self.plan
            tensors, reaching, arguments = ({**x} for x in (plan.tensors, plan.reaching, plan.arguments))
            self.plan = replace(plan, tensors=tensors, reaching=reaching, arguments=arguments)
            try:
                for start, *links in chains:
                    value = self._values[start].old
                    axis = unit_axis(value, doubling, which)
                    if axis is not None:
                        self._values[start] = NodeValue.doubled(value, doubling.on(axis), weights)
                        self._plan_tensor(str(start.target), value, doubling, weights, which)
                        for link in links:
                            self._values[link] = self._compatible(link, self._values[link].old)
                yield
            except IncompatibleError:
                pass
            self._values |= saved
            self.plan = plan

    def _constant_chain(self, operand: fx.Node, reader: fx.Node) -> list[fx.Node]:
        """The nodes from a parameter to an operand computed from it; empty if the parameter cannot be doubled here.

        It cannot be if it is doubled already, or if a node before `reader` read it without doubling.
        """
        chain = [operand]
        while chain[0].op != "get_attr":
            sources = [n for n in chain[0].all_input_nodes if n in self._constant]
            if chain[0] not in self._constant or len(sources) != 1:
                return []
            chain.insert(0, sources[0])
        held = attribute(self._bio, str(chain[0].target))
        if not isinstance(held, Tensor) or self._execution.is_in_island(held):
            return []
        readers = {user for n in chain for user in n.users if user in self._values} - {*chain, reader}
        is_doubled = any(self._values[n].is_changed for n in chain)
        return [] if readers or is_doubled or str(chain[0].target) in self._sites else chain

    def _plan_module(self, node: fx.Node, doubling: AxisDoubling, weights: frozenset[str]) -> None:
        for name, tensor in self._execution.unit_tensors(node).items():
            self._plan_tensor(name, tensor, doubling, weights)
        self.plan.sizes[str(node.target)] = doubled_sizes(self._bio.get_submodule(str(node.target)), doubling)

    def _plan_tensor(
        self, name: str, tensor: Tensor, doubling: AxisDoubling, weights: frozenset[str], which: int = -1
    ) -> None:
        axis = unit_axis(tensor, doubling, which)
        if axis is not None:
            self.plan.tensors[name] = doubling.on(axis)
            self.plan.reaching[name] = self.plan.reaching.get(name, NO_WEIGHTS) | weights

    # --- reasons -----------------------------------------------------------------------------------------------

    def _name(self, node: fx.Node) -> str:
        path, name = module_of(node), self._execution.name(node)
        return f"{name} in {path}" if path else name

    def _why_incompatible(self, node: fx.Node) -> str:
        kind = self._execution.kind(node)
        numbers = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, int)]
        if kind is Kind.LAYOUT and max(numbers, default=0) > 1:
            return f"{self._name(node)} has fixed sizes"
        others = [n for n in node.all_input_nodes if not self._values[n].is_changed]
        joined = sorted((n for n in others if isinstance(self._values[n].old, Tensor)), key=self._constant.__contains__)
        if joined and kind in (Kind.MERGE, Kind.CONCATENATE, Kind.PRODUCT, Kind.ATTENTION):
            return f"{self._name(node)} joins its units with {self._origin(joined[0])}, not doubled"
        return f"its units reach {self._name(node)}, whose result changes if units are doubled"

    def _origin(self, node: fx.Node) -> str:
        """The input, parameter, weight or unknown operator that a value comes from, in words."""
        while True:
            if node.op == "placeholder":
                return f"input {str(node.target).lstrip('*')}"
            if node.op == "get_attr":
                is_parameter = isinstance(attribute(self._bio, str(node.target)), nn.Parameter)
                return f"the {'parameter' if is_parameter else 'buffer'} {node.target}"
            if node in self._uses:
                return f"those of {self._uses[node][0].name}"
            sources = sorted(node.all_input_nodes, key=self._constant.__contains__)
            if self._execution.kind(node) is Kind.UNKNOWN or not sources:
                return f"the result of {self._name(node)}"
            node = sources[0]


def _groups(count: int, groups: int) -> Tensor:
    """The group of each of a number of positions."""
    return torch.arange(count) * groups // count
