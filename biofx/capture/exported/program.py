"""Programs: the result of torch.export in one mode, a graph whose inputs and outputs are only tensors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from biofx.base.errors import CaptureError
from biofx.base.generators import global_states
from biofx.base.isolation import Snapshot, parameters_kept
from biofx.base.torch_internals import CheckpointFunction, any_batch_size, fast_export, guards_of, is_fake
from biofx.capture.assignments import add_assignment
from biofx.capture.exported.conditions import INSTEAD, Condition, text_of
from biofx.capture.exported.structure import Structure, build, describe
from biofx.capture.monitoring import monitored
from biofx.capture.outside_variables import OutsideVariables
from biofx.capture.reparametrized import computed_names, pop_computing_hooks
from biofx.capture.tracer import HelperModule, NotTraceable, Tracer
from biofx.model.chain import attribute
from biofx.model.control_flow import ControlFlow
from biofx.recording.questions import CHANGING, Questions

MODEL = "model"  # the name of the model inside of the module that is exported


@dataclass
class Program:
    """A graph of a model in one mode.

    Attributes:
        graph: its placeholders are the input tensors, and it returns the tensors of the result.
        outputs: the structure of the result, which is built from these tensors.
        constants: tensors that forward creates, by the name under which the graph reads them.
        blocks: the blocks that run in a context, by the name under which the graph calls them.
        conditions: the conditions on input shapes under which the graph is correct.
        reads: the modules whose `training` was read, by the path of the module whose forward read it.
    """

    graph: fx.Graph
    outputs: Structure
    constants: dict[str, Tensor]
    blocks: dict[str, ContextBlock]
    conditions: list[Condition]
    reads: dict[str, list[str]]


class ContextBlock(HelperModule, ControlFlow):
    """Runs a subgraph in a context: `torch.set_grad_enabled` or `torch.autocast`, with its arguments."""

    def __init__(self, context: str, arguments: tuple[Any, ...], inner: fx.GraphModule) -> None:
        super().__init__()
        self.context = context
        self.arguments = arguments
        self.inner = inner

    def forward(self, *values: Any) -> Any:
        """Run the subgraph in its context."""
        with getattr(torch, self.context)(*self.arguments):
            return self.inner(*values)

    def subgraphs(self) -> tuple[fx.GraphModule, ...]:
        """The graph that runs in the context, as the only element."""
        return (self.inner,)

    def describe(self, owner: str) -> str:
        """Describe the block by its context."""
        grad = "enable_grad" if self.arguments[0] else "no_grad"
        return f"the part of {owner} under torch.{grad if self.context == 'set_grad_enabled' else self.context}"

    def extra_repr(self) -> str:
        """The context."""
        return f"torch.{self.context}{self.arguments}"

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """A key that is equal for blocks that compute the same."""
        inner = [block.fingerprint for block in self.inner.children() if isinstance(block, ContextBlock)]
        return self.context, self.arguments, self.inner.code, tuple(inner)


_BLOCKS = {
    "wrap_with_set_grad_enabled": ("set_grad_enabled", 1),
    "wrap_with_autocast": ("autocast", 4),
}
"""For each operator by which torch.export represents a context: the context, and the number of its arguments."""

_ASSERTIONS = ("_assert_tensor_metadata",)
"""Assertions on dtype and device, which are dropped because a module may be converted or moved."""


class _OnTensors(nn.Module):
    """The model as a function from tensors to tensors; `build` and `describe` convert the arguments and the result."""

    def __init__(self, model: nn.Module, inputs: Structure, monitor: _ExportMonitor) -> None:
        super().__init__()
        self.model = model
        vars(self).update(inputs=inputs, monitor=monitor)

    def forward(self, *leaves: Tensor) -> tuple[Any, ...]:
        monitor: _ExportMonitor = vars(self)["monitor"]
        before = dict(self.model.named_buffers())
        held, outside = Snapshot(self.model), OutsideVariables(dict(self.model.named_modules()))
        args, kwargs = build(vars(self)["inputs"], iter(leaves))
        results: list[Any] = []
        drawn = global_states()

        def note(name: str, question: Any) -> None:
            if question in CHANGING:  # the answer would be a constant
                monitor.note_side_effect(monitor.path, CHANGING[question])

        with Questions(self.model, note):
            monitor.outputs = describe(self.model(*args, **kwargs), results)
        effect = outside.effect()
        if effect is not None:
            monitor.note_side_effect("", effect[1])
        computed, by_hooks = computed_names(self.model), dict[tuple[str, str], Any]()
        for path, name, _ in held.changes():
            if (path, name) in computed:
                by_hooks[path, name] = vars(self.model.get_submodule(path))[name]
            elif f"{path}.{name}".lstrip(".") not in before:
                monitor.note_side_effect(path, f"changes the attribute {name}")
        if global_states() != drawn:
            monitor.note_side_effect("", "draws random numbers from Python or NumPy")
        outside.restore()
        after = dict(self.model.named_buffers())
        monitor.assigned = [name for name in before if after.get(name) is not before[name]]
        for name in monitor.assigned:
            if name not in after or after[name].shape != before[name].shape:
                monitor.note_side_effect(name.rpartition(".")[0], f"gives the buffer {name} another shape")
        monitor.computed = [*by_hooks]
        return *results, *(after[name] for name in monitor.assigned), *by_hooks.values()


class _ExportMonitor:
    """Notes what an exported graph does not contain.

    Attributes:
        reads: the modules whose `training` was read, by the path of the module whose forward read it.
        outputs: the structure of the result, which is built from tensors.
        side_effect: the path of a module whose forward does what a graph cannot represent, and the reason.
        assigned: the buffers to which forward assigns a new tensor.
        computed: the weights that hooks compute and leave as attributes: the path of the module, and the name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.reads: dict[str, list[str]] = {}
        self.outputs: Structure
        self.side_effect: tuple[str, str] | None = None
        self.assigned: list[str] = []
        self.computed: list[tuple[str, str]] = []
        self._paths = {module: path for path, module in model.named_modules()}
        self._running: list[nn.Module] = []

    def note_mode_read(self, module: nn.Module) -> None:
        if module in self._paths and self._running:
            self.reads.setdefault(self.path, []).append(self._paths[module])

    def note_side_effect(self, path: str, what: str) -> None:
        self.side_effect = path, f"its forward {what}, which a graph cannot represent"

    def enter_context(self, block: Any) -> None:
        if isinstance(block, torch.inference_mode) and block.mode:
            self.note_side_effect(self.path, "uses torch.inference_mode")

    def exit_context(self, block: Any) -> None:
        pass

    @property
    def path(self) -> str:
        """The path of the innermost module whose forward runs."""
        return self._paths[self._running[-1]] if self._running else ""

    @contextmanager
    def following(self) -> Iterator[None]:
        """Track which module runs, and detect reentrant checkpointing, which torch.export would silently drop."""

        def apply(*args: Any) -> Any:
            self.note_side_effect(self.path, "calls checkpoint with use_reentrant=True")
            return original(*args)

        def enter(module: nn.Module, *_: Any) -> None:
            if module in self._paths:
                self._running.append(module)

        def leave(module: nn.Module, *_: Any) -> None:
            if self._running and self._running[-1] is module:
                self._running.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        original: Any = CheckpointFunction.apply
        try:
            # Also parts that were compiled, which would compile these hooks.
            with patch.object(CheckpointFunction, "apply", apply), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for handle in handles:
                handle.remove()


