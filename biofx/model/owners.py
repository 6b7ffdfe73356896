"""Owners: modules with weights that have synapses.

The class of an owner is replaced by a generated subclass. There the weight is a property that reads the synapses
(`Synapses.read`). Assigning another owner's weight shares its synapses, as for tied weights; assigning a parameter
removes the synapses; any other assignment raises.
"""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from biofx.base.copying import keep_attributes
from biofx.base.derived_classes import derived_anew
from biofx.base.errors import ArgumentError, CaptureError
from biofx.base.shards import is_sharded
from biofx.model import weight_cache
from biofx.model.plain_weights import stored_for
from biofx.model.synapses import CHILD, Synapses, child_of, synapses_read_as
from biofx.model.tied_weights import note_owner
from biofx.model.weight_tensors import FOLD, LOST, WeightTensor


def give_synapses(places: Iterable[tuple[nn.Module, str]], parameter: nn.Parameter) -> Synapses:
    """Give a weight synapses in all modules that register it: initially one for each connection, and no links.

    Raises:
        CaptureError: a module cannot own synapses.
    """
    places = list(places)
    for owner, key in places:
        reason = obstacle_to_synapses(owner, key)
        if reason is not None:
            raise CaptureError(reason)
    synapses = Synapses(places[0][1], parameter)
    synapses.train(places[0][0].training)
    for owner, key in places:
        owner._parameters[key] = None  # keeps the order of parameters
        owner._modules[CHILD.format(key)] = synapses
        install_weight_properties(owner)
    return synapses


def obstacle_to_synapses(owner: nn.Module, key: str) -> str | None:
    """Return the reason why a module cannot own synapses, or None if it can."""
    name = type(owner).__name__
    if hasattr(owner, CHILD.format(key)):
        return f"{name} has an attribute {CHILD.format(key)}, which is where biofx keeps the synapses of {key}"
    if isinstance(owner, torch.jit.ScriptModule):
        return f"{name} is compiled by TorchScript, which only reads stored parameters"
    try:
        _owner_class(_own_class(owner), (key,))
    except TypeError as error:
        return f"{name} does not allow subclasses, and a module with synapses gets one: {error}"
    return None


def restore_class(owner: nn.Module) -> None:
    """Restore the original class of a module whose synapses were removed."""
    if type(owner) is not _own_class(owner):
        set_class(owner, _own_class(owner))
    refresh_flat_weights(owner)


def remove_synapses(model: nn.Module) -> None:
    """Replace all synapses of a model by plain parameters with the values of the weights."""
    parameters: dict[Synapses, nn.Parameter] = {}
    for owner in list(model.modules()):
        own = [(key, child) for key in owner._parameters if (child := child_of(owner, key)) is not None]
        for key, child in own:
            if child not in parameters:
                stored, weight = child.stored, child()
                same = weight.shape == stored.shape and torch.equal(weight, stored)
                parameters[child] = stored if same else nn.Parameter(weight.detach().contiguous(), stored.requires_grad)
                keep_attributes(parameters[child], stored)
            owner._parameters[key] = parameters[child]
            del owner._modules[CHILD.format(key)]
        if isinstance(owner, HasSynapses):
            restore_class(owner)


@contextmanager
def without_synapses(model: nn.Module) -> Iterator[None]:
    """Replace all synapses of a model by plain parameters, as `remove_synapses` does, while the block runs."""
    owners = [module for module in model.modules() if isinstance(module, HasSynapses)]
    before = [(owner, type(owner), dict(owner._parameters), dict(owner._modules)) for owner in owners]
    remove_synapses(model)
    try:
        yield
    finally:
        for owner, cls, parameters, children in before:
            set_class(owner, cls)
            owner._parameters.clear()
            owner._parameters.update(parameters)
            owner._modules.clear()
            owner._modules.update(children)
            install_weight_properties(owner)


def set_class(module: Any, cls: type[nn.Module]) -> None:
    """Change the class of a module in place, so that all references to the module stay valid."""
    module.__class__ = cls


def install_weight_properties(owner: nn.Module) -> None:
    """Make the weights of a module that have synapses properties of its class."""
    note_owner()
    keys = tuple(key for key in owner._parameters if child_of(owner, key) is not None)
    if not keys:
        if isinstance(owner, Owner):  # it had some, and still takes weights to share
            set_class(owner, _owner_class(_own_class(owner), ()))
            refresh_flat_weights(owner)
        return
    if isinstance(owner, nn.RNNBase):  # an attribute would hide the property of the class, and go stale
        vars(owner).pop("_flat_weights", None)
        vars(owner)["_flat_weight_refs"] = []
    if isinstance(owner, HasSynapses) and not isinstance(owner, Owner):  # a captured model has a class of its own
        add_weight_properties(type(owner), keys)
    else:
        set_class(owner, _owner_class(_own_class(owner), keys))


