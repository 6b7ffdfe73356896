"""Members: the modules of a transformed model, which compute with the effective weights inside of them.

The graph calls operators, not modules. But a module may be called on its own, as in `model.encoder(x)`, by an island
(`islands.py`), or by a checkpoint in the backward pass. So a module that owns a weight gets a subclass of its class, in
which the weight is an attribute that looks for its present value first (`EffectiveWeight`), and a module with weights
inside, called on its own, evaluates their chains itself. Nothing in a module changes meanwhile, so threads do not
disturb each other.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from biofx.chain import attribute, chain, evaluate, parameter_nodes
from biofx.errors import CaptureError
from biofx.provenance import Slot, inserted_nodes

HOME = "_biofx_home"  # where a member keeps its home

Place = tuple[int, str]
"""A module, by its id, and the name of one of its parameters; the empty name stands for the module as a whole."""


class _Present(threading.local):
    """The effective weights of what runs in this thread.

    Attributes:
        values: those of islands and modules whose forward runs; replaced as a whole, never changed.
        asked: those that other methods asked for last, or None if no such method runs.
    """

    values: Mapping[Place, Any] = {}
    asked: dict[Place, Asked] | None = None


present = _Present()


@contextmanager
def stored_weights() -> Iterator[None]:
    """Let modules hand out their stored weights, as they do outside of a forward, while one runs."""
    before, present.values = present.values, {}
    try:
        yield
    finally:
        present.values = before


class Home:
    """Where the weights inside a module come from.

    Attributes:
        bio: the transformed model.
        places: every weight inside the module: path of its owner, from the module; its name there, and in the model.
    """

    def __init__(self, bio: fx.GraphModule, module: nn.Module, places: list[tuple[str, str, str]]) -> None:
        self.bio = bio
        self.places = places
        self._owners = {path: weakref.ref(module.get_submodule(path)) for path, _, _ in places}

    def present_places(self, module: nn.Module) -> Iterator[tuple[Any, str, str]]:
        """The owner of every weight that still is where it was, its name there, and in the model."""
        children = dict(module.named_modules(remove_duplicate=False))
        for path, key, name in self.places:
            owner = self._owners[path]()
            if owner is not None and children.get(path) is owner and key in vars(owner)["_parameters"]:
                yield owner, key, name


class EffectiveWeight:
    """The attribute of a class that stands for a weight: reads the present effective weight, or else the stored one."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __get__(self, owner: nn.Module | None, cls: type | None = None) -> Any:
        if owner is None:
            return self
        value = present.values.get((id(owner), self.key))
        if value is None:
            value = vars(owner).get(self.key)  # replicas of data parallelism keep theirs there
        if value is None and not torch.compiler.is_compiling() and _is_of_user(sys._getframe(1)):
            if torch._C._current_graph_task_id() != -1:  # a function in an island, which is checkpointed
                value = _evaluated_alone(owner, self.key)
            elif present.asked is not None:
                asked = Asked(owner, self.key)  # anew each time: the method may be one that trains
                value, present.asked[id(owner), self.key] = asked.value, asked
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
        active = {key: present.values[id(self), key] for key in stored if (id(self), key) in present.values}
        return _Registered(self, stored, active) if active else stored

    @_parameters.setter
    def _parameters(self, stored: dict[str, Any]) -> None:
        vars(self)["_parameters"] = stored

    def get_parameter(self, target: str) -> Any:
        """A parameter by its name, or what takes its place now; see `torch.nn.Module.get_parameter`."""
        path, _, key = target.rpartition(".")
        value = present.values.get((id(self.get_submodule(path)), key))  # type: ignore[attr-defined]
        return super().get_parameter(target) if value is None else value  # type: ignore[misc]


class _Registered(dict[str, Any]):
    """The registry that a module has while an island runs; `torch.func.functional_call` replaces what is in it."""

    def __init__(self, owner: ReadsEffective, stored: dict[str, Any], active: dict[str, Any]) -> None:
        super().__init__({**stored, **active})
        self._owner, self._stored, self._active = owner, stored, active

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key in self._active:
            present.values = {**present.values, (id(self._owner), key): value}
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


def join(bio: fx.GraphModule) -> None:
    """Make all modules members that have parameters inside which the graph reads."""
    starts = {id(attribute(bio, name)): name for name in parameter_nodes(bio)}
    for module in bio.modules():
        places = [
            (path, key, starts[id(parameter)])
            for path, owner in module.named_modules()
            for key, parameter in vars(owner)["_parameters"].items()
            if id(parameter) in starts
        ]
        if module is bio:
            _give_attributes(type(bio), [key for owner, key, _ in places if not owner])
            vars(bio)[HOME] = Home(bio, module, places)
        elif places:
            _enter(module, Home(bio, module, places))


def leave(modules: Iterable[nn.Module]) -> None:
    """Give members their own classes back."""
    for module in modules:
        if isinstance(module, Member):
            original = _original_form(module)
            vars(module).update(vars(original))
            vars(module).pop(HOME, None)
            _set_class(module, type(original))


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
    vars(module)[HOME] = home


def _set_class(module: Any, cls: type[nn.Module]) -> None:
    module.__class__ = cls


