"""Capture: from a module to a graph in which every weight is a node of its own.

Symbolic tracing with three differences from `torch.fx.symbolic_trace`:

- `Linear` and convolutions are traced through, so that the weight becomes a `get_attr` node that feeds a functional
  operator. Their own forward runs, so padding modes, groups and missing biases come out as PyTorch means them.
- A module that reads `training` keeps following `.train()` and `.eval()` (`ByMode`).
- The result keeps the module tree of the model: its classes, attributes, buffers and the order of its state.
"""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from biofx.captured_module import HOOKS, CapturedModule, captured
from biofx.errors import ArgumentError, CaptureError
from biofx.provenance import RECORD, Record

WEIGHT_MODULES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class ByMode(nn.Module):
    """One of two constants, chosen by `training`: stands where tracing would have baked the mode in."""

    def __init__(self, train: Any, eval: Any) -> None:  # noqa: A002 - the two modes are called train and eval
        super().__init__()
        self.values = {True: train, False: eval}

    def forward(self) -> Any:
        """The constant for the current mode."""
        return self.values[self.training]

    def extra_repr(self) -> str:
        """Both constants."""
        return f"train={self.values[True]!r}, eval={self.values[False]!r}"


class MustBeNone(nn.Module):
    """Stands for an optional argument that was None while tracing, so that forward took the path without it."""

    def __init__(self, argument: str) -> None:
        super().__init__()
        self.argument = argument

    def forward(self, value: Any) -> None:
        """Refuse a value that the graph would ignore."""
        if value is not None and not isinstance(value, fx.Proxy):  # a proxy: somebody traces the graph again
            raise ArgumentError(
                f"forward was captured without its optional argument {self.argument!r}, so it cannot take one; "
                f"transform the model with example_inputs that contain {self.argument!r}"
            )

    def extra_repr(self) -> str:
        """The argument."""
        return self.argument


