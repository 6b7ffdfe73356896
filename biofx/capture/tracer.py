"""The tracer: symbolic tracing that keeps weights as nodes, and notices what a graph does not hold."""

from __future__ import annotations

import inspect
import itertools
import re
import threading
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from biofx.base.contents import is_array
from biofx.base.errors import InputError
from biofx.base.isolation import LOCK, Draws
from biofx.base.references import HOOKS
from biofx.capture.explanation import describe
from biofx.capture.reparametrized import (
    TRACED_THROUGH,
    has_other_hooks,
    is_learned,
    original_class,
    with_computing_hooks,
)

TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
WEIGHT_MODULES: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
_PLAIN_DICTS = ("builtins", "collections", "torch.fx.immutable_collections")  # where their classes are from
VARIADIC = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
ONE_PIECE = "it is called in one piece, as modules of torch.nn are"


class StandIn(nn.Module):
    """A module that capture itself puts into a graph; it is always one node."""


class MustBeNone(StandIn):
    """Stands for an optional argument that was None while tracing, so that forward took the path without it."""

    def __init__(self, argument: str) -> None:
        super().__init__()
        self.argument = argument

    def forward(self, value: Any) -> None:
        """Refuse a value that the graph would ignore."""
        if value is not None and not isinstance(value, fx.Proxy):  # a proxy: torch.fx.symbolic_trace of the graph
            raise InputError(
                f"forward was captured without its optional argument {self.argument!r}, so it cannot take one; "
                f"transform the model with example_inputs that contain {self.argument!r}"
            )

    def extra_repr(self) -> str:
        """The argument."""
        return self.argument


class KeepWhole(BaseException):  # a finding, on which capture acts; no `except Exception` in a forward may catch it
    """Modules do what a graph does not hold, so that they have to be called as they are.

    Attributes:
        reasons: what each does, a sentence about "it", by the path of the module; empty for the model itself.
    """

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = reasons


class Value(fx.Proxy):
    """A proxy that notices if a forward assigns attributes of a value, which a graph would not do."""

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return ValueAttribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_PROXIES:
            tracer: Any = self.tracer
            reason = f"its forward assigns the {name} of a tensor, which a graph does not do"
            raise KeepWhole({tracer.running: reason})
        super().__setattr__(name, value)


