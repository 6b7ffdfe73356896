"""Islands: modules whose own Python forward is called from the graph, with their weights rewritten inside.

In the graph, an island is one call of `call_island`. It gets the ends of the chains of the weights inside it, and runs
the module while each of these weights reads as the end of its chain. To make that possible, a module that owns such a
weight gets a subclass of its class, in which the weight is an attribute that looks for its present value first
(`EffectiveWeight`). Nothing in a module changes while an island runs, so threads do not disturb each other.

Every module with such weights inside is made to compute with them also when it is called on its own, as by
`model.encoder(x)` or when activations are checkpointed: it then evaluates the chains itself.
"""

from __future__ import annotations

import copyreg
import functools
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from biofx.chain import chain, evaluate, parameter_nodes
from biofx.errors import CaptureError

WHOLE = "whole_model"  # what the graph of a model that is one island reads: the model itself
ORIGINAL_CLASS = "_biofx_class"  # where such a model keeps the class whose forward it runs
ORIGINAL_HOOKS = "_biofx_hooks"  # where it keeps the hooks that compute a weight before that forward
_HOME = "_biofx_home"  # where a member keeps its home

Place = tuple[int, str]
"""A module, by its id, and the name of one of its parameters; the empty name stands for the module as a whole."""


class _Active(threading.local):
    """The effective weights of the islands that run in this thread."""

    values: Mapping[Place, Any] = {}  # replaced as a whole, never changed


_active = _Active()
_modes: weakref.WeakKeyDictionary[nn.Module, set[bool]] = weakref.WeakKeyDictionary()  # in which an island has run


class Home:
    """Where the weights inside a module come from.

    Attributes:
        bio: the transformed model.
        places: every weight inside the module: path of its owner, from the module; its name there, and in the model.
    """

    def __init__(self, bio: fx.GraphModule, places: list[tuple[str, str, str]]) -> None:
        self.bio = bio
        self.places = places