class Tracer(fx.Tracer):
    """Symbolic tracer whose graphs have weights as nodes; also the one that unpickling a captured model uses."""

    proxy_buffer_attributes = True  # a buffer is state, not a constant: it may change between two calls

    def __init__(self, absent: Collection[str] = ()) -> None:
        super().__init__()
        self._absent = absent  # optional arguments to trace as None

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Any, list[Any]]:
        """Give forward None for an optional argument that nobody passes, and refuse it in calls of the graph."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for index, arg in enumerate(args):
            name = str(arg.node.target) if isinstance(arg, fx.Proxy) else None
            if name is not None and name in self._absent:
                child = f"{name}_must_be_none"
                self.root.add_module(child, MustBeNone(name))
                self.create_node("call_module", child, (arg.node,), {})
                args[index] = None
        return function, args

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace `root`, whose tensors become nodes under their first name."""
        self._names = {id(t): n for n, t in [*root.named_buffers(), *root.named_parameters()]}
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules that stay one node: those of torch.nn without synapses, and those whose call runs hooks."""
        if why_kept_whole(m) is not None:
            return True
        return super().is_leaf_module(m, module_qualified_name) and not _is_weight_module(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """One `get_attr` node for every tensor, whichever alias reads it, found in constant time."""
        name = self._names.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """Take constants that live in the module tree from there, not as copies."""
        if isinstance(a, torch.Tensor) and id(a) in self._names:
            return self.create_node("get_attr", self._names[id(a)], (), {})
        return super().create_arg(a)


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
        ArgumentError: not a module, a wrapped module, or one whose parameters have no values yet.
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
    if hasattr(model, RECORD):
        raise ArgumentError(
            f'model has an attribute "{RECORD}", the name under which biofx keeps its record; rename it'
        )


def capture(model: nn.Module, example_inputs: Any = None) -> CapturedModule:
    """Trace a model into a graph module that takes over its module tree.

    Args:
        model: a checked model (see `check`); its submodules become those of the result.
        example_inputs: arguments of forward. An argument whose default is None, and which they do not contain, is None
            for the graph: it takes the path without it, and says so to a caller who passes it.

    Returns:
        A graph module with the tree, state, mode, attributes and hooks of the model.

    Raises:
        CaptureError: forward cannot be traced; names the module and the line.
    """
    graph, constants = _trace_both_modes(model, _absent(model, example_inputs))
    for node in graph.find_nodes(op="get_attr"):
        if node.target in constants:
            node.target = f"{RECORD}.{node.target}"
    bio = captured(model, graph)
    record = Record({name: p.shape for name, p in model.named_parameters()}, constants)
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
    return {name for name in optional if given.get(name) is None}


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as arguments of a call: a tuple is positional, a dict by keyword, anything else is the first."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def _trace_both_modes(model: nn.Module, absent: Collection[str]) -> tuple[fx.Graph, dict[str, Any]]:
    modes = {module: module.training for module in model.modules()}
    try:
        _set_mode(modes, True)
        with _readers_of_training() as readers:
            graph, constants = _trace(model, absent)
        readers &= modes.keys()
        if readers:
            _set_mode(modes, False)
            evaluation, _ = _trace(model, absent)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if readers:
        _follow_mode(model, graph, evaluation, readers)
    return graph, constants


def _set_mode(modules: Iterable[nn.Module], mode: bool) -> None:
    for module in modules:
        module.training = mode


def _trace(model: nn.Module, absent: Collection[str]) -> tuple[fx.Graph, dict[str, Any]]:
    before = set(vars(model))
    try:
        graph = Tracer(absent).trace(model)
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error
    finally:  # tracing leaves its constants behind as attributes of the model
        constants = {name: vars(model).pop(name) for name in set(vars(model)) - before}
    for node in graph.nodes:
        node.type = None  # annotations that are strings, as they are today, cannot be pickled with the code
    first: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        if first.setdefault(node.target, node) is not node:
            node.replace_all_uses_with(first[node.target])
            graph.erase_node(node)
    return graph, constants


@contextmanager
def _readers_of_training() -> Iterator[set[nn.Module]]:
    """Note which modules read `self.training` while the block runs."""
    readers: set[nn.Module] = set()

    def read(module: nn.Module) -> bool:
        readers.add(module)
        return bool(vars(module)["training"])

    def write(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    # A property of the class goes before the attribute of the instance.
    type.__setattr__(nn.Module, "training", property(read, write))
    try:
        yield readers
    finally:
        type.__delattr__(nn.Module, "training")


def _follow_mode(model: nn.Module, train: fx.Graph, evaluate: fx.Graph, readers: set[nn.Module]) -> None:
    """Where the two graphs differ in a constant, make `train` read it from a `ByMode` module."""
    position = {node: i for graph in (train, evaluate) for i, node in enumerate(graph.nodes)}
    differs = CaptureError(
        f"{_names(model, readers)} takes another path in training than in evaluation mode (it reads self.training), "
        "and one graph cannot hold both; switch on a constant instead, or transform the parts separately"
    )

    def merge(a: Any, b: Any, node: fx.Node) -> Any:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and position[a] == position[b]:
            return a
        if isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
            return type(a)(merge(x, y, node) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: merge(a[key], b[key], node) for key in a}
        if any(isinstance(x, fx.Node | tuple | list | dict | slice) and x != y for x, y in ((a, b), (b, a))):
            raise differs
        return a if type(a) is type(b) and a == b else _by_mode(model, node, a, b)

    if len(train.nodes) != len(evaluate.nodes):
        raise differs
    for a, b in list(zip(train.nodes, evaluate.nodes, strict=True)):
        if (a.op, a.target) != (b.op, b.target):
            raise differs
        a.args, a.kwargs = merge(tuple(a.args), tuple(b.args), a), merge(dict(a.kwargs), dict(b.kwargs), a)


def _by_mode(model: nn.Module, node: fx.Node, train: Any, evaluate: Any) -> fx.Node:
    path = next((path for path, _ in reversed(node.meta.get("nn_module_stack", {}).values())), "")
    owner = model.get_submodule(path)  # whose .train() and .eval() decide
    index = sum(isinstance(child, ByMode) for child in owner.children())
    owner.add_module(f"by_mode_{index}", ByMode(train, evaluate).train(owner.training))
    with node.graph.inserting_before(node):
        return node.graph.call_module(f"{path}.by_mode_{index}".lstrip("."))


def _names(model: nn.Module, modules: set[nn.Module]) -> str:
    names = {module: name for name, module in model.named_modules()}
    described = (f'"{names[m]}" ({type(m).__name__})' if names[m] else type(m).__name__ for m in modules)
    return ", ".join(sorted(described))


def _explain(model: nn.Module, error: Exception) -> str:
    """Say which module and which line stopped the trace."""
    modules = set(model.modules())
    owner, users_line, any_line = model, "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        package = frame.f_globals.get("__name__", "")
        if package.startswith(("torch.fx", "biofx")):
            continue
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, nn.Module) and candidate in modules:
            owner = candidate
        file = frame.f_code.co_filename
        any_line = f"{file}:{number}: {linecache.getline(file, number).strip()}"
        if not package.startswith("torch"):
            users_line = any_line
    return f"{_names(model, {owner})} cannot be traced: {error}\n  at {users_line or any_line}"
