"""Both modes: merge the graphs of training and evaluation mode into one that follows `.train()` and `.eval()`.

Where the two differ only in a constant, the merged graph has it from a `ModeSelect` module. Nodes that only one of
them has run in a `ModeBranch` module. In each mode, the merged graph executes the operators of that mode's graph in the
same order. This holds for any matching of the nodes, so a poor match costs readability, not correctness.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from biofx.base.torch_internals import OpOverload, schema_of
from biofx.capture.modes import ModeSelect, is_equal
from biofx.capture.tracer import HelperModule, Tracer, unused_name
from biofx.model.chain import modules_around
from biofx.model.control_flow import ControlFlow

if TYPE_CHECKING:
    from biofx.capture.exported.program import Program

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # one more child would change what they do
_CONTIGUOUS = torch.ops.aten.contiguous.default


class ModeBranch(HelperModule, ControlFlow):
    """Runs one of two subgraphs, depending on the mode; the outputs of the other are None."""

    depends_on_mode = True
    _is_impure = True  # `fx.Graph.eliminate_dead_code` keeps it: its subgraphs may update buffers

    def __init__(self, in_training: fx.GraphModule, in_evaluation: fx.GraphModule, counts: tuple[int, int]) -> None:
        super().__init__()
        self.in_training = in_training
        self.in_evaluation = in_evaluation
        self.counts = counts  # of the outputs of each

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """Return the outputs in training mode, then those in evaluation mode."""
        if self.training:
            return *self.in_training(*inputs), *[None] * self.counts[1]
        return *[None] * self.counts[0], *self.in_evaluation(*inputs)

    def subgraphs(self) -> tuple[fx.GraphModule, ...]:
        """Both subgraphs."""
        return self.in_training, self.in_evaluation


class Merged:
    """The graphs of both modes as one. Where a method takes `mode`, 0 is training and 1 is evaluation.

    Modules that depend on the mode are added to those of the model whose mode they follow.

    Attributes:
        graph: the graph, without an output node.
        constants: the tensors that forward creates, by the name under which the graph reads them.
        results: the results in training and in evaluation mode, two lists of nodes.
    """

    def __init__(self, model: nn.Module, training: Program, evaluation: Program) -> None:
        self.graph = fx.Graph(tracer_cls=Tracer)
        self.constants = dict(training.constants)
        self._model = model
        self._programs = (training, evaluation)
        self._new: tuple[dict[fx.Node, Any], dict[fx.Node, Any]] = ({}, {})
        self._attributes: dict[str, fx.Node] = {}
        self._renamed: dict[str, str] = {}
        self._added: dict[str, str] = {}
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
                    self._merge_calls(t, e)
            else:
                for ts, es in _runs(calls[0][a:b], calls[1][c:d]):
                    self._branch(ts, es)
        outputs: list[Any] = [p.graph.output_node().args[0] for p in self._programs]
        self.results = [[self._value(mode, value) for value in outputs[mode]] for mode in (0, 1)]

    def _unify_constants(self) -> None:
        """Name the constants of both modes; equal constants share a name."""
        for name, value in self._programs[1].constants.items():
            same = (n for n, other in self._programs[0].constants.items() if is_equal(value, other))
            self._renamed[name] = next(same, f"{name}_in_evaluation")
            self.constants[self._renamed[name]] = value

    def _key(self, node: fx.Node, program: Program) -> Any:
        """Return the key by which nodes of the two graphs match."""
        target = program.blocks[str(node.target)].fingerprint if node.op == "call_module" else node.target
        return node.op, target, tuple(modules_around(node)), _skeleton(_completed(node))

    # --- the graph -----------------------------------------------------------------------------------------------

    def _value(self, mode: int, value: Any) -> Any:
        """Map an argument in an old graph to the new graph."""
        if not isinstance(value, fx.Node):
            return value
        if value.op != "get_attr":
            return self._new[mode][value]
        name = self._renamed.get(str(value.target), str(value.target)) if mode else str(value.target)
        if name not in self._attributes:
            self._attributes[name] = self.graph.get_attr(name)
        return self._attributes[name]

    def _merge_calls(self, t: fx.Node, e: fx.Node) -> None:
        """Merge a node that both graphs have."""
        args, kwargs = (self._merge(a, b, t) for a, b in zip(_completed(t), _completed(e), strict=True))
        target = self._add_block(0, t) if t.op == "call_module" else t.target
        node = self.graph.create_node(t.op, target, *_without_defaults(t, args, kwargs))
        node.meta["nn_module_stack"] = t.meta.get("nn_module_stack", {})
        self._new[0][t] = self._new[1][e] = node

    def _merge(self, a: Any, b: Any, node: fx.Node) -> Any:
        """Merge an argument of a node that both graphs have."""
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            x, y = self._value(0, a), self._value(1, b)
            return x if x is y else self._select(x, y, modules_around(node))
        if type(a) is type(b) and isinstance(a, tuple | list) and len(a) == len(b):
            return type(a)(self._merge(x, y, node) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self._merge(a[key], b[key], node) for key in a}
        if type(a) is type(b) and a == b:
            return a
        return self._select(a, b, modules_around(node))

    def _select(self, x: Any, y: Any, stack: Sequence[str]) -> fx.Node:
        """Return a node for one of two values."""
        for a, b in ((x, y), (y, x)):  # `contiguous` returns a contiguous tensor unchanged, so it serves both modes
            if isinstance(a, fx.Node) and a.target is _CONTIGUOUS and a.args == (b,):
                return a
        return self.graph.call_module(self._add(ModeSelect(), "mode_select", stack), (x, y))

    def _branch(self, ts: list[fx.Node], es: list[fx.Node]) -> None:
        """Put nodes that have no counterpart in the other graph into a `ModeBranch`."""
        if len(ts) + len(es) == 1 and (*ts, *es)[0].target is _CONTIGUOUS:
            # torch.export omits it for a contiguous operand, and it returns such an operand: both modes can run it.
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
        subgraphs = [self._subgraph(mode, nodes, results[mode], list(sources)) for mode, nodes in ((0, ts), (1, es))]
        branch = ModeBranch(subgraphs[0], subgraphs[1], (len(results[0]), len(results[1])))
        stack = _common([modules_around(node) for node in (*ts, *es)])
        call = self.graph.call_module(self._add(branch, "mode_branch", stack), tuple(sources))
        found = [(mode, node) for mode, nodes in enumerate(results) for node in nodes]
        for index, (mode, node) in enumerate(found):
            self._new[mode][node] = self.graph.call_function(operator.getitem, (call, index))

    def _subgraph(
        self, mode: int, nodes: list[fx.Node], results: list[fx.Node], sources: list[fx.Node]
    ) -> fx.GraphModule:
        """Copy nodes into a graph of their own, which takes `sources` and returns `results`."""
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

    # --- modules -------------------------------------------------------------------------------------------------

    def _add_block(self, mode: int, node: fx.Node) -> str:
        target = str(node.target)
        if target not in self._added:
            self._added[target] = unused_name(self._model, target)
            self._model.add_module(self._added[target], self._programs[mode].blocks[target])
        return self._added[target]

    def _add(self, module: HelperModule, name: str, stack: Sequence[str]) -> str:
        """Add a module to the module whose mode it follows, and return its path."""
        path = self._owner(stack)
        owner = self._model.get_submodule(path)
        child = unused_name(owner, name)
        owner.add_module(child, module.train(owner.training))
        return f"{path}.{child}".lstrip(".")

    def _owner(self, stack: Sequence[str]) -> str:
        """Return the path of the module whose mode decides: the innermost of a stack that read a mode, or its owner.

        Containers are skipped, because they would call one more child.
        """
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


def _common(stacks: Sequence[list[str]]) -> list[str]:
    """Return the longest common prefix of stacks."""
    shortest = min(stacks, key=len)
    count = next((i for i, path in enumerate(shortest) if any(stack[i] != path for stack in stacks)), len(shortest))
    return shortest[:count]


def _runs(ts: list[fx.Node], es: list[fx.Node]) -> Iterator[tuple[list[fx.Node], list[fx.Node]]]:
    """Divide unmatched nodes into branches: by module if only one graph has nodes there, else not at all."""
    if ts and es:
        yield ts, es
        return
    run: list[fx.Node] = []
    for node in ts or es:
        if run and modules_around(node) != modules_around(run[-1]):
            yield (run, []) if ts else ([], run)
            run = []
        run.append(node)
    yield (run, []) if ts else ([], run)


def _completed(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, completed with the defaults of the operator."""
    args, kwargs = list(node.args), dict(node.kwargs)
    if isinstance(node.target, OpOverload):
        for argument in schema_of(node.target).arguments[len(args) :]:
            if argument.name in kwargs or not argument.has_default_value():
                continue
            if argument.kwarg_only:
                kwargs[argument.name] = argument.default_value
            elif len(args) == schema_of(node.target).arguments.index(argument):
                args.append(argument.default_value)
    return tuple(args), dict(sorted(kwargs.items()))


def _without_defaults(node: fx.Node, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, without those equal to the defaults of the operator."""
    if not isinstance(node.target, OpOverload):
        return args, kwargs
    arguments = schema_of(node.target).arguments

    def is_default(argument: Any, value: Any) -> bool:
        default = argument.default_value
        return argument.has_default_value() and type(value) is type(default) and bool(value == default)

    while args and is_default(arguments[len(args) - 1], args[-1]):
        args = args[:-1]
    by_name = {argument.name: argument for argument in arguments}
    return args, {name: value for name, value in kwargs.items() if not is_default(by_name[name], value)}


def _skeleton(value: Any) -> Any:
    """Return the nested structure of arguments, with nodes marked and constants left out."""
    if isinstance(value, fx.Node):
        return str(value.target) if value.op in ("get_attr", "placeholder") else "node"
    if isinstance(value, tuple | list):
        return type(value), tuple(_skeleton(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _skeleton(item)) for key, item in value.items())
    return None