@functools.cache
def _member_class(original: Any, keys: tuple[str, ...]) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        home: Home | None = vars(self).get(HOME)
        if home is None or _has_values(self, home):
            return original.forward(self, *args, **kwargs)
        before = present.values
        present.values = {**before, **_evaluated(self, home)}
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            present.values = before

    namespace = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {**methods_of_user(original), **namespace, "forward": forward, "_original": original}
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
    return any((id(owner), key) in present.values for owner, key, _ in home.present_places(module))


def _evaluated(module: nn.Module, home: Home) -> dict[Place, Tensor]:
    starts = parameter_nodes(home.bio)
    places = list(home.present_places(module))
    names = dict.fromkeys(name for _, _, name in places)
    for _, origin in inserted_nodes(home.bio.graph):
        if origin.slot is Slot.OUTPUT and origin.parameter in names:
            raise CaptureError(
                f"{type(module).__name__} is called on its own, and {origin.by} acts on what the operator of "
                f"{origin.parameter} returns in the graph of the model; call the model itself"
            )
    before, present.values = present.values, {}  # chains begin at what is stored
    try:
        with _not_saved_by_checkpoints():
            values = {name: evaluate(home.bio, chain(starts[name])) for name in names}
    finally:
        present.values = before
    return {(id(owner), key): values[name] for owner, key, name in places}


def effective_weights(bio: nn.Module) -> tuple[dict[str, Tensor], dict[Place, Any]]:
    """All weights of a transformed model that are where they were, as its operators receive them: by name and place."""
    home: Home = vars(bio)[HOME]
    values = _evaluated(bio, home)
    return {name: values[id(owner), key] for owner, key, name in home.present_places(bio)}, values


@contextmanager
def present_weights(values: Mapping[Place, Any]) -> Iterator[None]:
    """Let weights read as these values while the block runs in this thread."""
    before = present.values
    present.values = {**before, **values}
    try:
        yield
    finally:
        present.values = before


def _is_of_user(frame: FrameType) -> bool:
    """Whether a line of a model asks; code that torch.fx generates has no name, and asks for what is stored."""
    return str(frame.f_globals.get("__name__", "torch")).partition(".")[0] not in ("torch", "biofx")


def _evaluated_alone(owner: nn.Module, key: str) -> Tensor:
    """An effective weight, without an island or a forward that has evaluated it."""
    home: Home | None = vars(owner).get(HOME)
    bio: Any = owner if home is None else home.bio
    stored = vars(owner)["_parameters"][key]
    name = next(name for name, parameter in bio.named_parameters() if parameter is stored)
    with _not_saved_by_checkpoints():
        return evaluate(bio, chain(parameter_nodes(bio)[name]))


class Asked:
    """An effective weight that a method has asked for."""

    def __init__(self, owner: nn.Module, key: str) -> None:
        self.key = key
        self.value = _evaluated_alone(owner, key)
        self._copy = self.value.detach().clone()
        self._stored = vars(owner)["_parameters"][key]

    def refuse_change(self, method: str) -> None:
        """Refuse that a method has changed it, if its synapses do not change with it."""
        if is_lost(self.value, self._copy, self._stored):
            raise CaptureError(
                f"{method} changes {self.key}, and such a change would be lost, as the weight is computed from its "
                "synapses; call it on the model before the transform"
            )


def is_lost(value: Tensor, before: Tensor, stored: Tensor) -> bool:
    """Whether an effective weight was changed, and what is stored was not changed with it."""
    if value.untyped_storage()._cdata == stored.untyped_storage()._cdata:
        return False
    return not torch.allclose(value, before, rtol=0, atol=0, equal_nan=True)


def methods_of_user(original: type[nn.Module]) -> dict[str, Any]:
    """The methods and properties of a class beside those of `torch.nn.Module`, such that they read effective weights.

    Args:
        original: the class of a model, or of a module in it.
    """
    result: dict[str, Any] = {}
    for cls in original.__mro__[: original.__mro__.index(nn.Module)]:
        if cls.__module__.partition(".")[0] in ("torch", "biofx"):
            continue
        for name, value in vars(cls).items():
            if name in result or hasattr(nn.Module, name) or name.startswith("__"):
                continue
            if isinstance(value, FunctionType) and not inspect.isgeneratorfunction(value):
                result[name] = _reading_effective(value)
            elif type(value) is property and isinstance(value.fget, FunctionType):
                result[name] = property(_reading_effective(value.fget), value.fset, value.fdel, value.__doc__)
    return result


def _reading_effective(method: FunctionType) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if present.asked is not None or torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        asked = present.asked = {}
        try:
            result = method(self, *args, **kwargs)
        finally:
            present.asked = None
        for each in asked.values():
            each.refuse_change(method.__qualname__)
        return result

    return call


def _not_saved_by_checkpoints() -> AbstractContextManager[Any]:
    """Activation checkpointing counts what is saved for backward; chains were evaluated outside of it at first."""
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def _original_form(member: Any) -> nn.Module:
    """The same module, with its own class and with the weights as they are stored."""
    original: nn.Module = object.__new__(type(member)._original)
    vars(original).update({name: value for name, value in vars(member).items() if name != HOME})
    list_weights(original)
    return original


def list_weights(module: nn.Module) -> None:
    """Let a recurrent layer, if it is one, list the weights that are stored in it."""
    if isinstance(module, nn.RNNBase):
        stored = [module._parameters.get(name) for name in module._flat_weights_names]
        references = [weight if weight is None else weakref.ref(weight) for weight in stored]
        vars(module).update(_flat_weights=stored, _flat_weight_refs=references)