def export(model: nn.Module, inputs: Structure, leaves: Sequence[Tensor], training: bool) -> Program:
    """Export a model in one mode.

    Two axes may have any length in later calls, if forward allows it: the first of every input, which is the batch, and
    the second of inputs of integers, which are sequences of tokens.

    Args:
        model: the model; it does not change.
        inputs: the structure of the positional and keyword arguments of forward.
        leaves: the tensors in them.
        training: whether to export in training mode.

    Raises:
        NotTraceable: forward does what a graph cannot represent.
        CaptureError: the graph contains an assumption or an operator that biofx does not support.
        Exception: torch.export cannot export forward.
    """
    monitor = _ExportMonitor(model)
    module = _OnTensors(model, inputs, monitor)
    with parameters_kept(model), monitored(model, monitor), torch.enable_grad(), _silenced():
        computing = pop_computing_hooks(model)
        for hooks in (model._forward_hooks, model._forward_pre_hooks):
            hooks.clear()  # they stay on the result and run when it is called, so the graph must not contain them
        model._forward_pre_hooks.update(computing)  # the graph has what these compute
        for child in module.modules():
            child.training = training
        with monitor.following(), fast_export():
            program = _exported(module, tuple(leaves))
    if monitor.side_effect is not None:
        path, reason = monitor.side_effect
        raise NotTraceable({path: reason})
    return _read(model, program, monitor)


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress warnings and the graph that torch.export prints when it fails; the failure is reported as an error."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _exported(module: nn.Module, leaves: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    dynamic = tuple(dict.fromkeys(_dynamic_axes(leaf), torch.export.Dim.AUTO) for leaf in leaves)
    try:
        # By default, torch.export specializes lengths of 0 and 1; here a batch of one is like any other.
        with any_batch_size():
            return torch.export.export(module, leaves, dynamic_shapes=(dynamic,), strict=False)
    except Exception:  # noqa: BLE001 - the export may succeed with fixed shapes
        return torch.export.export(module, leaves, strict=False)