class ValueAttribute(Value, fx.proxy.Attribute):
    """An attribute of a value."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        fx.proxy.Attribute.__init__(self, root, attr)


_OF_PROXIES = ("node", "tracer", "root", "attr", "_node")


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
        found: those that turned out not to fit into a graph in this trace, which is of no use then.
        refusals: what refuses the optional arguments that were traced as None, by the name of the child to be.
        steps: what happened in order, as (path of the module whose forward runs, kind, what).
        reads: the modules whose `training` was read, by the path of the module whose forward did.
    """

    proxy_buffer_attributes = True  # a buffer is state, not a constant: it may change between two calls

    def __init__(
        self, absent: Collection[str] = (), whole: dict[str, str] | None = None, synapses: Set[int] = frozenset()
    ) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self._absent = absent  # optional arguments to trace as None
        self.synapses = synapses  # ids of the parameters that get chains
        self.whole = dict(whole or {})
        self.found: dict[str, str] = {}
        self.refusals: dict[str, MustBeNone] = {}
        self.steps: list[tuple[str, str, Any]] = []
        self.reads: dict[str, list[str]] = {}
        self._running = [""]  # paths of the modules whose forward runs now
        self._blocks: list[tuple[str, str]] = []  # `with` blocks that are open now, by the module that opened them

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace `root`, whose tensors become nodes under their first name."""
        with LOCK:
            self.root = root
            self._names = {id(t): n for n, t in [*root.named_buffers(), *root.named_parameters()]}
            self._gradients, self._random = _gradient_mode(), _random_state()
            self._states = torch.get_rng_state(), Draws.now()
            with _NoValues(self), _recorded_operators(self), _recorded_parameters(self):
                graph = super().trace(root, concrete_args)
            self._check_random()
        for node in graph.nodes:
            node.type = None  # annotations that are strings, as they are today, cannot be pickled with the code
        merge_reads(graph)
        return graph

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Any, list[Any]]:
        """Give forward None for an optional argument that nobody passes, and refuse it in calls of the graph."""
        inner = inspect.unwrap(root_fn)
        if inner is not root_fn and (inner.__code__.co_flags & VARIADIC or inner.__code__.co_kwonlyargcount):
            raise KeepWhole({"": "its forward is wrapped by a decorator, so its arguments cannot be told apart"})
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        parameters = inspect.signature(root_fn).parameters.values()
        keyword_only = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        if keyword_only:
            self.graph.set_codegen(KeywordOnly(keyword_only))
        if is_module:
            function = with_computing_hooks(self.root, function)
        for index, arg in enumerate(args):
            name = str(arg.node.target) if isinstance(arg, fx.Proxy) else None
            if name is not None and name in self._absent:
                child = unused_name(self.root, f"{name}_must_be_none")
                self.refusals[child] = MustBeNone(name)
                self.create_node("call_module", child, (arg.node,), {})
                args[index] = None
        return function, args

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules that stay one node: those of torch.nn without synapses, and those that have to be kept whole."""
        reason = why_kept_whole(m)
        if reason is not None:
            self.whole.setdefault(module_qualified_name, reason)
        if module_qualified_name in self.whole or isinstance(m, StandIn):
            return True
        if _is_weight_module(m) or isinstance(m, TRACED_THROUGH):
            return False
        of_torch = original_class(m).__module__.startswith(("torch.nn", "torch.ao.nn"))
        is_leaf = of_torch and not isinstance(m, nn.Sequential)
        if is_leaf and any(id(p) in self.synapses for inner in m.modules() for p in inner._parameters.values()):
            self.whole[module_qualified_name] = ONE_PIECE
        return is_leaf

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Note which module runs, so that what a graph does not hold is found in the smallest module."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self._check_random()
        self.steps.append((self.running, "enter", path))
        self._running.append(path)
        stack = dict(self.module_stack)
        try:
            if isinstance(m, TRANSPOSED) and any(size is not None for size in (*args[1:], kwargs.get("output_size"))):
                raise KeepWhole({path: "it is given an output_size, which depends on the shape of its input"})
            result = super().call_module(m, forward, args, kwargs)
            self._check_random()
        except (Exception, KeepWhole) as error:
            if isinstance(error, KeepWhole) and path not in error.reasons:
                raise
            # This trace is lost; it goes on, to find the others at once.
            self._note(path, error)
            self.module_stack.clear()
            self.module_stack.update(stack)
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._running.pop()
        self.steps.append((path, "exit", fx.node.map_aggregate(result, _node_of)))
        return result

    @property
    def running(self) -> str:
        """The path of the module whose forward runs now."""
        return self._running[-1]

    def _note(self, path: str, error: BaseException) -> None:
        """Note that a module does not fit into a graph, and undo what its forward did to the state of the process."""
        self.whole[path] = error.reasons[path] if isinstance(error, KeepWhole) else describe(error)
        if not any(inner.startswith(f"{path}.") for inner in self.found):  # else it may have failed because of those
            self.found[path] = self.whole[path]
        torch._C._set_grad_enabled(self._gradients[0])
        torch.set_rng_state(self._states[0])
        self._states[1].restore()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A value that nobody knows yet."""
        return Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note the node, after a look at the state that the graph does not hold."""
        if self._blocks:
            path, block = self._blocks[0]
            raise KeepWhole({path: f"its forward uses torch.{block}, which a graph does not hold"})
        if _gradient_mode() != self._gradients:
            reason = "its forward switches gradients on or off, which a graph does not hold"
            raise KeepWhole({self.running: reason})
        node = super().create_node(*args, **kwargs)
        self.steps.append((self.running, "node", node))
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
        """Take constants and modules that live in the module tree from there, not as copies."""
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        if isinstance(a, torch.Tensor):
            if id(a) in self._names:
                return self.create_node("get_attr", self._names[id(a)], (), {})
            self._check_random()
        if isinstance(a, dict) and not isinstance(a, fx.Proxy) and type(a).__module__ not in _PLAIN_DICTS:
            return self._create_dict_of_class(a)
        if type(a).__module__ == "numpy" and hasattr(a, "item") and not is_array(a):
            a = a.item()  # a number, by a name that generated code does not know
        return super().create_arg(a)

    def _create_dict_of_class(self, a: Any) -> Any:
        """A dictionary with a class of its own, such as those that models of transformers return, keeps it."""
        if not is_dataclass(a):
            raise TypeError(f"a dictionary of class {type(a).__name__} cannot be part of a graph")
        values = {field.name: self.create_arg(getattr(a, field.name)) for field in fields(a)}
        return self.create_node("call_function", type(a), (), values)

    def note_read(self, module: nn.Module) -> None:
        """The forward that runs now has read `module.training`."""
        path = (self.submodule_paths or {}).get(module)
        if path is not None:
            self.reads.setdefault(self.running, []).append(path)

    def enter_block(self, block: Any) -> None:
        """The forward that runs now has entered one of `BLOCKS`."""
        self._blocks.append((self.running, type(block).__name__))

    def exit_block(self, block: Any) -> None:
        """It has left the block."""
        self._blocks.pop()

    def refuse_value(self, name: str) -> None:
        """The forward that runs now has computed with the values of a tensor."""
        reason = f"its forward computes with the present values of {name}, which a graph would keep"
        raise KeepWhole({self.running: reason})

    def _check_random(self) -> None:
        if _random_state() != self._random:
            raise KeepWhole({self.running: "its forward draws random numbers that do not depend on its input"})


