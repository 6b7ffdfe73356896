"""Weight paths: the nodes of the original model between the end of a weight's chain and the operator that reads it.

    raw → inserted nodes (the chain) → original nodes (the path) → operator

A path changes the layout of a weight (a transpose, a view, a chunk), or each of its entries by itself (a cast, a scale,
a mask). Layouts are *executed on a tensor without memory*, whose strides then tell which axis went where. Behind a
parametrization that computes each entry from all of them, that is not known any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from biofx.chain import attribute, callee, compute
from biofx.islands import is_island
from biofx.operator_kinds import Operation, operation
from biofx.parts import part_of
from biofx.provenance import inserted
from biofx.weights.axes import GROUP, Axes, axes_of, axes_of_view
from biofx.weights.operators import Call, Refusal, is_operator, read
from biofx.weights.reparametrizations import DIRECTION, SCALED, Effect, effect
from biofx.weights.roles import calls_inside


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LAYOUTS = _names(
    "flatten view viewas reshape unflatten permute transpose t mt h mh numpyt swapaxes swapdims movedim moveaxis "
    "unsqueeze squeeze chunk split splitwithsizes tensorsplit unbind narrow select slice getitem expand"
)
_COPIES = _names("contiguous clone alias identity to tocopy type typeas float double half bfloat16 cuda cpu")
_QUOTIENTS = _names("div truediv divide")
_SUMS = _names("add sub subtract")
_ENTRYWISE = _QUOTIENTS | _SUMS | _names("mul multiply weightnorm normalize")


@dataclass(frozen=True)
class Step:
    """A node on a path.

    Attributes:
        node: the node.
        is_layout: whether it moves entries, instead of changing each by itself.
        effect: what else it does to them.
    """

    node: fx.Node
    is_layout: bool
    effect: Effect = SCALED


@dataclass(frozen=True, eq=False)
class Use:
    """One use of a weight.

    Attributes:
        call: the call of the operator.
        path: the nodes of the original model that lead to it from the end of the weight's chain.
        axes: the axes of the stored weight, or None if they cannot be told.
    """

    call: Call
    path: tuple[Step, ...]
    axes: Axes | None

    @property
    def node(self) -> fx.Node:
        """The call."""
        return self.call.node

    @property
    def is_direct(self) -> bool:
        """Whether the operator reads the end of the chain itself."""
        return not self.path

    @property
    def remark(self) -> str:
        """Why the operator may see an entry with another sign than the stored one, or an empty string."""
        return next((step.effect.remark for step in self.path if step.effect.remark), "")

    @property
    def mixes(self) -> str:
        """Why no entry that the operator sees stands for a stored one, or an empty string."""
        return next((step.effect.mixes for step in self.path if step.effect.mixes), "")

    def presynaptic_positions(self) -> Tensor | None:
        """The weight's presynaptic unit at each presynaptic position of this use, or None if they are the same."""
        return self._positions("spread_presynaptic", self.call.presynaptic)

    def postsynaptic_positions(self) -> Tensor | None:
        """The weight's postsynaptic unit at each postsynaptic position of this use, or None if they are the same."""
        return self._positions("spread", self.call.postsynaptic)

    def _positions(self, spread: str, kept: Sequence[int]) -> Tensor | None:
        """Execute the path on the numbers of units, and read them off the operator's axes."""
        if self.axes is None or not any(step.is_layout for step in self.path):
            return None
        count = self.axes.units if spread == "spread" else self.axes.presynaptic_units
        value: Any = getattr(self.axes, spread)(torch.arange(count)).expand(self.axes.shape)
        for step in self.path:
            if step.is_layout:
                value = apply(step.node, value)
        lengths = self.call.lengths
        value = value.reshape(lengths)[tuple(slice(None) if i in kept else slice(0, 1) for i in range(len(lengths)))]
        return value.flatten()  # type: ignore[no-any-return]