def _dynamic_axes(leaf: Tensor) -> range:
    is_sequence = not (leaf.is_floating_point() or leaf.is_complex())
    return range(min(leaf.dim(), 2 if is_sequence else 1))


def _read(model: nn.Module, program: torch.export.ExportedProgram, monitor: _ExportMonitor) -> Program:
    """Convert an exported graph: its tensors get their names in the model, and its `meta` only what biofx reads."""
    first = {id(tensor): name for name, tensor in [*model.named_buffers(), *model.named_parameters()]}
    graph, constants = fx.Graph(tracer_cls=Tracer), dict[str, Tensor]()
    nodes: dict[fx.Node, fx.Node] = {}
    states = dict(zip(program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True))
    targets: dict[fx.Node, str] = {}
    for node, spec in states.items():
        if spec.kind is InputKind.USER_INPUT:
            nodes[node] = graph.placeholder(f"leaf_{len(nodes)}")
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            tensor = attribute(model, _name(str(spec.target)))
            targets[node] = first[id(tensor)]
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constant = program.constants[str(spec.target)]
            # Of a list or variable that holds a buffer, torch.export makes a constant, which would not follow writes.
            targets[node] = first.get(id(constant), _name(str(spec.target)).replace(".", "_"))
            if id(constant) not in first:
                constants[targets[node]] = _constant(constant)
        else:
            raise CaptureError(f"torch.export turns {spec.target} into an input, which is not supported; {INSTEAD}")
    blocks: dict[str, ContextBlock] = {}
    reader = _Reader(graph, program.graph_module, nodes, targets, blocks)
    results = reader.copy(program.graph)
    kept = len(results) - len(monitor.assigned) - len(monitor.computed)
    # Where forward assigns a new tensor to a buffer, the graph writes the values into the buffer that is there.
    for name, value in zip(monitor.assigned, results[kept:], strict=False):
        graph.call_function(torch.ops.aten.copy_.default, (reader.attribute(name), value))
    for (path, name), value in zip(monitor.computed, results[kept + len(monitor.assigned) :], strict=True):
        add_assignment(graph, path, name, value)
    graph.output(tuple(results[:kept]))
    return Program(graph, monitor.outputs, constants, blocks, _conditions_of(program), monitor.reads)


def _constant(value: Tensor) -> Tensor:
    if is_fake(value):
        raise CaptureError(
            "torch.export loses tensors that forward computes, as it does inside of torch.func.grad and others of "
            f"torch.func: its graph has a constant without values in their place; {INSTEAD}"
        )
    return value.detach().clone()