@contextmanager
def _recorded_operators(tracer: Tracer) -> Iterator[None]:
    """Let every call of a dispatcher operator become a node, also one without a tensor: a graph of `torch.export`.

    On their own, operators notice a proxy in the place of a tensor, but not in that of a size.
    """
    original = OpOverload.__call__
    thread = threading.get_ident()

    def call(operator: OpOverload, /, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(operator, *args, **kwargs)
        return tracer.create_proxy("call_function", operator, args, kwargs)

    OpOverload.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        OpOverload.__call__ = original  # type: ignore[method-assign]


@contextmanager
def _recorded_parameters(tracer: Tracer) -> Iterator[None]:
    """Let `parameters()` and `named_parameters()` yield nodes, too, and not what parameters are at the time."""
    original, thread = nn.Module.named_parameters, threading.get_ident()

    def named_parameters(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        for name, parameter in original(module, *args, **kwargs):
            yield name, parameter if threading.get_ident() != thread else tracer.getattr(name, parameter, {})

    nn.Module.named_parameters = named_parameters  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.named_parameters = original  # type: ignore[method-assign]


class _NoValues(TorchDispatchMode):
    """Finds a forward that computes with the present values of a parameter or buffer, which would become constants."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer
        stored = [*tracer.root.named_buffers(), *tracer.root.named_parameters()]
        self._stored = {_memory(tensor): name for name, tensor in stored if isinstance(tensor, torch.Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, unless it takes such a value."""
        for value in pytree.tree_leaves((args, kwargs)):
            name = self._stored.get(_memory(value)) if isinstance(value, torch.Tensor) else None
            if name is not None:
                self._tracer.refuse_value(name)
        return func._op(*args, **(kwargs or {}))  # calling it makes a node of it


def _memory(tensor: torch.Tensor) -> int:
    """What tells the memory of a tensor, which its views share."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and nested tensors
        return id(tensor)


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value


def _gradient_mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _random_state() -> tuple[Any, Any]:
    with torch._C._DisableTorchDispatch():  # it is asked for often, and no value of the model
        return torch.get_rng_state().numpy().tobytes(), Draws.now()


def merge_reads(graph: fx.Graph) -> None:
    """One read of each attribute, and none of what is not used."""
    first: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        if first.setdefault(node.target, node) is not node:
            node.replace_all_uses_with(first[node.target])
        if not node.users:
            graph.erase_node(node)


def unused_name(module: nn.Module, name: str) -> str:
    """A name for a new child: `name`, or `name` with a number if the module has one."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    return next(name for name in names if not hasattr(module, name))


def _is_weight_module(module: nn.Module) -> bool:
    return isinstance(module, WEIGHT_MODULES) and is_learned(module, "weight")


def why_kept_whole(module: nn.Module) -> str | None:
    """Why a module has to be called as it is, or None if its forward may be traced through."""
    if has_other_hooks(module, HOOKS):
        return "it has hooks, which only run when the module itself is called"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return None
