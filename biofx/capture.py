"""Capture: from a module to a graph in which every weight is a node of its own.

Symbolic tracing with four differences from `torch.fx.symbolic_trace`:

- `Linear` and convolutions are traced through, so that the weight becomes a `get_attr` node that feeds a functional
  operator. Their own forward runs, so padding modes, groups and missing biases come out as PyTorch means them.
- A constant that depends on `training` keeps following `.train()` and `.eval()` of the module that it is read from
  (`ByMode`).
- A module whose forward does what a graph does not hold is called as it is (`KeepWhole`): another path in training than
  in evaluation, `torch.no_grad()`, random numbers that do not depend on the input.
- The result keeps the module tree of the model: its classes, attributes, buffers and the order of its state.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import linecache
import random
import re
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen

from biofx.captured_module import HOOKS, RESERVED, CapturedModule, captured
from biofx.errors import ArgumentError, CaptureError
from biofx.provenance import RECORD, Record

TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHT_MODULES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BLOCKS: tuple[type, ...] = (
    torch.no_grad,
    torch.enable_grad,
    torch.set_grad_enabled,
    torch.inference_mode,
    torch.autocast,
)

MAKE_SUBMODULE = "Move that part of forward into a submodule of its own, which is then called as it is."
TRACE_WITHOUT_VALUES = (
    "Forward is traced once, without values: move what needs them into a function that is registered with "
    "torch.fx.wrap, which the graph calls as it is; an argument that is no tensor, such as a flag, belongs in a "
    "wrapper module that passes it."
)

_LOCK = threading.RLock()  # tracing patches torch.nn.Module itself


class ByMode(nn.Module):
    """One of two constants, chosen by `training`: stands where tracing would have baked the mode in."""

    def __init__(self, train: Any, eval: Any) -> None:  # noqa: A002 - the two modes are called train and eval
        super().__init__()
        for name, value in (("in_training", train), ("in_evaluation", eval)):
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def forward(self) -> Any:
        """The constant for the current mode."""
        return self.in_training if self.training else self.in_evaluation

    def extra_repr(self) -> str:
        """Both constants."""
        return f"train={self.in_training!r}, eval={self.in_evaluation!r}"


class MustBeNone(nn.Module):
    """Stands for an optional argument that was None while tracing, so that forward took the path without it."""

    def __init__(self, argument: str) -> None:
        super().__init__()
        self.argument = argument

    def forward(self, value: Any) -> None:
        """Refuse a value that the graph would ignore."""
        if value is not None and not isinstance(value, fx.Proxy):  # a proxy: torch.fx.symbolic_trace of the graph
            raise ArgumentError(
                f"forward was captured without its optional argument {self.argument!r}, so it cannot take one; "
                f"transform the model with example_inputs that contain {self.argument!r}"
            )

    def extra_repr(self) -> str:
        """The argument."""
        return self.argument


class KeepWhole(Exception):  # noqa: N818 - a finding, on which capture acts
    """A module does what a graph does not hold, so that it has to be called as it is.

    Attributes:
        path: the module whose forward does it; empty for the model itself.
        reason: what it does, a sentence about "it".
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason


