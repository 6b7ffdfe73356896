"""The tracer: symbolic tracing that makes weights nodes, and detects what a graph cannot represent."""

from __future__ import annotations

import inspect
import itertools
import re
import threading
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen

from biofx.base.contents import is_array, slots_of
from biofx.base.errors import InputError
from biofx.base.generators import global_states, set_state, state_of
from biofx.base.isolation import LOCK
from biofx.base.torch_internals import (
    HOOKS,
    OpOverload,
    TorchDispatchMode,
    call_untraced,
    has_global_hooks,
    memory_of,
    pytree,
    without_dispatch_modes,
)
from biofx.capture.explanation import explain, explain_here
from biofx.capture.reparametrized import (
    TRACED_MODULES,
    has_untraceable_hooks,
    is_learned,
    unparametrized_class,
    with_computing_hooks,
)
from biofx.weights.declared import CONVOLUTIONS, TRANSPOSED

WEIGHT_MODULES = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
_PLAIN_DICTS = ("builtins", "collections", "torch.fx.immutable_collections")  # the modules of their classes
VARIADIC = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
ASSIGNS = "its forward assigns the {} of a tensor, which a graph cannot represent"
LEAF = "it is a leaf module, as modules of torch.nn are"


class HelperModule(nn.Module):
    """A module that capture adds to a graph; it is always one node."""


class MustBeNone(HelperModule):
    """Raises if a caller passes an optional argument that was None while tracing."""

    def __init__(self, argument: str) -> None:
        super().__init__()
        self.argument = argument

    def forward(self, value: Any) -> None:
        """Raise for a value that the graph would ignore."""
        if value is not None and not isinstance(value, fx.Proxy):  # a proxy means that the graph is traced again
            raise InputError(
                f"forward was captured without its optional argument {self.argument!r}, so it cannot take one; "
                f"transform the model with example_inputs that contain {self.argument!r}"
            )

    def extra_repr(self) -> str:
        """The argument."""
        return self.argument


class NotTraceable(BaseException):  # not an Exception: a forward may have an `except Exception` around its code
    """Modules do what a graph cannot represent, so they become islands.

    Attributes:
        reasons: the reason by the path of the module, a sentence about "it"; the path of the model itself is empty.
    """

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = reasons


class StrictProxy(fx.Proxy):
    """A proxy that raises `NotTraceable` where a forward needs the value, or assigns an attribute of it.

    torch.fx would drop the assignment, and raise errors that a forward may catch, so the graph would be what its
    `except` clause computes.
    """

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return ValueAttribute(self, name)

    def __len__(self) -> int:
        raise self._needed("the length of a value is not known while tracing")

    def __int__(self) -> int:
        raise self._needed("an integer is not known while tracing")

    def __index__(self) -> int:
        raise self._needed("an integer is not known while tracing")

    def __float__(self) -> float:
        raise self._needed("a number is not known while tracing")

    def __hash__(self) -> int:
        if self.tracer.runs_forward:  # type: ignore[attr-defined]  # also modules hash what they hold
            raise self._needed("a value that is looked up is not known while tracing")
        return object.__hash__(self)

    def __repr__(self) -> str:
        if self.tracer.runs_forward:  # type: ignore[attr-defined]
            raise self._needed("a value that is written as text is not known while tracing")
        return super().__repr__()

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def _needed(self, message: str) -> NotTraceable:
        tracer: Any = self.tracer
        return tracer.untraceable(message)  # type: ignore[no-any-return]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_PROXIES:
            tracer: Any = self.tracer
            raise NotTraceable({tracer.current_path: ASSIGNS.format(name)})
        super().__setattr__(name, value)


