"""Owners: modules with weights that have synapses.

Each gets a subclass of its class, in which the weight is an attribute that reads its synapses (`Synapses.read`), and in
which an assignment means something: another weight shares its synapses, a parameter replaces them, all else is refused.
"""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from biofx.base.errors import ArgumentError, CaptureError
from biofx.model import running
from biofx.model.handed_out import FOLD, LOST, HandedOut
from biofx.model.synapses import CHILD, Synapses, child_of


def give_synapses(places: Iterable[tuple[nn.Module, str]], parameter: nn.Parameter) -> Synapses:
    """Give a weight synapses: at first one for each connection, which is what was stored, and no links.

    Args:
        places: all modules in which the weight is registered, with its name there.
        parameter: the weight.

    Raises:
        CaptureError: a module cannot have a weight that is computed.
    """
    places = list(places)
    for owner, key in places:
        reason = why_not(owner, key)
        if reason is not None:
            raise CaptureError(reason)
    synapses = Synapses(places[0][1], parameter)
    synapses.train(places[0][0].training)
    for owner, key in places:
        owner._parameters[key] = None  # which keeps its place among the others
        owner._modules[CHILD.format(key)] = synapses
        look_for_synapses(owner)
    return synapses


def why_not(owner: nn.Module, key: str) -> str | None:
    """Why a module cannot have a weight that is computed, or None if it can."""
    name = type(owner).__name__
    if hasattr(owner, CHILD.format(key)):
        return f"{name} has an attribute {CHILD.format(key)}, which is where biofx keeps the synapses of {key}"
    if isinstance(owner, torch.jit.ScriptModule):
        return f"{name} is compiled by TorchScript, which reads {key} as it is stored"
    try:
        _owner_class(_own_class(owner), (key,))
    except TypeError as error:
        return f"{name} does not allow subclasses, and a module with synapses gets one: {error}"
    return None


def release(owner: nn.Module) -> None:
    """Give a module that has no synapses any more its own class back."""
    if type(owner) is not _own_class(owner):
        become(owner, _own_class(owner))
    list_weights(owner)


def take_synapses(model: nn.Module) -> None:
    """Put plain parameters, which are the weights, in the place of all synapses of a model."""
    made: dict[Synapses, nn.Parameter] = {}
    for owner in list(model.modules()):
        own = [(key, child) for key in owner._parameters if (child := child_of(owner, key)) is not None]
        for key, child in own:
            if child not in made:
                stored, weight = child.stored, child()
                same = weight.shape == stored.shape and torch.equal(weight, stored)
                made[child] = stored if same else nn.Parameter(weight.detach().contiguous(), stored.requires_grad)
            owner._parameters[key] = made[child]
            del owner._modules[CHILD.format(key)]
        if own:
            release(owner)


def become(module: Any, cls: type[nn.Module]) -> None:
    """Give a module a class that is laid out as its own: whoever refers to the module goes on referring to it."""
    module.__class__ = cls


def look_for_synapses(owner: nn.Module) -> None:
    """Let the attributes of a module that are weights with synapses read these."""
    keys = tuple(key for key in owner._parameters if child_of(owner, key) is not None)
    if not keys:
        return
    if isinstance(owner, nn.RNNBase):  # it lists its weights, for which it has a property now
        vars(owner).pop("_flat_weights", None)
        vars(owner)["_flat_weight_refs"] = []
    if isinstance(owner, HasSynapses) and not isinstance(owner, Owner):  # the class is of this module alone
        read_synapses(type(owner), keys)
    else:
        become(owner, _owner_class(_own_class(owner), keys))


def list_weights(module: nn.Module) -> None:
    """Let a recurrent layer, if it is one, list the weights that are stored in it."""
    if isinstance(module, nn.RNNBase):
        registered = [module._parameters.get(name) for name in module._flat_weights_names]
        references = [weight if weight is None else weakref.ref(weight) for weight in registered]
        vars(module).update(_flat_weights=registered, _flat_weight_refs=references)