class _Reader:
    """Copies the nodes of a graph of torch.export."""

    def __init__(
        self,
        graph: fx.Graph,
        owner: fx.GraphModule,
        nodes: dict[fx.Node, fx.Node],
        targets: dict[fx.Node, str],
        blocks: dict[str, ContextBlock],
    ) -> None:
        self._graph = graph
        self._owner = owner
        self._nodes = nodes
        self._targets = targets
        self._blocks = blocks
        self._attributes: dict[str, fx.Node] = {}

    def copy(self, source: fx.Graph) -> list[Any]:
        """Copy the nodes, and return the arguments of the output node."""
        for node in source.nodes:
            if node.op == "output":
                return list(fx.map_arg(node.args[0], self._copied))
            if node.op == "call_function" and getattr(node.target, "__name__", "").startswith(_ASSERTIONS):
                continue
            if node.op == "call_function":
                self._nodes[node] = self._call(node)
                self._nodes[node].meta["nn_module_stack"] = _stack(node)
        raise AssertionError("a graph has an output")

    def attribute(self, name: str) -> fx.Node:
        """Return the node that reads a tensor of the model, and create it at the first read."""
        if name not in self._attributes:
            self._attributes[name] = self._graph.get_attr(name)
        return self._attributes[name]

    def _copied(self, node: fx.Node) -> fx.Node:
        if node in self._targets:
            return self.attribute(self._targets[node])
        if node.op == "get_attr":
            raise CaptureError(
                f"forward uses {', '.join(sorted({str(user.target) for user in node.users}))}, "
                f"whose branches biofx cannot follow; {INSTEAD}"
            )
        return self._nodes[node]

    def _call(self, node: fx.Node) -> fx.Node:
        name = getattr(node.target, "__name__", "")
        if name not in _BLOCKS:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._copied)
            return self._graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        context, count = _BLOCKS[name]
        inner = getattr(self._owner, str(node.args[count].target))  # type: ignore[union-attr]
        block = ContextBlock(context, tuple(node.args[:count]), _read_inner(inner))
        target = f"in_{context}_{len(self._blocks)}"
        self._blocks[target] = block
        return self._graph.call_module(target, fx.map_arg(tuple(node.args[count + 1 :]), self._copied))


def _read_inner(inner: fx.GraphModule) -> fx.GraphModule:
    graph, blocks = fx.Graph(tracer_cls=Tracer), dict[str, ContextBlock]()
    nodes = {node: graph.placeholder(node.name) for node in inner.graph.find_nodes(op="placeholder")}
    graph.output(tuple(_Reader(graph, inner, nodes, {}, blocks).copy(inner.graph)))
    return fx.GraphModule(dict(blocks), graph)


def _name(target: str) -> str:
    return target.removeprefix(f"{MODEL}.")


def _stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """Return the modules whose forward created a node, from the model inwards."""
    paths = [(path, cls) for path, cls in node.meta.get("nn_module_stack", {}).values()]
    inside = [(path.partition("@")[0], cls) for path, cls in paths if path == MODEL or path.startswith(f"{MODEL}.")]
    return {path: ("" if path == MODEL else _name(path), cls) for path, cls in inside}


def _conditions_of(program: torch.export.ExportedProgram) -> list[Condition]:
    """Return the conditions on input shapes under which a graph is correct; raise if it has others."""
    nodes = zip(program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True)
    texts = []
    for leaf, node in enumerate(node for node, spec in nodes if spec.kind is InputKind.USER_INPUT):
        for axis, length in enumerate(node.meta["val"].shape):
            if isinstance(length, int):
                texts.append(f"{{{leaf}}}.shape[{axis}] == {length}")
                continue
            allowed = program.range_constraints.get(length.node.expr)
            for relation, bound in ((">=", allowed.lower), ("<=", allowed.upper)) if allowed else ():
                if bound.is_Integer and bound > 0:
                    texts.append(f"{{{leaf}}}.shape[{axis}] {relation} {int(bound)}")
    return [Condition(text) for text in dict.fromkeys([*texts, *map(text_of, guards_of(program))])]