class ValueAttribute(StrictProxy, fx.proxy.Attribute):
    """An attribute of a value."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        fx.proxy.Attribute.__init__(self, root, attr)


_OF_PROXIES = ("node", "tracer", "root", "attr", "_node")


class KeywordOnly(CodeGen):
    """Generates a signature with keyword-only arguments; `torch.fx` makes them positional."""

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
    """Symbolic tracer whose graphs have weights as nodes. Unpickling a captured model uses it as well.

    Attributes:
        islands: the modules that are called and not traced through, each with the reason.
        failures: those of them that this trace found; if there are any, its graph is invalid.
        refusals: the `MustBeNone` modules by their names; they become children of the model.
        steps: the events of the trace in order, as (path of the module whose forward runs, kind, subject). The kinds
            are "enter" with the path of a module, "node" with a node, and "exit" with the result.
        reads: the modules whose `training` was read, by the path of the module whose forward read it.
        computed: keys of the memory of other tensors with whose values forward computed; the results are constants.
        runs_forward: whether a trace is under way.
    """

    proxy_buffer_attributes = True  # a buffer is state, not a constant: it may change between two calls

    def __init__(
        self, absent: Collection[str] = (), islands: dict[str, str] | None = None, synapses: Set[int] = frozenset()
    ) -> None:
        super().__init__()
        self.runs_forward = False
        self._thread = threading.get_ident()  # other threads may call the same modules while this one traces
        self._absent = absent  # optional arguments to trace as None
        self.synapses = synapses  # ids of the parameters that get chains
        self.islands = dict(islands or {})
        self.failures: dict[str, str] = {}
        self.refusals: dict[str, MustBeNone] = {}
        self.steps: list[tuple[str, str, Any]] = []
        self.reads: dict[str, list[str]] = {}
        self.computed: set[int] = set()
        self._path_stack = [""]  # paths of the modules whose forward runs, the innermost last
        self._open_contexts: list[tuple[str, str]] = []  # contexts such as `torch.no_grad`, with the module's path

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace `root`, whose tensors become nodes under their first name."""
        with LOCK:
            self.root = root
            self._names = {id(t): n for n, t in [*root.named_buffers(), *root.named_parameters()]}
            self._gradients, self._random = _gradient_mode(), _random_state()
            with _RefuseValues(self), _recorded_operators(self), _recorded_parameters(self):
                self.runs_forward = True
                try:
                    graph = super().trace(root, concrete_args)
                finally:
                    self.runs_forward = False
            self._check_random()
        for node in graph.nodes:
            node.type = None  # string annotations cannot be pickled with the generated code
        merge_reads(graph)
        return graph

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Any, list[Any]]:
        """Trace absent optional arguments as None, with a `MustBeNone` module that refuses other values in calls."""
        inner = inspect.unwrap(root_fn)
        if inner is not root_fn and (inner.__code__.co_flags & VARIADIC or inner.__code__.co_kwonlyargcount):
            raise NotTraceable({"": "its forward is wrapped by a decorator, so its arguments cannot be told apart"})
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
        """Whether a module is one node: islands, helper modules, and modules of torch.nn without synapses."""
        reason = why_untraceable(m)
        if reason is not None:
            self.islands.setdefault(module_qualified_name, reason)
        if module_qualified_name in self.islands or isinstance(m, HelperModule):
            return True
        if _is_weight_module(m) or isinstance(m, TRACED_MODULES):
            return False
        of_torch = unparametrized_class(m).__module__.startswith(("torch.nn", "torch.ao.nn"))
        is_leaf = of_torch and not isinstance(m, nn.Sequential)
        if is_leaf and any(id(p) in self.synapses for inner in m.modules() for p in inner._parameters.values()):
            self.islands[module_qualified_name] = LEAF
        return is_leaf

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Note which module runs, so that a failure becomes an island as small as possible."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self._check_random()
        self.steps.append((self.current_path, "enter", path))
        self._path_stack.append(path)
        stack = dict(self.module_stack)
        try:
            if isinstance(m, TRANSPOSED) and any(size is not None for size in (*args[1:], kwargs.get("output_size"))):
                raise NotTraceable({path: "it is given an output_size, which depends on the shape of its input"})
            result = super().call_module(m, forward, args, kwargs)
            self._check_random()
        except (Exception, NotTraceable) as error:
            if isinstance(error, NotTraceable) and path not in error.reasons:
                raise
            # The graph is invalid, but tracing continues with this module as a leaf: one trace finds all failures.
            self._note_failure(path, error)
            self.module_stack.clear()
            self.module_stack.update(stack)
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._path_stack.pop()
        nodes = fx.node.map_aggregate(result, lambda value: value.node if isinstance(value, fx.Proxy) else value)
        self.steps.append((path, "exit", nodes))
        return result

    @property
    def current_path(self) -> str:
        """The path of the innermost module whose forward runs."""
        return self._path_stack[-1]

    def _note_failure(self, path: str, error: BaseException) -> None:
        """Make a module an island, and restore the gradient mode and random state that its forward may have changed."""
        self.islands[path] = error.reasons[path] if isinstance(error, NotTraceable) else explain(error)
        if not any(inner.startswith(f"{path}.") for inner in self.failures):  # it may have failed only because they did
            self.failures[path] = self.islands[path]
        torch.set_grad_enabled(self._gradients[0])
        for generator, state in self._random:
            set_state(generator, state)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the proxy of a node."""
        return StrictProxy(node, self)

    def untraceable(self, message: str) -> NotTraceable:
        """Return the error of a forward that cannot be traced from here on."""
        return NotTraceable({self.current_path: explain_here(message)})

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Raise because the running forward decides by a value."""
        raise self.untraceable("symbolically traced variables cannot be used as inputs to control flow")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Raise because the running forward iterates over a value."""
        raise self.untraceable("a value cannot be iterated over while tracing")

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Create a node and its proxy."""
        try:
            return super().create_proxy(*args, **kwargs)
        except Exception as error:  # which the forward may catch, but would not raise when it runs
            raise self.untraceable(" ".join(str(error).split()) or type(error).__name__) from error

    def create_node(self, kind: str, target: Any, args: tuple[Any, ...], *others: Any, **kwargs: Any) -> fx.Node:
        """Create a node, unless the forward runs in a state that a graph cannot represent, or freezes a parameter."""
        if target == "requires_grad_" and isinstance(args[0], fx.Node) and args[0].op == "get_attr":
            raise NotTraceable({self.current_path: ASSIGNS.format("requires_grad")})
        if self._open_contexts:
            path, block = self._open_contexts[0]
            raise NotTraceable({path: f"its forward uses torch.{block}, which a graph cannot represent"})
        if _gradient_mode() != self._gradients:
            reason = "its forward switches gradients on or off, which a graph cannot represent"
            raise NotTraceable({self.current_path: reason})
        node = super().create_node(kind, target, args, *others, **kwargs)
        self.steps.append((self.current_path, "node", node))
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return one proxy for each tensor, whichever alias reads it. `fx.Tracer` searches all names at each read."""
        name = self._names.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if name is None or threading.get_ident() != self._thread:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """Refer to tensors and modules of the module tree by `get_attr` nodes; `fx.Tracer` would copy the tensors."""
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        if isinstance(a, torch.Tensor):
            if id(a) in self._names:
                return self.create_node("get_attr", self._names[id(a)], (), {})
            self._check_random()
        if isinstance(a, dict) and not isinstance(a, fx.Proxy) and type(a).__module__ not in _PLAIN_DICTS:
            return self._create_dict_of_class(a)
        if type(a).__module__ == "numpy" and hasattr(a, "item") and not is_array(a):
            a = a.item()  # generated code cannot name NumPy scalars
        return super().create_arg(a)

    def _create_dict_of_class(self, a: Any) -> Any:
        """Create a node that builds a dictionary of its own class, such as the outputs of models of transformers."""
        if not is_dataclass(a):
            raise TypeError(f"a dictionary of class {type(a).__name__} cannot be part of a graph")
        values = {field.name: self.create_arg(getattr(a, field.name)) for field in fields(a)}
        return self.create_node("call_function", type(a), (), values)

    def note_mode_read(self, module: nn.Module) -> None:
        """Note that the running forward read `module.training`."""
        path = (self.submodule_paths or {}).get(module)
        if path is not None:
            self.reads.setdefault(self.current_path, []).append(path)

    def enter_context(self, context: Any) -> None:
        """Note that the running forward entered one of `CONTEXTS`."""
        self._open_contexts.append((self.current_path, type(context).__name__))

    def exit_context(self, context: Any) -> None:
        """Note that it left the context."""
        self._open_contexts.pop()

    def refuse_value(self, name: str) -> None:
        """Raise because the running forward computes with the values of a tensor."""
        reason = f"its forward computes with the present values of {name}, which would become constants of the graph"
        raise NotTraceable({self.current_path: reason})

    def _check_random(self) -> None:
        if _random_state() != self._random:
            raise NotTraceable({self.current_path: "its forward draws random numbers that do not depend on its input"})


def _recorded_operators(tracer: Tracer) -> AbstractContextManager[Any]:
    """Make every call of a dispatcher operator a node, as graphs of `torch.export` need when they are traced again.

    By themselves, operators detect a proxy in place of a tensor, but not in place of a size.
    """
    original = OpOverload.__call__
    thread = threading.get_ident()

    def call(operator: OpOverload, /, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(operator, *args, **kwargs)
        return tracer.create_proxy("call_function", operator, args, kwargs)

    return patch.object(OpOverload, "__call__", call)


def _recorded_parameters(tracer: Tracer) -> AbstractContextManager[Any]:
    """Make `parameters()` and `named_parameters()` yield proxies, not the tensors, which would become constants."""
    original, thread = nn.Module.named_parameters, threading.get_ident()

    def named_parameters(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        for name, parameter in original(module, *args, **kwargs):
            yield name, parameter if threading.get_ident() != thread else tracer.getattr(name, parameter, {})

    return patch.object(nn.Module, "named_parameters", named_parameters)


class _RefuseValues(TorchDispatchMode):
    """Raises if forward computes with the values of a parameter or buffer: the results would become constants.

    With other tensors it may, which are noted.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracer = tracer
        stored = [*tracer.root.named_buffers(), *tracer.root.named_parameters()]
        self._stored = {memory_key(tensor): name for name, tensor in stored if isinstance(tensor, torch.Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, unless one of its arguments shares memory with a parameter or buffer."""
        read = {memory_key(value) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        for key in read & self._stored.keys():
            self._tracer.refuse_value(self._stored[key])
        self._tracer.computed |= read
        return call_untraced(func, args, kwargs or {})  # not `func()`, which `_recorded_operators` makes a node


def memory_key(tensor: torch.Tensor) -> int:
    """Return a key for the memory of a tensor; its views have the same key."""
    try:
        return memory_of(tensor)
    except (NotImplementedError, RuntimeError):  # sparse and nested tensors
        return id(tensor)


def _gradient_mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _random_state() -> list[tuple[Any, Any]]:
    with without_dispatch_modes():  # it is called for every module, and is not part of the model's computation
        return [(torch.default_generator, state_of(torch.default_generator)), *global_states()]


def merge_reads(graph: fx.Graph) -> None:
    """Merge `get_attr` nodes of the same attribute, and remove unused ones."""
    first: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        if first.setdefault(node.target, node) is not node:
            node.replace_all_uses_with(first[node.target])
        if not node.users:
            graph.erase_node(node)


def unused_name(module: nn.Module, name: str) -> str:
    """Return a name for a new child: `name`, with a number if the name is taken."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    return next(name for name in names if not hasattr(module, name))


def _is_weight_module(module: nn.Module) -> bool:
    return isinstance(module, WEIGHT_MODULES) and is_learned(module, "weight")


def why_untraceable(module: nn.Module) -> str | None:
    """Return the reason why a module has to be a leaf, or None if its forward may be traced."""
    if has_untraceable_hooks(module, HOOKS) or has_global_hooks():
        return "it has hooks, which only run when the module itself is called"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if any(hasattr(module, name) for name in slots_of(type(module))):
        return "it has attributes in __slots__, whose changes a graph does not follow"
    return None
