"""Both modes: one graph that follows `.train()` and `.eval()`, from one graph for each.

Where the two only differ in constants, the graph reads them from `ByMode` modules. Where one has nodes that the other
has not, a `Path` module runs those of the present mode. Either way the graph does in each mode just what the graph for
that mode does, in the same order, whichever nodes of the two are taken for the same.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from biofx.capture.modes import ByMode
from biofx.capture.tracer import StandIn, Tracer, unused_name
from biofx.model.parts import Part

if TYPE_CHECKING:
    from biofx.capture.exported.program import Program

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # their children are not all theirs to call
_CONTIGUOUS = torch.ops.aten.contiguous.default


class Path(StandIn, Part):
    """Two ways through a part of forward, of which the mode chooses one. What the other would compute is None."""

    chooses = True
    _is_impure = True

    def __init__(self, in_training: fx.GraphModule, in_evaluation: fx.GraphModule, counts: tuple[int, int]) -> None:
        super().__init__()
        self.in_training = in_training
        self.in_evaluation = in_evaluation
        self.counts = counts  # of what each computes

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """What the present way computes, and None in place of what the other does."""
        if self.training:
            return *self.in_training(*inputs), *[None] * self.counts[1]
        return *[None] * self.counts[0], *self.in_evaluation(*inputs)

    def graphs(self) -> tuple[fx.GraphModule, ...]:
        """The two ways."""
        return self.in_training, self.in_evaluation


class Either(StandIn, Part):
    """One of two values, chosen by the mode."""

    chooses = True

    def forward(self, in_training: Any, in_evaluation: Any) -> Any:
        """The one for the present mode."""
        return in_training if self.training else in_evaluation


def merged(model: nn.Module, training: Program, evaluation: Program) -> tuple[fx.Graph, dict[str, Tensor], list[Any]]:
    """One graph for both modes.

    Args:
        model: the model; modules that choose by mode are added to those whose mode they follow.
        training: the graph in training mode.
        evaluation: the graph in evaluation mode.

    Returns:
        The graph, without an output; the constants that it reads; and what its output will return in training and in
        evaluation mode, both as lists of nodes, or one list if it is the same in both.
    """
    merger = _Merger(model, training, evaluation)
    merger.run()
    return merger.graph, merger.constants, merger.results


class _Merger:
    def __init__(self, model: nn.Module, training: Program, evaluation: Program) -> None:
        self.graph = fx.Graph(tracer_cls=Tracer)
        self.constants = dict(training.constants)
        self.results: list[Any] = []
        self._model = model
        self._programs = (training, evaluation)
        self._new: tuple[dict[fx.Node, Any], dict[fx.Node, Any]] = ({}, {})
        self._attributes: dict[str, fx.Node] = {}
        self._renamed: dict[str, str] = {}
        self._added: dict[str, str] = {}

    def run(self) -> None:
        self._unify_constants()
        for pair in zip(*(p.graph.find_nodes(op="placeholder") for p in self._programs), strict=True):
            node = self.graph.placeholder(str(pair[0].target))
            for new, old in zip(self._new, pair, strict=True):
                new[old] = node
        calls = [[n for n in p.graph.nodes if n.op.startswith("call_")] for p in self._programs]
        keys = [[self._key(n, p) for n in nodes] for nodes, p in zip(calls, self._programs, strict=True)]
        for tag, a, b, c, d in SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
            if tag == "equal":
                for t, e in zip(calls[0][a:b], calls[1][c:d], strict=True):
                    self._both(t, e)
            else:
                for ts, es in _runs(calls[0][a:b], calls[1][c:d]):
                    self._part(ts, es)
        outputs = [next(iter(p.graph.find_nodes(op="output"))).args[0] for p in self._programs]
        self.results = [[self._value(mode, value) for value in outputs[mode]] for mode in (0, 1)]

    def _unify_constants(self) -> None:
        """Names for the constants of both modes, the same for equal ones."""
        for name, value in self._programs[1].constants.items():
            same = (n for n, other in self._programs[0].constants.items() if _equal(value, other))
            self._renamed[name] = next(same, f"{name}_in_evaluation")
            self.constants[self._renamed[name]] = value

    def _key(self, node: fx.Node, program: Program) -> Any:
        """What nodes of the two graphs have in common that are taken for the same."""
        target = program.blocks[str(node.target)].fingerprint if node.op == "call_module" else node.target
        return node.op, target, tuple(_stack(node)), _skeleton(_completed(node))

    # --- the graph -----------------------------------------------------------------------------------------------

    def _value(self, mode: int, value: Any) -> Any:
        """What the new graph has in place of an argument of an old one."""
        if not isinstance(value, fx.Node):
            return value
        if value.op != "get_attr":
            return self._new[mode][value]
        name = self._renamed.get(str(value.target), str(value.target)) if mode else str(value.target)
        if name not in self._attributes:
            self._attributes[name] = self.graph.get_attr(name)
        return self._attributes[name]

    def _both(self, t: fx.Node, e: fx.Node) -> None:
        args, kwargs = (self._merge(a, b, t) for a, b in zip(_completed(t), _completed(e), strict=True))
        target = self._add_block(0, t) if t.op == "call_module" else t.target
        node = self.graph.create_node(t.op, target, *_without_defaults(t, args, kwargs))
        node.meta["nn_module_stack"] = t.meta.get("nn_module_stack", {})
        self._new[0][t] = self._new[1][e] = node

    def _merge(self, a: Any, b: Any, node: fx.Node) -> Any:
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            x, y = self._value(0, a), self._value(1, b)
            return x if x is y else self.either(x, y, _stack(node))
        if type(a) is type(b) and isinstance(a, tuple | list) and len(a) == len(b):
            return type(a)(self._merge(x, y, node) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self._merge(a[key], b[key], node) for key in a}
        if type(a) is type(b) and a == b:
            return a
        return self.graph.call_module(self._add(ByMode(a, b), "by_mode", _stack(node)))

    def either(self, x: Any, y: Any, stack: Sequence[str]) -> fx.Node:
        """One of two values."""
        for a, b in ((x, y), (y, x)):
            if isinstance(a, fx.Node) and a.target is _CONTIGUOUS and a.args == (b,):
                return a
        return self.graph.call_module(self._add(Either(), "either", stack), (x, y))

    def _part(self, ts: list[fx.Node], es: list[fx.Node]) -> None:
        """Nodes of the two graphs that have no counterpart in the other."""
        if len(ts) + len(es) == 1 and (*ts, *es)[0].target is _CONTIGUOUS:
            # It is in one graph only because its operand is contiguous in the other, and then it returns the operand.
            mode, node = (0, ts[0]) if ts else (1, es[0])
            operand = self._value(mode, node.args[0])
            self._new[mode][node] = self.graph.call_function(_CONTIGUOUS, (operand,))
            self._new[mode][node].meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            return
        sources: dict[fx.Node, None] = {}
        for mode, nodes in ((0, ts), (1, es)):
            outer = (source for node in nodes for source in node.all_input_nodes if source not in nodes)
            sources.update(dict.fromkeys(self._value(mode, source) for source in outer))
        results = [[node for node in nodes if not set(node.users) <= set(nodes)] for nodes in (ts, es)]
        ways = [self._way(mode, nodes, results[mode], list(sources)) for mode, nodes in ((0, ts), (1, es))]
        path = Path(ways[0], ways[1], (len(results[0]), len(results[1])))
        stack = _common([_stack(node) for node in (*ts, *es)])
        call = self.graph.call_module(self._add(path, "by_mode_path", stack), tuple(sources))
        found = [(mode, node) for mode, nodes in enumerate(results) for node in nodes]
        for index, (mode, node) in enumerate(found):
            self._new[mode][node] = self.graph.call_function(operator.getitem, (call, index))

    def _way(self, mode: int, nodes: list[fx.Node], results: list[fx.Node], sources: list[fx.Node]) -> fx.GraphModule:
        graph = fx.Graph(tracer_cls=Tracer)
        placeholders = {source: graph.placeholder(f"input_{i}") for i, source in enumerate(sources)}
        copies: dict[fx.Node, fx.Node] = {}

        def copied(node: fx.Node) -> fx.Node:
            return copies[node] if node in copies else placeholders[self._value(mode, node)]

        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), copied)
            copies[node] = graph.create_node(node.op, node.target, args, kwargs)
        graph.output(tuple(copies[node] for node in results))
        blocks = self._programs[mode].blocks
        return fx.GraphModule({str(n.target): blocks[str(n.target)] for n in nodes if n.op == "call_module"}, graph)

    # --- modules that choose -------------------------------------------------------------------------------------

    def _add_block(self, mode: int, node: fx.Node) -> str:
        target = str(node.target)
        if target not in self._added:
            self._added[target] = unused_name(self._model, target)
            self._model.add_module(self._added[target], self._programs[mode].blocks[target])
        return self._added[target]

    def _add(self, module: StandIn, name: str, stack: Sequence[str]) -> str:
        """Add a module that chooses to the module whose mode it follows."""
        path = self._owner(stack)
        owner = self._model.get_submodule(path)
        child = unused_name(owner, name)
        owner.add_module(child, module.train(owner.training))
        return f"{path}.{child}".lstrip(".")

    def _owner(self, stack: Sequence[str]) -> str:
        """The module whose mode was read while the modules of a stack ran, the innermost that can have a child more."""
        for path in reversed(stack):
            reads = [*self._programs[0].reads.get(path, ()), *self._programs[1].reads.get(path, ())]
            if reads:
                owner = path if path in reads else reads[-1]
                break
        else:
            owner = stack[-1] if stack else ""
        while owner and isinstance(self._model.get_submodule(owner), CONTAINERS):
            owner = owner.rpartition(".")[0]
        return owner


def _stack(node: fx.Node) -> list[str]:
    """The paths of the modules whose forward made a node, from the model inwards."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _common(stacks: Sequence[list[str]]) -> list[str]:
    """What stacks have in common."""
    shortest = min(stacks, key=len)
    count = next((i for i, path in enumerate(shortest) if any(stack[i] != path for stack in stacks)), len(shortest))
    return shortest[:count]