class EffectiveWeight:
    """The attribute of a class that stands for a weight: reads the present effective weight, or else the stored one."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __get__(self, owner: nn.Module | None, cls: type | None = None) -> Any:
        if owner is None:
            return self
        value = _active.values.get((id(owner), self.key))
        if value is None:
            value = vars(owner).get(self.key)  # replicas of data parallelism keep theirs there
        if value is None and not torch.compiler.is_compiling() and _recomputes(sys._getframe(1)):
            value = _recomputed(owner, self.key)
        # The lookup of a module may be patched, as by torch.fx.
        return nn.Module.__getattr__(owner, self.key) if value is None else value

    def __set__(self, owner: nn.Module, value: Any) -> None:
        vars(owner)[self.key] = value

    def __delete__(self, owner: nn.Module) -> None:
        raise AttributeError(f"{self.key} is a weight of a transformed model")


class ReadsEffective:
    """A base class of modules with rewritten weights inside: forward finds them by whichever way it looks for them."""

    @property
    def _parameters(self) -> dict[str, Any]:
        """What is registered in the module, with the effective weights in it while there are some."""
        stored: dict[str, Any] = vars(self)["_parameters"]
        active = {key: _active.values[id(self), key] for key in stored if (id(self), key) in _active.values}
        return _Registered(self, stored, active) if active else stored

    @_parameters.setter
    def _parameters(self, stored: dict[str, Any]) -> None:
        vars(self)["_parameters"] = stored

    def get_parameter(self, target: str) -> Any:
        """A parameter by its name, or what takes its place now; see `torch.nn.Module.get_parameter`."""
        path, _, key = target.rpartition(".")
        value = _active.values.get((id(self.get_submodule(path)), key))  # type: ignore[attr-defined]
        return super().get_parameter(target) if value is None else value  # type: ignore[misc]


class _Registered(dict[str, Any]):
    """The registry that a module has while an island runs; `torch.func.functional_call` replaces what is in it."""

    def __init__(self, owner: ReadsEffective, stored: dict[str, Any], active: dict[str, Any]) -> None:
        super().__init__({**stored, **active})
        self._owner, self._stored, self._active = owner, stored, active

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key in self._active:
            _active.values = {**_active.values, (id(self._owner), key): value}
        else:
            self._stored[key] = value


class Member(ReadsEffective):
    """What a module gets as a second base class that has rewritten weights inside: copies are of the first only."""

    _original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = _original_form(self).__reduce_ex__(protocol)
        return (_new, *reduced[1:]) if reduced[0] is copyreg.__newobj__ else reduced  # type: ignore[attr-defined]


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)  # what pickle takes `copyreg.__newobj__` for, without a look at the class


def call_island(module: Any, weights: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
    """Run the Python forward of a module on given weights; one node in the graph.

    Args:
        module: the module, or a model that is one island.
        weights: the tensors that the operators inside receive, by the names of the parameters in the module.
        args: positional arguments of its forward.
        kwargs: keyword arguments.

    Raises:
        CaptureError: forward changes one of the weights in place, which would be forgotten.
    """
    if any(isinstance(value, fx.Proxy) for value in (*weights.values(), args, kwargs)):
        return _node(module, weights, args, kwargs)
    values: dict[Place, Any] = {(id(module), ""): True}
    for name, weight in weights.items():
        path, _, key = name.rpartition(".")
        values[id(module.get_submodule(path)), key] = weight
    before, copies = _active.values, _copies(module, weights)
    _active.values = {**before, **values}
    has_failed = True
    try:
        result = module.original_forward(*args, **kwargs) if is_whole(module) else module(*args, **kwargs)
        has_failed = False
        return result
    finally:
        _active.values = before
        _refuse_lost_changes(module, weights, copies, has_failed)


def _copies(module: nn.Module, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """What weights are, in the first run of an island in its mode: a forward that changes some does so every time."""
    modes = _modes.setdefault(module, set())
    if module.training in modes or torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack():
        return {}
    modes.add(module.training)
    return {name: w.detach().clone() for name, w in weights.items() if type(w) is Tensor}


def _refuse_lost_changes(
    module: nn.Module, weights: Mapping[str, Any], copies: Mapping[str, Tensor], has_failed: bool
) -> None:
    """Refuse a forward that changes weights that are computed; PyTorch may have refused it in its own words."""
    for name, copy in copies.items():
        path, _, key = name.rpartition(".")
        stored = vars(module.get_submodule(path))["_parameters"][key]
        is_stored = weights[name].untyped_storage()._cdata == stored.untyped_storage()._cdata
        if (has_failed or not is_stored) and not torch.allclose(weights[name], copy, rtol=0, atol=0, equal_nan=True):
            _modes.pop(module)
            raise CaptureError(
                f"the forward of {type(module).__name__}, an island, changes {name}, and such a change would be lost, "
                "as the weight is computed from its synapses at every call; transform the model with "
                f"exclude=['*{name}']"
            )


def _node(module: nn.Module, weights: Mapping[str, Any], args: Any, kwargs: Any) -> fx.Proxy:
    """The call under a tracer, whichever: it stays one node."""
    tracer = next(value for value in (*weights.values(), args, kwargs) if isinstance(value, fx.Proxy)).tracer
    path = WHOLE if is_whole(module) else tracer.path_of_module(module)  # type: ignore[attr-defined]
    target = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_function", call_island, (target, dict(weights), args, kwargs), {})


def is_island(node: fx.Node) -> bool:
    """Whether a node calls an island."""
    return node.op == "call_function" and node.target is call_island


def island_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The calls of islands, in graph order."""
    return (node for node in graph.nodes if is_island(node))


def island_path(node: fx.Node) -> str:
    """Path of the module that a node calls as an island; empty for the model itself."""
    module = node.args[0]
    assert isinstance(module, fx.Node)
    return "" if module.target == WHOLE else str(module.target)


def island_weights(node: fx.Node) -> dict[str, fx.Node]:
    """The nodes that compute the weights of an island, by the names of the parameters in it."""
    return dict(node.args[1])  # type: ignore[arg-type]


def described(path: str) -> str:
    """An island in words, by its path."""
    return f"the island {path}" if path else "the model, which is one island"


def is_whole(model: nn.Module) -> bool:
    """Whether a model is one island."""
    return ORIGINAL_CLASS in vars(model)


def is_running(island: nn.Module) -> bool:
    """Whether an island runs in this thread."""
    return (id(island), "") in _active.values


# --- members ---------------------------------------------------------------------------------------------------------


def join(bio: fx.GraphModule) -> None:
    """Make all modules with weights of islands inside members: they read effective weights."""
    names: dict[Place, str] = {}
    canonical = {id(parameter): name for name, parameter in bio.named_parameters()}
    islands = {island_path(node): node for node in island_nodes(bio.graph)}
    for path, node in islands.items():
        for name in island_weights(node):
            owner, _, key = name.rpartition(".")
            module = bio.get_submodule(f"{path}.{owner}".strip("."))
            names[id(module), key] = canonical[id(module._parameters[key])]
    for path in islands:
        for module in bio.get_submodule(path).modules():
            places = _places(module, names)
            if module is bio:
                _give_attributes(type(bio), [key for owner, key, _ in places if not owner])
            elif places:
                _enter(module, Home(bio, places))


def leave(modules: Iterable[nn.Module]) -> None:
    """Give members their own classes back."""
    for module in modules:
        if isinstance(module, Member):
            original = _original_form(module)
            vars(module).update(vars(original))
            vars(module).pop(_HOME, None)
            _set_class(module, type(original))