@dataclass
class Uses:
    """What becomes of a weight behind its chain.

    Attributes:
        uses: calls of known operators that consume it.
        inside: its uses inside of islands and parts.
        refusals: why other calls cannot be uses.
        readers: the other nodes that read it.
        on_path: the nodes of all paths.
        changes: what changes it in place.
    """

    uses: list[Use]
    inside: list[Use]
    refusals: list[Refusal]
    readers: list[fx.Node]
    on_path: list[fx.Node]
    changes: list[fx.Node]


def follow(bio: fx.GraphModule, end: fx.Node, shape: Sequence[int], depends: Dependence) -> Uses:
    """Follow a weight from the end of its chain to the operators that consume it.

    Args:
        bio: the model.
        end: the last node of the chain.
        shape: shape of the weight without the axis of its synapses.
        depends: what the nodes of the graph depend on.
    """
    found = Uses([], [], [], [], [], [])
    base = torch.empty(tuple(shape), device="meta")
    _follow(bio, end, base, (), base, depends, found, None)
    found.uses.sort(key=lambda use: use.node)  # nodes compare by their place in the graph
    return found


def _follow(
    bio: fx.GraphModule,
    start: fx.Node,
    start_value: Any,
    start_path: tuple[Step, ...],
    base: Tensor,
    depends: Dependence,
    found: Uses,
    part: fx.Node | None,
) -> None:
    """Follow a weight from a node in the graph of the model, or in one that a call of a part in it runs."""
    waiting = [(start, start_value, start_path)]
    while waiting:
        node, value, path = waiting.pop()
        for user in node.users:
            mixing = _mixing(bio, user)
            if isinstance(mixing, Step):
                if user not in found.on_path:  # it may read the weight twice
                    found.on_path.append(user)
                    waiting.append((user, value, (*path, mixing)))
                continue
            answer: Call | Refusal | None = mixing
            if answer is None and isinstance(value, Tensor):
                answer = read(user, node, value.shape, depends.on_parameters)
            inner = part_of(bio, user)
            if isinstance(answer, Refusal):
                found.refusals.append(answer)
            elif answer is not None and part is None and answer.sources:
                found.uses.append(_use(answer, path, base, value))
            elif answer is not None:
                found.inside.append(_inside(part or user, _use(answer, path, base, value)))
            elif is_island(user) and (calls := calls_inside(bio, user, node, base.shape)):
                for call, effect in calls:
                    before = () if effect is None else (Step(user, False, effect),)
                    found.inside.append(_use(call, (*path, *before), base, value))
            elif inner is not None and inner.graphs():
                for graph in inner.graphs():
                    within = depends.within(graph, user)
                    for place in (place for place, source in within.given.items() if source is node):
                        _follow(graph, place, value, path, base, within, found, part or user)
            elif (
                not is_operator(user)
                and inserted(user) is None
                and (step := _step(bio, user, node, value, depends)) is not None
            ):
                found.on_path.append(user)
                waiting.append((user, apply(user, value) if step.is_layout else value, (*path, step)))
            else:
                found.readers.append(user)
                if inserted(user) is None and user.op.startswith("call_") and operation(user, bio).changes is node:
                    found.changes.append(user)


def _inside(part: fx.Node, use: Use) -> Use:
    """A use inside of a part of the model, or of an operator in one piece, for those outside of it."""
    remark = "its operator multiplies several activations" if len(use.call.sources) > 1 else ""
    call = replace(use.call, node=part, bias=None, sources=(), output_axes=())
    return replace(use, call=call, path=(*use.path, *([Step(use.node, False, Effect(remark))] if remark else [])))