def refresh_flat_weights(module: nn.Module) -> None:
    """Rebuild the list of weights that recurrent layers keep; do nothing for other modules."""
    if isinstance(module, nn.RNNBase):
        registered = [module._parameters.get(name) for name in module._flat_weights_names]
        references = [weight if weight is None else weakref.ref(weight) for weight in registered]
        vars(module).update(_flat_weights=registered, _flat_weight_refs=references)


class HasSynapses:
    """A base class of owners: assignment, registration and deletion of weights that have synapses."""

    def __setattr__(self, name: str, value: Any) -> None:
        shared = synapses_read_as(value) if name in vars(self).get("_parameters", ()) else None
        if shared is not None:  # the weight of another owner: tie the two
            vars(self)["_parameters"][name] = None
            vars(self)["_modules"][CHILD.format(name)] = shared
            install_weight_properties(self)  # type: ignore[arg-type]  # an owner is a module
            return
        # Also if its name was taken from `_parameters`, as the older `weight_norm` does before it assigns a tensor.
        child = child_of(self, name) if vars(self).get("_modules") else None  # type: ignore[arg-type]  # an owner is one
        if child is not None and not isinstance(value, nn.Parameter):
            raise ArgumentError(f"{name} of {type(self).__name__} cannot become a {type(value).__name__}: {LOST}")
        super().__setattr__(name, value)  # which calls `register_parameter` for a parameter

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, and remove synapses of that name; see `torch.nn.Module.register_parameter`."""
        child = _synapses_of(self, name)
        is_own = child is not None and param is child.stored
        if isinstance(param, WeightTensor) or (_is_stored(self, param) and not is_own):
            raise ArgumentError(
                f"{name} of {type(self).__name__} cannot be registered: it is a weight with synapses, not a parameter; "
                f"{FOLD}"
            )
        if "." in name:  # of `module.named_parameters()`, by which parallelize_module replaces parameters
            raise ArgumentError(
                f"{name} of {type(self).__name__} is stored by its synapses, which parallelize_module does not look "
                "for; use biofx.parallelize(bio, mesh, plan)"
            )
        if child is not None and is_sharded(param) and not is_sharded(child.stored):
            raise ArgumentError(
                f"{name} of {type(self).__name__} is stored by its synapses, which a DTensor would replace; use "
                "biofx.parallelize(bio, mesh, plan), or register a DTensor as the parameter of the synapses"
            )
        if is_own:
            return
        if child is not None:
            del vars(self)["_modules"][CHILD.format(name)]
        super().register_parameter(name, param)  # type: ignore[misc]
        if child is not None:
            _remove_weight_property(self, name)  # last, because it changes the class

    def __delattr__(self, name: str) -> None:
        if _synapses_of(self, name) is not None:
            raise ArgumentError(f"{name} of {type(self).__name__} has synapses, so it cannot be deleted; {FOLD}")
        super().__delattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for key in vars(self)["_parameters"]:
            if _synapses_of(self, key) is not None:  # a class that writes by its own code writes what is computed
                destination.pop(f"{prefix}{key}", None)

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: list[str], errors: Any
    ) -> None:
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)  # type: ignore[misc]
        for key in vars(self)["_parameters"]:
            child, name = _synapses_of(self, key), f"{prefix}{key}"
            if child is not None and isinstance(state.get(name), Tensor):  # of a plain module, as its own code left it
                unexpected[:] = [each for each in unexpected if each != name]
                place = f"{prefix}{CHILD.format(key)}"
                if f"{place}.{child.stored_name}" in state:  # it has the stored values as well, which load unchanged
                    continue
                for each in child.users:
                    state.setdefault(f"{place}.{each}", getattr(child, each))
                try:
                    state[f"{place}.{child.stored_name}"] = stored_for(name, child, state[name])
                except ArgumentError as error:
                    errors.append(str(error))

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter, or the stored tensor of a weight with synapses; see `torch.nn.Module.get_parameter`."""
        path, _, key = target.rpartition(".")
        child = child_of(self.get_submodule(path), key)  # type: ignore[attr-defined]
        return super().get_parameter(target) if child is None else child.stored  # type: ignore[misc]


def container_methods(original: type[nn.Module]) -> dict[str, Any]:
    """Return methods that make a container with weights of its own iterate over its children without synapses."""
    if not issubclass(original, nn.Sequential | nn.ModuleList):
        return {}
    return {"__iter__": lambda self: iter(children_of(self).values()), "__len__": lambda self: len(children_of(self))}