class HasSynapses:
    """A base class of modules with weights that have synapses: what it means to assign one."""

    def __setattr__(self, name: str, value: Any) -> None:
        child = _child(self, name)
        if child is None or isinstance(value, nn.Parameter):
            super().__setattr__(name, value)  # a parameter is registered, see below
        elif not isinstance(value, HandedOut):
            raise ArgumentError(f"{name} of {type(self).__name__} cannot become a {type(value).__name__}: {LOST}")
        else:
            vars(self)["_modules"][CHILD.format(name)] = value.synapses

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, in the place of synapses if there are any; see `torch.nn.Module.register_parameter`."""
        if isinstance(param, HandedOut):
            raise ArgumentError(f"{name} of {type(self).__name__} cannot be a weight that has synapses; {FOLD}")
        child = _child(self, name)
        if child is not None and param is not child.stored:
            del vars(self)["_modules"][CHILD.format(name)]
        if child is None or param is not child.stored:
            super().register_parameter(name, param)  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        if _child(self, name) is not None:
            raise ArgumentError(f"{name} of {type(self).__name__} has synapses, and cannot be taken away; {FOLD}")
        super().__delattr__(name)

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter by its name, or what is stored of a weight; see `torch.nn.Module.get_parameter`."""
        path, _, key = target.rpartition(".")
        child = child_of(self.get_submodule(path), key)  # type: ignore[attr-defined]
        return super().get_parameter(target) if child is None else child.stored  # type: ignore[misc]


def methods_of_containers(original: type[nn.Module]) -> dict[str, Any]:
    """What a container that has weights of its own says of its children: synapses are none of them."""
    if not issubclass(original, nn.Sequential | nn.ModuleList):
        return {}
    return {"__iter__": lambda self: iter(children_of(self).values()), "__len__": lambda self: len(children_of(self))}


def children_of(container: nn.Module) -> dict[str, nn.Module]:
    """The children that a container had before its own weights had synapses, by name."""
    return {name: child for name, child in container.named_children() if not isinstance(child, Synapses)}


class Owner(HasSynapses):
    """A base class of modules that have a class of their own beside it."""

    _biofx_class: type[nn.Module]
    _biofx_keys: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_new, (self._biofx_class, self._biofx_keys, *reduced[1][1:]), *reduced[2:])
        return reduced


def _new(cls: Any, keys: tuple[str, ...], *args: Any) -> Any:
    return cls.__new__(_owner_class(cls, keys), *args)


def _child(owner: Any, key: str) -> Synapses | None:
    attributes = vars(owner)
    return child_of(owner, key) if key in attributes.get("_parameters", ()) else None


def _own_class(owner: nn.Module) -> Any:
    """The class that a module had before it had synapses."""
    return type(owner)._biofx_class if isinstance(owner, Owner) else type(owner)


@functools.cache
def _owner_class(original: Any, keys: tuple[str, ...]) -> Any:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for key in keys:
            child = child_of(self, key)
            if child is not None and child.rewired:
                raise CaptureError(
                    f"{type(self).__name__} is called on its own, and {child.rewired} acts on what the operator of its "
                    f"{key} returns in the graph of the model; call the model itself"
                )
        if torch.compiler.is_compiling() or running.is_open():
            return original.forward(self, *args, **kwargs)
        with running.forward():
            return original.forward(self, *args, **kwargs)

    namespace = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace |= {"_biofx_class": original, "_biofx_keys": keys, "forward": forward, **methods_of_containers(original)}
    cls = type(original)(original.__name__, (Owner, original), namespace)
    read_synapses(cls, keys)
    return cls


def read_synapses(cls: Any, keys: Iterable[str]) -> None:
    """Let attributes of a class read synapses."""
    for key in keys:
        setattr(cls, key, _weight(key))
        if issubclass(cls, nn.RNNBase):
            # They keep a list of their weights, in one piece of memory on a GPU; those that are computed are new.
            cls._flat_weights = property(_flat_weights, lambda self, value: None)
            cls._weights_have_changed = lambda self: False
            cls.flatten_parameters = lambda self: None


def _weight(key: str) -> property:
    def read(self: nn.Module) -> Any:
        child = child_of(self, key)
        if child is None:
            return self._parameters[key]
        try:
            return child.read()
        except AttributeError as error:  # which would read as if the module had no such attribute
            raise RuntimeError(f"{key} of {type(self).__name__} cannot be computed: {error}") from error

    return property(read)


def _flat_weights(rnn: nn.RNNBase) -> list[Any]:
    return [getattr(rnn, name, None) for name in rnn._flat_weights_names]