def _use(call: Call, path: tuple[Step, ...], base: Tensor, value: Tensor) -> Use:
    if any(step.effect.mixes for step in path):
        return Use(call, path, None)
    if not any(step.is_layout for step in path):
        return Use(call, path, axes_of(base.shape, zip(call.axes, call.lengths, call.roles, strict=True)))
    view = value.view(call.lengths)
    for index, (length, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if length > 1 and stride == 0 and call.roles[index] == GROUP:  # one weight for all groups: there are none
            shorter = call.without_group(index)
            if shorter is None:
                return Use(call, path, None)
            call = shorter
    return Use(call, path, axes_of_view(base.shape, view, call.roles) if base.numel() else None)


def _mixing(bio: fx.GraphModule, node: fx.Node) -> Step | Refusal | None:
    """What a node of an orthogonal parametrization does to a weight, which has its shape again behind the last one."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    path = str(node.target) if node.op == "call_module" else next(reversed(stack), "")
    try:
        module = bio.get_submodule(path)
    except AttributeError:  # torch.export names parts of lists, too
        return None
    if not isinstance(module, parametrizations._Orthogonal):
        return None
    known = effect(module)
    return Step(node, False, known) if isinstance(known, Effect) else Refusal(known)


def _step(bio: fx.GraphModule, node: fx.Node, operand: fx.Node, value: Any, depends: Dependence) -> Step | None:
    """What a node does to a weight, or None if it is no part of a path."""
    if not node.op.startswith("call_") or _first(node) is None:
        return None
    call = operation(node, bio)
    if node.op == "call_module":
        is_scale = isinstance(bio.get_submodule(str(node.target)), parametrizations._SpectralNorm)
        return Step(node, False) if is_scale else None
    if call.changes is not None:
        return None
    if not isinstance(value, Tensor):  # the parts of a weight
        return Step(node, True) if call.key == "getitem" and isinstance(node.args[1], int) else None
    if call.key in _LAYOUTS and _first(node) is operand:
        return _layout(node, value)
    if call.key in _COPIES and _first(node) is operand:
        return Step(node, False)
    if call.key in _ENTRYWISE:
        return _entrywise(bio, node, operand, call, value, depends)
    return None


def _layout(node: fx.Node, value: Tensor) -> Step | None:
    try:
        result = apply(node, value)
    except Exception:  # noqa: BLE001 - whatever a layout says to arguments that are not known
        return None
    parts = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, tuple | list) else []
    storage = value.untyped_storage()._cdata
    is_view = all(isinstance(part, Tensor) and part.untyped_storage()._cdata == storage for part in parts)
    return Step(node, True) if parts and is_view else None


def _entrywise(
    bio: fx.GraphModule, node: fx.Node, operand: fx.Node, call: Operation, value: Tensor, depends: Dependence
) -> Step | None:
    """A step that multiplies each entry with a number of its own, or adds one."""
    if depends.on_inputs(node):
        return None
    if call.key in ("normalize", "weightnorm"):
        is_kept = _first(node) is operand
        return Step(node, False, DIRECTION if call.key == "weightnorm" else SCALED) if is_kept else None
    operands = [*node.args, *node.kwargs.values()][:2]
    if operands.count(operand) != 1 or len(operands) < 2:
        return None
    is_first = operands[0] is operand
    other = operands[1 if is_first else 0]
    if (call.key in _QUOTIENTS and not is_first) or not _fits(bio, other, value):
        return None
    if call.key in _SUMS:
        return Step(node, False, Effect(remark="its operator reads the sum of it and something else"))
    if (isinstance(other, int | float) and other > 0) or _is_nonnegative(bio, other):
        return Step(node, False)
    return Step(node, False, Effect(remark=f"its operator reads it times {_named(other)}, which may be negative"))


def _named(value: Any) -> str:
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else str(value)


def _fits(bio: fx.GraphModule, other: Any, value: Tensor) -> bool:
    """Whether a number or tensor broadcasts against a weight, without stretching it."""
    if isinstance(other, int | float):
        return True
    if not isinstance(other, fx.Node):
        return False
    try:
        shape = Constants(bio, on_meta=True)(other).shape
        return tuple(torch.broadcast_shapes(shape, value.shape)) == value.shape
    except Exception:  # noqa: BLE001 - whatever a node says to a tensor without values
        return False


def _is_nonnegative(bio: fx.GraphModule, node: Any) -> bool:
    """Whether a node holds a buffer without negative values, such as a mask."""
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if not node.all_input_nodes or operation(node, bio).key not in _COPIES | _LAYOUTS:
            return False
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node):
        return False
    held = attribute(bio, str(node.target))
    return isinstance(held, Tensor) and not isinstance(held, nn.Parameter) and bool((held >= 0).all())


def _first(node: fx.Node) -> fx.Node | None:
    return next(iter(node.all_input_nodes), None)


def apply(node: fx.Node, value: Any) -> Any:
    """A layout, executed on another tensor. A length that the model computes becomes 2, where it repeats a weight."""
    key = operation(node, nn.Module()).key

    def argument(source: fx.Node) -> Any:
        if source is _first(node):
            return value
        if key == "expand":
            return 2
        raise ValueError(f"{source} is not known")

    args: Any
    args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
    if key in ("view", "reshape"):  # the tensor may be laid out in memory in another way
        return args[0].reshape(*args[1:], *kwargs.values())
    return compute(nn.Module(), node, args, kwargs)


class Constants:
    """Computes nodes that depend on parameters and buffers only."""

    def __init__(
        self, bio: fx.GraphModule, given: Mapping[fx.Node, Any] | None = None, *, on_meta: bool = False
    ) -> None:
        self._bio = bio
        self._known: dict[fx.Node, Any] = dict(given or {})
        self._on_meta = on_meta

    def __call__(self, node: fx.Node) -> Any:
        """The value of a node.

        Raises:
            ValueError: it depends on an input of the model.
        """
        if node not in self._known:
            self._known[node] = self._compute(node)
        return self._known[node]

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            value = attribute(self._bio, str(node.target))
            return value.to("meta") if self._on_meta and isinstance(value, Tensor) else value
        if node.op in ("placeholder", "output"):
            raise ValueError(f"{node} is not known")
        return compute(self._bio, node, *fx.map_arg((node.args, node.kwargs), self))


class Dependence:
    """What the nodes of a graph depend on; found out when it is first asked for.

    Attributes:
        given: what the placeholders stand for, if it is the graph of a part of the model.
    """

    def __init__(
        self, bio: fx.GraphModule, given: Mapping[fx.Node, Any] | None = None, around: Dependence | None = None
    ) -> None:
        self._bio = bio
        self._around = around
        self.given = given or {}

    def within(self, graph: fx.GraphModule, call: fx.Node) -> Dependence:
        """What the nodes of a graph depend on that a call of a part of the model runs."""
        return Dependence(graph, dict(zip(graph.graph.find_nodes(op="placeholder"), call.args, strict=True)), self)

    def on_inputs(self, node: Any) -> bool:
        """Whether a node depends on the values, not just on the shape or dtype, of the model's inputs."""
        return node in self._found[0]

    def on_parameters(self, node: Any) -> bool:
        """Whether a node depends on parameters, and not on the model's inputs."""
        return node in self._found[1]

    @cached_property
    def _found(self) -> tuple[set[fx.Node], set[fx.Node]]:
        around = self._around
        on_inputs = {place for place, source in self.given.items() if around is not None and around.on_inputs(source)}
        on_parameters = {place for place, source in self.given.items() if around and around.on_parameters(source)}
        for node in self._bio.graph.nodes:
            name = node.args[1] if node.target is getattr else callee(node)
            sources = () if name in _ABOUT_TENSORS else node.all_input_nodes[: 1 if name in _LIKE_OTHERS else None]
            is_parameter = node.op == "get_attr" and isinstance(attribute(self._bio, str(node.target)), nn.Parameter)
            is_input = node.op == "placeholder" and node not in self.given
            if is_input or not on_inputs.isdisjoint(sources):
                on_inputs.add(node)
            elif is_parameter or not on_parameters.isdisjoint(sources):
                on_parameters.add(node)
        return on_inputs, on_parameters


_LIKE_OTHERS = ("to", "type_as", "expand", "expand_as")  # take no more than shape or dtype from their other operands
_ABOUT_TENSORS = ("shape", "size", "dtype", "device", "dim", "ndim", "numel", "sym_size")