def _runs(ts: list[fx.Node], es: list[fx.Node]) -> Iterator[tuple[list[fx.Node], list[fx.Node]]]:
    """Parts of what has no counterpart: what belongs to one module, if it is in one of the graphs only."""
    if ts and es:
        yield ts, es
        return
    run: list[fx.Node] = []
    for node in ts or es:
        if run and _stack(node) != _stack(run[-1]):
            yield (run, []) if ts else ([], run)
            run = []
        run.append(node)
    yield (run, []) if ts else ([], run)


def _completed(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with the defaults of an operator in place of those that are not given."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if isinstance(node.target, OpOverload):
        for argument in node.target._schema.arguments[len(args) :]:
            if argument.name in kwargs or not argument.has_default_value():
                continue
            if argument.kwarg_only:
                kwargs[argument.name] = argument.default_value
            elif len(args) == node.target._schema.arguments.index(argument):
                args.append(argument.default_value)
    return tuple(args), dict(sorted(kwargs.items()))


def _without_defaults(node: fx.Node, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, without the defaults of an operator."""
    if not isinstance(node.target, OpOverload):
        return args, kwargs
    arguments = node.target._schema.arguments

    def is_default(argument: Any, value: Any) -> bool:
        default = argument.default_value
        return argument.has_default_value() and type(value) is type(default) and bool(value == default)

    while args and is_default(arguments[len(args) - 1], args[-1]):
        args = args[:-1]
    by_name = {argument.name: argument for argument in arguments}
    return args, {name: value for name, value in kwargs.items() if not is_default(by_name[name], value)}


def _skeleton(value: Any) -> Any:
    """Where the arguments of a node have nodes."""
    if isinstance(value, fx.Node):
        return str(value.target) if value.op in ("get_attr", "placeholder") else "node"
    if isinstance(value, tuple | list):
        return type(value), tuple(_skeleton(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _skeleton(item)) for key, item in value.items())
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