def children_of(container: nn.Module) -> dict[str, nn.Module]:
    """Return the children of a container by name, without synapses."""
    children = container._modules.items()  # also one that stands at two places, which `named_children` omits
    return {name: child for name, child in children if child is not None and not isinstance(child, Synapses)}


class Owner(HasSynapses):
    """A base class of generated classes. Pickle cannot find them by name, so they are generated again when loaded."""

    _biofx_class: type[nn.Module]
    _biofx_keys: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or "_biofx_class" not in vars(type(self)):  # it is derived
            return reduced
        make, given, *state = reduced
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_unpickled_owner, (self._biofx_class, self._biofx_keys, *given[1:]), *state)
        return (_made_owner, (self._biofx_keys, make, *given), *state)


def _unpickled_owner(cls: Any, keys: tuple[str, ...], *args: Any) -> Any:
    return cls.__new__(_owner_class(cls, keys), *args)


def _made_owner(keys: tuple[str, ...], make: Any, *args: Any) -> Any:
    """An owner whose class says by its own `__reduce__` how instances are made."""
    made = make(*args)
    set_class(made, _owner_class(_own_class(made), keys))
    return made


def _synapses_of(owner: Any, key: str) -> Synapses | None:
    attributes = vars(owner)
    return child_of(owner, key) if key in attributes.get("_parameters", ()) else None


def _is_stored(owner: Any, parameter: nn.Parameter | None) -> bool:
    """Whether a parameter is the stored tensor of a weight of an owner, and was read as that weight outside of forward.

    While an optimizer is attached, a read may return the stored tensor itself. Code such as `prune` would register it
    under another name and break the owner. A forward may keep what it reads, as in the original.
    """
    if weight_cache.is_active() or torch.compiler.is_compiling():
        return False
    children = vars(owner).get("_modules", {}).values()
    return any(isinstance(child, Synapses) and child.stored is parameter for child in children)


def _own_class(owner: nn.Module) -> Any:
    """Return the class that a module would have without synapses."""
    return _without_owner(type(owner))


def _without_owner(cls: Any) -> Any:
    return derived_anew(cls, lambda each: vars(each).get("_biofx_class", None if issubclass(each, Owner) else each))


@functools.cache
def _owner_class(original: Any, keys: tuple[str, ...]) -> Any:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for key in keys:
            child = child_of(self, key)
            if child is not None and child.output_rewritten_by:
                raise CaptureError(
                    f"{type(self).__name__} is called on its own, but {child.output_rewritten_by} changes the "
                    f"output of the operator of {key} in the graph of the model; call the model itself"
                )
        if torch.compiler.is_compiling() or weight_cache.is_active():
            return original.forward(self, *args, **kwargs)
        with weight_cache.caching():
            return original.forward(self, *args, **kwargs)

    namespace = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace |= {"_biofx_class": original, "_biofx_keys": keys, "forward": forward, **container_methods(original)}
    # Created by the metaclass of the original, as a class statement would: it may check or register subclasses.
    cls = type(original)(original.__name__, (Owner, original), namespace)
    add_weight_properties(cls, keys)
    return cls


def add_weight_properties(cls: Any, keys: Iterable[str]) -> None:
    """Make attributes of a class properties that read synapses."""
    for key in keys:
        setattr(cls, key, _weight(key))
        if issubclass(cls, nn.RNNBase):
            # Recurrent layers cache a list of their weights, and pack these into one buffer on a GPU. Computed weights
            # are new tensors in every forward, so the list is built anew and nothing is packed.
            cls._flat_weights = property(_flat_weights, lambda self, value: None)
            cls._weights_have_changed = lambda self: False
            cls.flatten_parameters = lambda self: None


def _remove_weight_property(owner: Any, key: str) -> None:
    """Let a module keep a weight that lost its synapses as others do: code such as `prune` sets and deletes it."""
    if isinstance(owner, Owner):
        install_weight_properties(owner)  # type: ignore[arg-type]  # an owner is a module
    elif isinstance(vars(type(owner)).get(key), property):  # a captured model, which has a class of its own
        delattr(type(owner), key)


def _weight(key: str) -> property:
    def read(self: nn.Module) -> Any:
        child = child_of(self, key)
        if child is None:
            if key not in self._parameters:  # `type(layer)(…)` makes another one, which registers it next
                raise AttributeError(f"{type(self).__name__} has no attribute {key}")
            return self._parameters[key]
        try:
            return child.read()
        except AttributeError as error:  # nn.Module would report it as a missing attribute of the module
            raise RuntimeError(f"{key} of {type(self).__name__} cannot be computed: {error}") from error

    return property(read)


def _flat_weights(rnn: nn.RNNBase) -> list[Any]:
    return [getattr(rnn, name, None) for name in rnn._flat_weights_names]