def _places(module: nn.Module, names: Mapping[Place, str]) -> list[tuple[str, str, str]]:
    found = []
    for path, owner in module.named_modules():
        for key in owner._parameters:
            if (id(owner), key) in names:
                found.append((path, key, names[id(owner), key]))
    return found


def _enter(module: nn.Module, home: Home) -> None:
    original: Any = type(module)._original if isinstance(module, Member) else type(module)
    keys = tuple(key for owner, key, _ in home.places if not owner)
    try:
        _set_class(module, _member_class(original, keys))
    except TypeError as error:
        if keys:
            raise CaptureError(
                f"{original.__name__} does not allow subclasses, and a module with weights inside an island gets one: "
                f"{error}"
            ) from error
        return
    vars(module)[_HOME] = home


def _set_class(module: Any, cls: type[nn.Module]) -> None:
    module.__class__ = cls


@functools.cache
def _member_class(original: Any, keys: tuple[str, ...]) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        home: Home | None = vars(self).get(_HOME)
        if home is None or _has_values(self, home):
            return original.forward(self, *args, **kwargs)
        before = _active.values
        _active.values = {**before, **_evaluated(self, home)}
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            _active.values = before

    namespace = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {**namespace, "forward": forward, "_original": original}
    cls: type[nn.Module] = type(original)(original.__name__, (Member, original), members)
    _give_attributes(cls, keys)
    return cls


def _give_attributes(cls: type[nn.Module], keys: Iterable[str]) -> None:
    for key in keys:
        setattr(cls, key, EffectiveWeight(key))
        if issubclass(cls, nn.RNNBase):
            # They keep a list of their weights, in one piece of memory on a GPU; effective ones are new at each call.
            cls._flat_weights = property(_flat_weights, lambda self, value: None)  # type: ignore[assignment]
            cls._weights_have_changed = lambda self: False  # type: ignore[method-assign]
            cls.flatten_parameters = lambda self: None  # type: ignore[method-assign]


def _flat_weights(rnn: nn.RNNBase) -> list[Any]:
    return [getattr(rnn, name, None) for name in rnn._flat_weights_names]


def _has_values(module: nn.Module, home: Home) -> bool:
    """Whether an island or a module around this one has evaluated its weights."""
    path, key, _ = home.places[0]
    return (id(module.get_submodule(path)), key) in _active.values


def _evaluated(module: nn.Module, home: Home) -> dict[Place, Tensor]:
    starts = parameter_nodes(home.bio)
    names = dict.fromkeys(name for _, _, name in home.places)
    before, _active.values = _active.values, {}  # chains begin at what is stored
    try:
        with _not_saved_by_checkpoints():
            values = {name: evaluate(home.bio, chain(starts[name])) for name in names}
    finally:
        _active.values = before
    return {(id(module.get_submodule(path)), key): values[name] for path, key, name in home.places}


def _recomputes(frame: FrameType) -> bool:
    """Whether a line of a model runs in the backward pass: that of a function in an island, which is checkpointed."""
    # Code that torch.fx generates has no name; it and biofx ask for what is stored.
    asks = str(frame.f_globals.get("__name__", "torch")).partition(".")[0] not in ("torch", "biofx")
    return asks and torch._C._current_graph_task_id() != -1


def _recomputed(owner: nn.Module, key: str) -> Tensor:
    """An effective weight for a function that is checkpointed, without the island that called it."""
    home: Home | None = vars(owner).get(_HOME)
    bio: Any = owner if home is None else home.bio
    stored = vars(owner)["_parameters"][key]
    name = next(name for name, parameter in bio.named_parameters() if parameter is stored)
    with _not_saved_by_checkpoints():
        return evaluate(bio, chain(parameter_nodes(bio)[name]))


def _not_saved_by_checkpoints() -> AbstractContextManager[Any]:
    """Activation checkpointing counts what is saved for backward; chains were evaluated outside of it at first."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def _original_form(member: Any) -> nn.Module:
    """The same module, with its own class and with the weights as they are stored."""
    original: nn.Module = object.__new__(type(member)._original)
    vars(original).update({name: value for name, value in vars(member).items() if name != _HOME})
    list_weights(original)
    return original


def list_weights(module: nn.Module) -> None:
    """Let a recurrent layer, if it is one, list the weights that are stored in it."""
    if isinstance(module, nn.RNNBase):
        stored = [module._parameters.get(name) for name in module._flat_weights_names]
        references = [weight if weight is None else weakref.ref(weight) for weight in stored]
        vars(module).update(_flat_weights=stored, _flat_weight_refs=references)