class KeywordOnly(CodeGen):
    """Generates a signature with keyword-only arguments; that of `torch.fx` has them among the positional ones."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def gen_fn_def(self, free_vars: list[str], *args: Any, **kwargs: Any) -> str:
        """The line `def forward(...)`."""
        by_name = {re.split(r"[^\w*]", variable)[0]: variable for variable in free_vars}
        keyword = [variable for name, variable in by_name.items() if name in self.names]
        rest = [variable for name, variable in by_name.items() if name.startswith("*")]
        star = [variable for variable in rest if not variable.startswith("**")] or ["*"]
        positional = [variable for variable in free_vars if variable not in (*keyword, *rest)]
        double_star = [variable for variable in rest if variable.startswith("**")]
        return super().gen_fn_def([*positional, *star, *keyword, *double_star], *args, **kwargs)


class Tracer(fx.Tracer):
    """Symbolic tracer whose graphs have weights as nodes; also the one that unpickling a captured model uses.

    Attributes:
        whole: the modules that are called as they are although their class could be traced, each with the reason.
        refusals: what refuses the optional arguments that were traced as None, by the name of the child to be.
        steps: what happened in order, as (path of the module whose forward runs, kind, what).
        reads: the modules whose `training` was read, by the path of the module whose forward did.
    """

    proxy_buffer_attributes = True  # a buffer is state, not a constant: it may change between two calls

    def __init__(self, absent: Collection[str] = (), whole: dict[str, str] | None = None) -> None:
        super().__init__()
        self._absent = absent  # optional arguments to trace as None
        self.whole = {} if whole is None else whole
        self.refusals: dict[str, MustBeNone] = {}
        self.steps: list[tuple[str, str, Any]] = []
        self.reads: dict[str, list[str]] = {}
        self._running = [""]  # paths of the modules whose forward runs now
        self._blocks: list[tuple[str, str]] = []  # `with` blocks that are open now, by the module that opened them

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace `root`, whose tensors become nodes under their first name."""
        with _LOCK:
            self._thread = threading.get_ident()
            self._names = {id(t): n for n, t in [*root.named_buffers(), *root.named_parameters()]}
            self._gradients, self._random = _gradient_mode(), _random_state()
            graph = super().trace(root, concrete_args)
            self._check_random()
        for node in graph.nodes:
            node.type = None  # annotations that are strings, as they are today, cannot be pickled with the code
        _merge_reads(graph)
        return graph

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Any, list[Any]]:
        """Give forward None for an optional argument that nobody passes, and refuse it in calls of the graph."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        parameters = inspect.signature(root_fn).parameters.values()
        keyword_only = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        if keyword_only:
            self.graph.set_codegen(KeywordOnly(keyword_only))
        for index, arg in enumerate(args):
            name = str(arg.node.target) if isinstance(arg, fx.Proxy) else None
            if name is not None and name in self._absent:
                child = _unused(self.root, f"{name}_must_be_none")
                self.refusals[child] = MustBeNone(name)
                self.create_node("call_module", child, (arg.node,), {})
                args[index] = None
        return function, args

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules that stay one node: those of torch.nn without synapses, and those that have to be kept whole."""
        reason = why_kept_whole(m)
        if reason is not None:
            self.whole[module_qualified_name] = reason
        if module_qualified_name in self.whole or isinstance(m, ByMode | MustBeNone):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not _is_weight_module(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Note which module runs, so that what a graph does not hold is found in the smallest module."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        if isinstance(m, TRANSPOSED) and any(size is not None for size in (*args[1:], kwargs.get("output_size"))):
            raise KeepWhole(path, "it is given an output_size, which depends on the shape of its input")
        self._check_random()
        self.steps.append((self._running[-1], "enter", path))
        self._running.append(path)
        result = super().call_module(m, forward, args, kwargs)
        self._check_random()
        self.steps.append((path, "exit", fx.node.map_aggregate(result, _node_of)))
        self._running.pop()
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note the node, after a look at the state that the graph does not hold."""
        if self._blocks:
            path, block = self._blocks[0]
            raise KeepWhole(path, f"its forward uses torch.{block}, which a graph does not hold")
        if _gradient_mode() != self._gradients:
            raise KeepWhole(self._running[-1], "its forward switches gradients on or off, which a graph does not hold")
        node = super().create_node(*args, **kwargs)
        self.steps.append((self._running[-1], "node", node))
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """One `get_attr` node for every tensor, whichever alias reads it, found in constant time."""
        name = self._names.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if name is None or threading.get_ident() != self._thread:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """Take constants that live in the module tree from there, not as copies."""
        if isinstance(a, torch.Tensor):
            if id(a) in self._names:
                return self.create_node("get_attr", self._names[id(a)], (), {})
            self._check_random()
        return super().create_arg(a)

    def note_read(self, module: nn.Module) -> None:
        """The forward that runs now has read `module.training`."""
        path = (self.submodule_paths or {}).get(module)
        if path is not None and threading.get_ident() == self._thread:
            self.reads.setdefault(self._running[-1], []).append(path)

    def enter_block(self, block: Any) -> None:
        """The forward that runs now has entered one of `BLOCKS`."""
        if threading.get_ident() == self._thread:
            self._blocks.append((self._running[-1], type(block).__name__))

    def exit_block(self, block: Any) -> None:
        """It has left the block."""
        if threading.get_ident() == self._thread:
            self._blocks.pop()

    def _check_random(self) -> None:
        if _random_state() != self._random:
            raise KeepWhole(self._running[-1], "its forward draws random numbers that do not depend on its input")


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value


def _gradient_mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _random_state() -> tuple[Any, Any]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


def _merge_reads(graph: fx.Graph) -> None:
    first: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        if first.setdefault(node.target, node) is not node:
            node.replace_all_uses_with(first[node.target])
            graph.erase_node(node)


def _unused(module: nn.Module, name: str) -> str:
    """A name for a new child: `name`, or `name` with a number if the module has one."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    return next(name for name in names if not hasattr(module, name))


def _is_weight_module(module: nn.Module) -> bool:
    return isinstance(module, WEIGHT_MODULES) and isinstance(module._parameters.get("weight"), nn.Parameter)


def why_kept_whole(module: nn.Module) -> str | None:
    """Why a module has to be called as it is, or None if its forward may be traced through."""
    if any(getattr(module, registry) for registry in HOOKS):
        return "it has hooks, which only run when the module itself is called"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return None


def check(model: Any) -> None:
    """Refuse what cannot be captured, before anything is copied.

    Raises:
        ArgumentError: not a module, a wrapped module, one whose parameters have no values yet, or one with an attribute
            that the result needs for itself.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ArgumentError(f"model is the class {model.__name__}; transform an instance, {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got an instance of {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError("model is a TorchScript module, which has no Python forward; transform the original module")
    if "_orig_mod" in model._modules:
        raise ArgumentError("model comes from torch.compile; transform the original module, then compile the result")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ArgumentError(f"model is a {type(model).__name__}; transform model.module, then wrap the result")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ArgumentError(f"{name} is lazy and has no shape yet; call the model once, then transform it")
        if tensor.is_meta:
            raise ArgumentError(f"{name} is on the meta device and has no values; use model.to_empty(device=...) first")
    if "forward" in vars(model):
        raise ArgumentError("model.forward was replaced on the instance, and only its class can be traced; subclass it")
    _check_names(model)


def _check_names(model: nn.Module) -> None:
    own = {*vars(model), *dir(type(model)), *model._parameters, *model._buffers, *model._modules}
    taken = own & ({RECORD} if isinstance(model, fx.GraphModule) else {RECORD, *RESERVED})
    if taken:
        name = min(taken)
        user = "the record of biofx" if name == RECORD else "the torch.fx.GraphModule that the result is"
        raise ArgumentError(f'model has an attribute "{name}", a name that {user} needs; rename it')


def capture(model: nn.Module, example_inputs: Any = None) -> CapturedModule:
    """Trace a model into a graph module that takes over its module tree.

    Args:
        model: a checked model (see `check`); its submodules become those of the result.
        example_inputs: arguments of forward. An argument whose default is None, and which they do not contain, is None
            for the graph: it takes the path without it, and says so to a caller who passes it.

    Returns:
        A graph module with the class, tree, state, mode, attributes and hooks of the model.

    Raises:
        CaptureError: forward cannot be traced; names the module and the line.
    """
    trace = _trace_what_can_be(model, _absent(model, example_inputs))
    for node in trace.graph.find_nodes(op="get_attr"):
        if node.target in trace.constants:
            node.target = f"{RECORD}.{node.target}"
    bio = captured(model, trace.graph)
    for name, refusal in trace.tracer.refusals.items():
        bio.add_module(name, refusal.train(model.training))
    record = Record({name: p.shape for name, p in model.named_parameters()}, trace.constants)
    record.kept_whole = trace.tracer.whole
    bio.add_module(RECORD, record.train(model.training))
    return bio


def _absent(model: nn.Module, example_inputs: Any) -> set[str]:
    signature = inspect.signature(type(model).forward)
    args, kwargs = split_inputs(example_inputs)
    try:
        given = signature.bind_partial(model, *args, **kwargs).arguments
    except TypeError as error:
        raise ArgumentError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error
    optional = {name for name, parameter in signature.parameters.items() if parameter.default is None}
    refused = {child.argument for child in model.children() if isinstance(child, MustBeNone)}  # captured before
    return {name for name in optional - refused if given.get(name) is None}


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as arguments of a call: a tuple is positional, a dict by keyword, anything else is the first."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


@dataclass(frozen=True)
class _Trace:
    """One run of forward: its graph, the constants that it made, and what the tracer noted."""

    graph: fx.Graph
    constants: dict[str, Any]
    tracer: Tracer


def _trace_what_can_be(model: nn.Module, absent: Collection[str]) -> _Trace:
    """Trace with the modules kept whole that turn out not to fit into a graph, one more with each attempt."""
    whole: dict[str, str] = {}
    while True:
        try:
            return _trace_modes(model, absent, whole)
        except KeepWhole as error:
            path = error.path
            while path in whole:  # something outside of it made it do that
                path = path.rpartition(".")[0]
            if not path:
                raise CaptureError(_explain(model, error)) from error
            whole = {inner: reason for inner, reason in whole.items() if not inner.startswith(f"{path}.")}
            whole[path] = error.reason


def _trace_modes(model: nn.Module, absent: Collection[str], whole: dict[str, str]) -> _Trace:
    """One graph for all modes: where traces in different modes differ in a constant, it has a `ByMode` module."""
    training = _trace(model, absent, whole, evaluating=())
    if not training.tracer.reads:
        return training
    modules = dict(model.named_modules())
    evaluation = _trace(model, absent, whole, evaluating=modules.values())
    ranks = _ranks([training, evaluation])
    # Which module does a constant depend on? A trace for each bit of the ranks tells, with half of them in evaluation.
    bits = range(max(ranks.values()).bit_length())
    mixed = [_trace(model, absent, whole, [modules[p] for p, r in ranks.items() if r >> bit & 1]) for bit in bits]
    traces = [training, evaluation, *mixed]
    for other in traces[1:]:
        _check_same_path(training, other)
    _follow_modes(model, traces, ranks)
    return training


def _trace(
    model: nn.Module, absent: Collection[str], whole: dict[str, str], evaluating: Collection[nn.Module]
) -> _Trace:
    tracer, in_evaluation = Tracer(absent, whole), set(evaluating)
    with _LOCK, _unchanged(model), _watched_by(tracer):
        for module in model.modules():
            module.training = module not in in_evaluation
        before = {path: dict(vars(module)) for path, module in model.named_modules()}
        try:
            graph = tracer.trace(model)
            _check_attributes(model, before)
        except KeepWhole:
            raise
        except Exception as error:
            raise CaptureError(_explain(model, error)) from error
        made = vars(model).keys() - before[""].keys()
        read = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr"))
        constants = {name: vars(model)[name] for name in read if name in made}
    return _Trace(graph, constants, tracer)


def _check_attributes(model: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    """Find a counter or a flag that forward changes: the next call would read another value."""
    for path, module in model.named_modules():
        for name, value in before.get(path, {}).items():
            now = vars(module).get(name)
            if isinstance(value, int | float | str) and isinstance(now, int | float | str) and now != value:
                raise KeepWhole(path, f"its forward changes the attribute {name}, which a graph does not do")


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what tracing stores in the modules, and its random draws: proxies mean nothing afterwards."""
    saved = [(vars(m), dict(vars(m)), _contents(vars(m))) for m in model.modules()]
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(state)
            for attributes, values, contents in saved:
                attributes.clear()
                attributes.update(values)
                for name, content in contents.items():
                    attributes[name].clear()
                    (attributes[name].extend if isinstance(content, list) else attributes[name].update)(content)


def _contents(attributes: dict[str, Any]) -> dict[str, Any]:
    """Copies of the containers among attributes: registries of the module, and those in which forward may collect."""
    return {k: copy.copy(v) for k, v in attributes.items() if type(v) in (dict, OrderedDict, list, set)}


@contextmanager
def _watched_by(tracer: Tracer) -> Iterator[None]:
    """Tell a tracer when forward reads `training` or enters and leaves a block that a graph does not hold."""

    def read(module: nn.Module) -> bool:
        tracer.note_read(module)
        return bool(vars(module)["training"])

    def write(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    def noted(note: Callable[[Any], None], method: Callable[..., Any]) -> Callable[..., Any]:
        def call(block: Any, *args: Any) -> Any:
            note(block)
            return method(block, *args)

        return call

    # A property of the class goes before the attribute of the instance.
    patches: dict[tuple[type, str], Any] = {(nn.Module, "training"): property(read, write)}
    for block in BLOCKS:
        patches[block, "__enter__"] = noted(tracer.enter_block, vars(block)["__enter__"])
        patches[block, "__exit__"] = noted(tracer.exit_block, vars(block)["__exit__"])
    originals = {(cls, name): vars(cls).get(name) for cls, name in patches}
    try:
        for (cls, name), value in patches.items():
            type.__setattr__(cls, name, value)
        yield
    finally:
        for (cls, name), value in originals.items():
            if value is None:
                type.__delattr__(cls, name)
            else:
                type.__setattr__(cls, name, value)


def _ranks(traces: list[_Trace]) -> dict[str, int]:
    """The modules whose mode was read: each with the number of those around it, so that nested ones differ."""
    paths = {path for trace in traces for read in trace.tracer.reads.values() for path in read}
    around = {path: itertools.accumulate(path.split("."), "{}.{}".format) for path in paths if path}
    return {path: len(paths & {"", *around.get(path, ())} - {path}) for path in paths}


def _check_same_path(a: _Trace, b: _Trace) -> None:
    """Find the smallest module whose forward runs when two traces of a model part."""
    positions = [{node: i for i, node in enumerate(trace.graph.nodes)} for trace in (a, b)]
    for x, y in itertools.zip_longest(_path_of(a, positions[0]), _path_of(b, positions[1])):
        if x != y:
            raise KeepWhole((x or y)[0], "its forward takes another path in training than in evaluation mode")


def _path_of(trace: _Trace, positions: dict[fx.Node, int]) -> Iterator[tuple[Any, ...]]:
    for module, kind, what in trace.tracer.steps:
        if kind != "node":
            yield module, kind, what if kind == "enter" else _skeleton(what, positions)
        elif what in positions:  # else it was merged with another read
            arguments = _skeleton((what.args, what.kwargs), positions)
            yield module, what.op, what.target, arguments


def _skeleton(value: Any, positions: dict[fx.Node, int]) -> Any:
    """The part of a value that has to be the same in all modes: where there are nodes, and which; else None."""
    if isinstance(value, fx.Node):
        return value.target if value.op == "get_attr" else positions[value]
    parts = [_skeleton(part, positions) for part in _parts(value)]
    if not any(part is not None for part in parts):
        return None
    return _shape(value), parts


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    return list(value) if isinstance(value, tuple | list) else []


def _shape(value: Any) -> tuple[Any, ...]:
    return type(value), len(_parts(value)), *(value if isinstance(value, dict) else ())


def _rebuilt(value: Any, parts: list[Any]) -> Any:
    if isinstance(value, dict):
        return type(value)(zip(value, parts, strict=True))
    return slice(*parts) if isinstance(value, slice) else type(value)(parts)


def _follow_modes(model: nn.Module, traces: list[_Trace], ranks: dict[str, int]) -> None:
    """Make the first of several traces, which differ in constants only, read those from `ByMode` modules."""
    training = traces[0]

    def by_mode(node: fx.Node, values: tuple[Any, ...]) -> fx.Node:
        code = sum((not _equal(values[0], value)) << bit for bit, value in enumerate(values[2:]))
        path = _owner(training.tracer.reads, node, ranks, code)
        owner = model.get_submodule(path)  # whose .train() and .eval() decide
        child = _unused(owner, "by_mode")
        owner.add_module(child, ByMode(values[0], values[1]).train(owner.training))
        with training.graph.inserting_before(node):
            return training.graph.call_module(f"{path}.{child}".lstrip("."))

    def merged(node: fx.Node, values: tuple[Any, ...]) -> Any:
        if isinstance(values[0], fx.Node):
            return values[0]
        if len({_shape(value) for value in values}) == 1 and _parts(values[0]):
            parts = zip(*map(_parts, values), strict=True)
            return _rebuilt(values[0], [merged(node, part) for part in parts])
        return values[0] if _equal(values[0], values[1]) else by_mode(node, values)

    for nodes in list(zip(*(trace.graph.nodes for trace in traces), strict=True)):
        node = nodes[0]
        if node.op == "get_attr" and node.target in training.constants:
            values = tuple(trace.constants[node.target] for trace in traces)
            if not _equal(values[0], values[1]):
                node.replace_all_uses_with(by_mode(node, values))
                training.graph.erase_node(node)
                del training.constants[node.target]
        node.args = merged(node, tuple(n.args for n in nodes))
        node.kwargs = merged(node, tuple(n.kwargs for n in nodes))


def _owner(reads: dict[str, list[str]], node: fx.Node, ranks: dict[str, int], code: int) -> str:
    """The module whose mode a constant of a node depends on: one with rank `code` whose mode was read around there."""
    running = ["", *(path for path, _ in node.meta.get("nn_module_stack", {}).values())]
    owners = [owner for path in reversed(running) for owner in reversed(reads.get(path, ()))]
    return next((owner for owner in owners if ranks[owner] == code), [*owners, running[-1]][0])


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _explain(model: nn.Module, error: Exception) -> str:
    """Say which module and which line stopped the trace, and what to do."""
    names = {module: name for name, module in model.named_modules()}
    owner, users_line, any_line = model, "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        package = frame.f_globals.get("__name__", "")
        if package.startswith(("torch.fx", "biofx")):
            continue
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, nn.Module) and candidate in names:
            owner = candidate
        file = frame.f_code.co_filename
        any_line = f"\n  at {file}:{number}: {linecache.getline(file, number).strip()}"
        if not package.startswith("torch"):
            users_line = any_line
    line = users_line or any_line
    if isinstance(error, KeepWhole):
        return f"{type(model).__name__} computes something else when traced: {error}{line}\n  {MAKE_SUBMODULE}"
    described = f'"{names[owner]}" ({type(owner).__name__})' if names[owner] else type(model).__name__
    return f"{described} cannot be traced: {error}{line}\n  {TRACE_WITHOUT_VALUES}"
