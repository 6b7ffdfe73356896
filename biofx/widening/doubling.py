"""A trial: random numbers go through a graph, node by node, as the network is and behind doubled units.

A node goes along if the second result is the first one with positions of one axis doubled. What has to be wider for
that, such as a parameter that meets the units or a size among the arguments, becomes so. If nothing helps, the units
that reach the node stay as they are.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from biofx.model.chain import attribute, compute
from biofx.model.control_flow import control_flow_of, describe_control_flow
from biofx.model.islands import island_path
from biofx.recording.catalog import Kind
from biofx.widening.plan import Widening
from biofx.widening.sizes import SIZES, own_tensors, scalings, unit_axis, wider_sizes
from biofx.widening.twins import Twins, adjacent, alike, followed, named, named_twins, refitted, resized_axes

if TYPE_CHECKING:
    from biofx.analysis.nodes import Nodes
    from biofx.analysis.sites import Call, WeightSite

MOVES = (Kind.LAYOUT, Kind.CONCATENATE)
NONE: frozenset[str] = frozenset()
MANY = 4  # operands, of which each may be the one that does not go along
Arguments = tuple[Any, Any]


class _Cannot(Exception):  # noqa: N818 - a finding
    """A node does not go along."""


@dataclass(frozen=True, eq=False)
class _State:
    """What a node computes.

    Attributes:
        old: its value in the network as it is.
        new: its value behind doubled units; the same object if that is no other.
        twins: for every leaf of the value, how it becomes wider, or None if it does not.
        reach: the weights whose doubled units reach it.
    """

    old: Any
    new: Any
    twins: Sequence[Twins | None]
    reach: frozenset[str]

    @property
    def changed(self) -> bool:
        return self.new is not self.old


def _unchanged(value: Any) -> _State:
    return _State(value, value, [None] * len(pytree.tree_leaves(value)), NONE)


def _wider(value: Tensor, twins: Twins, reach: frozenset[str]) -> _State:
    return _State(value, twins.widen(value), [twins], reach)


def _reach(states: Iterable[_State]) -> frozenset[str]:
    return NONE.union(*(state.reach for state in states))


class Trial:
    """One run, with the units of certain weights doubled.

    Attributes:
        result: what becomes wider.
        failures: units that cannot be doubled, with the reason.
        read: the weights whose units others read as twins.
    """

    def __init__(
        self,
        bio: fx.GraphModule,
        sites: dict[str, WeightSite],
        doubled: frozenset[str],
        fixed: dict[str, str],
        opaque: Collection[str],
        nodes: Nodes,
    ) -> None:
        self.result = Widening(doubled)
        self.failures: list[tuple[frozenset[str], str]] = []
        self.read: set[str] = set()
        self._bio = bio
        self._sites = sites
        self._uses = {call.node: (site, call) for site in sites.values() for call in site.calls}
        self._fixed = fixed
        self._opaque = opaque
        self._nodes = nodes
        self._states: dict[fx.Node, _State] = {}
        self._in_islands = {
            id(tensor)
            for path in (island_path(bio, node) for node in bio.graph.nodes)
            for module in ([] if path is None else [bio.get_submodule(path)])
            for tensor in (*module.parameters(), *module.buffers())
        }
        self._constant: set[fx.Node] = set()  # what is made of parameters, and of no value that comes in
        self._agreed: dict[str, tuple[Twins | None, frozenset[str]]] = {}
        self._random: dict[int, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def run(self) -> None:
        """Send everything through the graph."""
        waiting = Counter(source for node in self._bio.graph.nodes for source in node.all_input_nodes)
        for node in self._bio.graph.nodes:
            self._states[node] = self._after(node)
            for source in node.all_input_nodes:
                waiting[source] -= 1
                if not waiting[source] and source not in self._constant and _has_tensor(self._states[source].old):
                    self._states[source] = _unchanged(None)  # free the memory

    def _after(self, node: fx.Node) -> _State:
        sources = [self._states[source] for source in node.all_input_nodes if self._states[source].changed]
        if node.op == "output":
            for source in sources:
                self._fail(source.reach, "its units are the model's output")
            return _unchanged(None)
        if node in self._uses:
            return self._operator(*self._uses[node])
        old = self._old(node)
        state = _unchanged(old)
        if sources and (found := control_flow_of(self._bio, node)) is not None and found.depends_on_mode:
            self._fail(
                _reach(sources), f"its units reach {describe_control_flow(self._bio, node)}"
            )  # tried in one mode only
        elif sources:
            try:
                state = self._beside(node, old)
            except _Cannot:
                state = self._beside_some(node, old)
        for name in self._tensors_with_units(node):
            wanted = self.result.tensors.get(name) if state.changed else None
            self._agree(name, wanted, state.reach, self._name(node))
        return state

    def _fail(self, units: frozenset[str], reason: str) -> None:
        """Units cannot be doubled. What fails behind other failures may go along when those are gone."""
        if units and all(units.isdisjoint(earlier) for earlier, _ in self.failures):
            self.failures.append((units, reason))

    def _agree(self, tensor: str, wanted: Twins | None, reach: frozenset[str], reader: str) -> None:
        """All uses of a tensor have to agree on how wide it becomes."""
        before, earlier = self._agreed.setdefault(tensor, (wanted, reach))
        if not alike(before, wanted):
            self._fail(earlier | reach, f"its units are read by {reader}, which reads others as well")

    # --- operators on weights ----------------------------------------------------------------------------------

    def _operator(self, site: WeightSite, call: Call) -> _State:
        own = self.result.doubled & frozenset({site.name})
        reach = _reach(state for n in call.node.all_input_nodes if (state := self._states[n]).changed)
        old = pytree.tree_map_only(Tensor, self._number_like, self._nodes.value(call.node))
        if call.source is None or site.name in self._opaque:
            self._fail(reach, f"its units are read by {site.name}, and {self._fixed[site.name]}")
            return _unchanged(old)
        source, channel = self._states[call.source], call.use.output_axes[0] % old.dim()
        beside = [n for n in call.node.all_input_nodes if n is not call.source and not (own and n is call.bias)]
        self._fail(_reach(self._states[n] for n in beside), f"its units are read by {site.name} beside its activation")
        twins, columns = source.twins[0] if source.changed else None, None
        if twins is not None:
            axis = call.use.source_axes[0] % source.old.dim()
            if twins.is_uniform and twins.axis < axis == channel and call.use.operator != "einsum":
                if own:
                    self._fail(own, "it acts on each of many units by itself, and those are doubled")
                return _wider(old, twins, source.reach)
            if twins.is_uniform and twins.axis == axis:
                columns = self._columns(site, twins, source.reach)
            else:
                self._fail(source.reach, f"its units are read by {site.name} along other axes than that of units")
        self._agree(site.name, columns, source.reach, site.name)
        if columns is not None:
            self.result.columns[site.name] = columns
            self.read |= source.reach
        return self._doubled(site, call, own, old, channel) if own else _unchanged(old)

    def _doubled(self, site: WeightSite, call: Call, own: frozenset[str], old: Tensor, channel: int) -> _State:
        """What an operator returns whose postsynaptic units are doubled."""
        doubled, bias, reach = adjacent(site.units), call.bias, own
        if call.use.bias is not None and bias is None:
            self._fail(reach, "its bias cannot be doubled")
        elif bias is not None:
            is_vector = self._states[bias].old.dim() == 1
            is_on_units = is_vector and (channel == old.dim() - 1 or call.use.operator.startswith("conv"))
            if is_on_units:
                for _ in self._wider_constants(call.node, [bias], doubled, own):
                    break
            reach |= self._states[bias].reach
            if not is_on_units or not alike(self._states[bias].twins[0], doubled):
                self._fail(reach, "its bias cannot be doubled")
        return _wider(old, doubled.on(channel), reach)

    def _columns(self, site: WeightSite, twins: Twins, reach: frozenset[str]) -> Twins | None:
        """How the presynaptic axis of a weight becomes wider."""
        columns = twins.on(0) if twins.size == site.presynaptic_units else refitted(twins, site.presynaptic_units)
        if site.name in self._fixed:
            reason = f", and {self._fixed[site.name]}"
        elif columns is None:
            reason = ", whose positions are not doubled alike"
        elif not torch.equal(columns.source * site.groups // columns.size, _groups(len(columns.source), site.groups)):
            reason = ", whose groups are not doubled alike"
        else:
            return columns
        self._fail(reach, f"its units are read by {site.name}{reason}")
        return None

    # --- other nodes -------------------------------------------------------------------------------------------

    def _beside(self, node: fx.Node, old: Any) -> _State:
        """The state of a node that reads something wider."""
        sources = [state for n in node.all_input_nodes if (state := self._states[n]).changed]
        # What only a size depends on does not go through the node. If there is nothing else, it makes a tensor.
        reach = _reach([state for state in sources if any(state.twins)] or sources)
        for partly in (False, True):  # an axis may also be doubled in part, such as one that inputs share with units
            for arguments, twins in self._attempts(node, reach):
                found = self._attempt(node, arguments, twins, old, reach)
                if found is None or not (partly or all(t is None or bool(t.sign.all()) for t in found.twins)):
                    continue
                if arguments[0] is not node.args:
                    self.result.arguments[node] = arguments
                if twins is not None:
                    self._note_module(node, twins, reach)
                return found
        raise _Cannot

    def _attempt(
        self, node: fx.Node, arguments: Arguments, twins: Twins | None, old: Any, reach: frozenset[str]
    ) -> _State | None:
        """The state of a node with these arguments, and a module that is this much wider, if it goes along then."""
        try:
            new = self._call(node, arguments, "new", twins)
        except Exception:  # noqa: BLE001 - whatever a node says to what it was not made for
            return None
        return self._matched(node, arguments, old, new, reach)

    def _beside_some(self, node: fx.Node, old: Any) -> _State:
        """The state of a node that only goes along if some of the units that reach it stay as they are: the fewest."""
        changed = {n: state for n in node.all_input_nodes if (state := self._states[n]).changed}
        why = self._why(node)
        for count in range(1, len(changed) if len(changed) <= MANY else 1):
            for chosen in itertools.combinations(changed, count):
                units = _reach([changed[n] for n in chosen])
                if not units.isdisjoint(_reach([changed[n] for n in changed if n not in chosen])):
                    continue
                self._states |= {n: _unchanged(changed[n].old) for n in chosen}
                try:
                    state = self._beside(node, old)
                except _Cannot:
                    continue
                finally:
                    self._states |= changed
                self._fail(units, why)
                return state
        self._fail(_reach(changed.values()), why)
        return _unchanged(old)

    def _attempts(self, node: fx.Node, reach: frozenset[str]) -> Iterator[tuple[Arguments, Twins | None]]:
        """What may help: other arguments, a wider module, wider parameters."""
        present = (node.args, node.kwargs)
        known = (t for n in node.all_input_nodes for t in self._states[n].twins)
        twins = next((t for t in known if t is not None and t.is_uniform), None)
        if twins is not None and self._has_sizes(node):
            yield present, twins
        yield present, None
        if twins is None:
            return
        has_sizes = self._nodes.kind(node) in (*MOVES, Kind.NORM)
        others = list(scalings(present, Fraction(len(twins.source), twins.size))) if has_sizes else []
        yield from ((arguments, None) for arguments in others)
        for _ in self._wider_constants(node, node.all_input_nodes, twins, reach):
            yield from ((arguments, None) for arguments in (present, *others))

    def _wider_constants(
        self, node: fx.Node, operands: Sequence[fx.Node], twins: Twins, reach: frozenset[str]
    ) -> Iterator[None]:
        """With each item, the parameters among the operands are wider: along the last axis that fits, or the first."""
        chains = [chain for operand in operands if (chain := self._chain(operand, node))]
        for which in (-1, 0) if chains else ():
            saved, result = {n: self._states[n] for chain in chains for n in chain}, self.result
            tensors, met, arguments = ({**x} for x in (result.tensors, result.met, result.arguments))
            self.result = replace(result, tensors=tensors, met=met, arguments=arguments)
            try:
                for start, *links in chains:
                    value = self._states[start].old
                    axis = unit_axis(value, twins, which)
                    if axis is not None:
                        self._states[start] = _wider(value, twins.on(axis), reach)
                        self._note(str(start.target), value, twins, reach, which)
                        for link in links:
                            self._states[link] = self._beside(link, self._states[link].old)
                yield
            except _Cannot:
                pass
            self._states |= saved
            self.result = result

    def _chain(self, operand: fx.Node, reader: fx.Node) -> list[fx.Node]:
        """The nodes from a parameter to what is made of it, if it is as it was, and nothing else has read it yet."""
        chain = [operand]
        while chain[0].op != "get_attr":
            sources = [n for n in chain[0].all_input_nodes if n in self._constant]
            if chain[0] not in self._constant or len(sources) != 1:
                return []
            chain.insert(0, sources[0])
        held = attribute(self._bio, str(chain[0].target))
        if not isinstance(held, Tensor) or id(held) in self._in_islands:
            return []
        readers = {user for n in chain for user in n.users if user in self._states} - {*chain, reader}
        is_wider = any(self._states[n].changed for n in chain)
        return [] if readers or is_wider or str(chain[0].target) in self._sites else chain

    def _note_module(self, node: fx.Node, twins: Twins, reach: frozenset[str]) -> None:
        for name, tensor in self._tensors_with_units(node).items():
            self._note(name, tensor, twins, reach)
        self.result.sizes[str(node.target)] = wider_sizes(self._bio.get_submodule(str(node.target)), twins)

    def _note(self, name: str, tensor: Tensor, twins: Twins, reach: frozenset[str], which: int = -1) -> None:
        axis = unit_axis(tensor, twins, which)
        if axis is not None:
            self.result.tensors[name] = twins.on(axis)
            self.result.met[name] = self.result.met.get(name, NONE) | reach

    # --- comparing ---------------------------------------------------------------------------------------------

    def _matched(self, node: fx.Node, arguments: Arguments, old: Any, new: Any, reach: frozenset[str]) -> _State | None:
        """The state of a node, if its new value is the old one made wider."""
        before, spec = pytree.tree_flatten(old)
        after, spec_after = pytree.tree_flatten(new)
        if spec != spec_after:
            return None
        for index in _unread(node, old):
            after[index] = before[index]
        is_moved = self._nodes.kind(node) in MOVES
        moved = (self._moved(node, arguments) if is_moved else None) or [None] * len(before)
        try:
            twins = [self._made_wider(node, *leaf) for leaf in zip(before, after, moved, strict=True)]
        except _Cannot:
            return None
        for index, (value, wider) in enumerate(zip(before, twins, strict=True)):
            if isinstance(value, Tensor):
                after[index] = value if wider is None else wider.widen(value)  # so that rounding does not add up
        is_same = all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(before, after, strict=True))
        return _State(old, old if is_same else pytree.tree_unflatten(after, spec), twins, reach)

    def _made_wider(self, node: fx.Node, old: Any, new: Any, moved: Twins | None) -> Twins | None:
        """How a tensor became wider, or None if it is the same, or no tensor."""
        if not isinstance(old, Tensor) or not isinstance(new, Tensor) or _same(old, new):
            return None
        axes = resized_axes(old, new)
        if len(axes) != 1:
            raise _Cannot
        known = [twins for source in node.all_input_nodes for twins in self._states[source].twins]
        for twins in (moved, *known, adjacent(old.shape[axes[0]])):
            if twins is None or twins.size != old.shape[axes[0]]:
                continue
            if twins.is_uniform:
                twins = twins.on(axes[0])
            if twins.axis == axes[0] and _same(twins.widen(old), new) and twins.are_in_order():
                return twins
        raise _Cannot

    def _moved(self, node: fx.Node, arguments: Arguments) -> list[Twins | None]:
        """Where an operator on layout puts twins: it is executed on numbers that name the entries of its inputs."""
        names: dict[bool, dict[fx.Node, Any]] = {False: {}, True: {}}
        count = 0
        for source in node.all_input_nodes:
            state = self._states[source]
            leaves, spec = pytree.tree_flatten(state.old)
            old, new = list(leaves), pytree.tree_leaves(state.new)
            for index, (leaf, twins) in enumerate(zip(leaves, state.twins, strict=True)):
                if isinstance(leaf, Tensor) and (twins is not None or leaf.is_floating_point()):
                    old[index] = named(leaf.shape, count + 1, leaf.device)
                    new[index] = old[index] if twins is None else named_twins(old[index], twins)
                    count += leaf.numel()
            names[False][source], names[True][source] = (pytree.tree_unflatten(x, spec) for x in (old, new))
        try:
            before = self._execute(node, *fx.map_arg((node.args, node.kwargs), names[False].__getitem__))
            after = self._execute(node, *fx.map_arg(arguments, names[True].__getitem__))
        except Exception:  # noqa: BLE001 - not every operator takes numbers of another type
            return []
        pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
        return [followed(a, b) if isinstance(a, Tensor) else None for a, b in pairs]

    # --- values ------------------------------------------------------------------------------------------------

    def _old(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            self._constant.add(node)
            return self._randomised(attribute(self._bio, str(node.target)))
        inputs = {source: self._states[source].old for source in node.all_input_nodes}
        if node.op != "placeholder":
            tensors = {source for source, value in inputs.items() if isinstance(value, Tensor)}
            if tensors and tensors <= self._constant:
                self._constant.add(node)
            try:
                return self._call(node, (node.args, node.kwargs), "old")
            except Exception:  # noqa: BLE001 - on inputs of a shape that was guessed
                pass
        return pytree.tree_map_only(Tensor, self._number_like, self._nodes.value(node))

    def _call(self, node: fx.Node, arguments: Arguments, which: str, twins: Twins | None = None) -> Any:
        args, kwargs = fx.map_arg(arguments, lambda n: getattr(self._states[n], which))
        return self._execute(node, args, kwargs, twins)

    def _execute(self, node: fx.Node, args: Any, kwargs: Any, twins: Twins | None = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))  # it may change them in place
        if node.op == "call_module":
            return self._module(node, twins)(*args, **kwargs)
        return compute(self._bio, node, args, kwargs)

    def _module(self, node: fx.Node, twins: Twins | None) -> nn.Module:
        """The module that a node calls; one with a parameter for each unit with random ones, and wider if asked."""
        module = self._bio.get_submodule(str(node.target))
        if not self._has_sizes(node):
            return module
        result = copy.deepcopy(module)
        for key, tensor in own_tensors(module).items():
            value = self._randomised(tensor)
            axis = None if twins is None else unit_axis(value, twins)
            if twins is not None and axis is not None:
                value = twins.on(axis).widen(value)
            setattr(result, key, nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value)
        vars(result).update({} if twins is None else wider_sizes(module, twins))
        return result

    def _has_sizes(self, node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        module = self._bio.get_submodule(str(node.target))
        is_fixed = any(id(tensor) in self._in_islands for tensor in own_tensors(module).values())
        return not is_fixed and any(size in vars(module) for size in SIZES)

    def _tensors_with_units(self, node: fx.Node) -> dict[str, Tensor]:
        """The parameters and buffers of a module with a parameter for each unit, by name."""
        if not self._has_sizes(node):
            return {}
        names = {id(parameter): name for name, parameter in self._bio.named_parameters()}
        own = own_tensors(self._bio.get_submodule(str(node.target)))
        return {names.get(id(tensor), f"{node.target}.{key}"): tensor for key, tensor in own.items()}

    def _randomised(self, value: Any) -> Any:
        """Random numbers in place of a parameter, whose own may be too special, such as γ = 0."""
        if not isinstance(value, nn.Parameter):
            return value
        if id(value) not in self._random:
            self._random[id(value)] = self._number_like(value)
        return self._random[id(value)]

    def _number_like(self, tensor: Tensor) -> Tensor:
        """Random numbers between 0 and 1, where most functions are defined."""
        if not tensor.is_floating_point():
            return tensor
        device = next(self._bio.parameters()).device if tensor.is_meta else tensor.device
        return (0.1 + 0.8 * torch.rand(tensor.shape, generator=self._generator)).to(device, tensor.dtype)

    # --- reasons -----------------------------------------------------------------------------------------------

    def _name(self, node: fx.Node) -> str:
        path = next((path for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "")
        name = self._nodes.name(node)
        return f"{name} in {path}" if path else name

    def _why(self, node: fx.Node) -> str:
        """Why a node does not go along."""
        kind = self._nodes.kind(node)
        numbers = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, int)]
        if kind is Kind.LAYOUT and max(numbers, default=0) > 1:
            return f"{self._name(node)} has fixed sizes"
        others = [n for n in node.all_input_nodes if not self._states[n].changed]
        joined = sorted((n for n in others if isinstance(self._states[n].old, Tensor)), key=self._constant.__contains__)
        if joined and kind in (Kind.MERGE, Kind.CONCATENATE, Kind.PRODUCT, Kind.ATTENTION):
            return f"{self._name(node)} joins its units with {self._origin(joined[0])}, not doubled"
        return f"its units reach {self._name(node)}, which computes something else of doubled ones"

    def _origin(self, node: fx.Node) -> str:
        """Where a value comes from."""
        while True:
            if node.op == "placeholder":
                return f"input {str(node.target).lstrip('*')}"
            if node.op == "get_attr":
                is_parameter = isinstance(attribute(self._bio, str(node.target)), nn.Parameter)
                return f"the {'parameter' if is_parameter else 'buffer'} {node.target}"
            if node in self._uses:
                return f"those of {self._uses[node][0].name}"
            sources = sorted(node.all_input_nodes, key=self._constant.__contains__)
            if self._nodes.kind(node) is Kind.UNKNOWN or not sources:
                return f"the result of {self._name(node)}"
            node = sources[0]


def _groups(count: int, groups: int) -> Tensor:
    """The group of each of a number of positions."""
    return torch.arange(count) * groups // count


def _unread(node: fx.Node, value: Any) -> set[int]:
    """What nothing reads of a node's tuple of tensors, such as the indices of a maximum."""
    if not isinstance(value, tuple) or not all(isinstance(x, Tensor) for x in value):
        return set()
    if any(user.target is not operator.getitem or not isinstance(user.args[1], int) for user in node.users):
        return set()
    return set(range(len(value))) - {user.args[1] % len(value) for user in node.users if user.users}  # type: ignore[operator]


def _has_tensor(value: Any) -> bool:
    return any(isinstance(x, Tensor) for x in pytree.tree_leaves(value))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, to the rounding of one operator."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b) or not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    tolerance = torch.finfo(a.dtype).eps ** 0.75
    gap = (a - b).abs().max()
    if not bool(gap.isfinite()):
        defined = a.isfinite() & b.isfinite()
        is_special_alike = (a == b) | (a.isnan() & b.isnan()) | defined
        a, b = (torch.where(defined, x, 0) for x in (a, b))
        return bool(is_special_alike.all()) and _same(a, b)
    return bool(gap <= tolerance * a.abs().max())
