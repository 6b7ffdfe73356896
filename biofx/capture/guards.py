"""Guards: whether the conditions under which a model was checked still hold, where its Python is not all that matters.

A graph is a specialization of a model's Python, so the Python runs, with the effective weights, and needs no guard. Two
kinds of models need one. If a pass needs the graph, or somebody has edited it, the graph runs, and follows no change of
modules, attributes and variables. If a pass doubled units, the Python was checked on one way through the model.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from biofx.base.contents import contents_key, copy_of, holders, is_holder
from biofx.base.errors import CaptureError, InputError
from biofx.base.isolation import kept_in_attributes, uses_copies
from biofx.base.references import made_anew
from biofx.base.torch_internals import HOOKS, has_global_hooks
from biofx.capture.assignments import assign_attribute
from biofx.capture.call_structure import CallStructure, is_plain, kinds, other_kind, placeholders, structure
from biofx.capture.outside_variables import OutsideVariables, attributes_of, first_difference
from biofx.capture.tracer import HelperModule
from biofx.capture.watched_tensors import WatchedTensor, watch
from biofx.model.chain import attribute
from biofx.model.changes import reason_for_graph
from biofx.model.islands import ORIGINAL_CLASS, WHOLE_MODEL
from biofx.model.provenance import record_of
from biofx.model.synapses import Synapses, has_synapses, replaced_weights, synapses_in

_OF_TENSORS = ("_parameters", "_buffers")


class _LastComparison(NamedTuple):
    """What the last full comparison found unchanged.

    Attributes:
        now: the dictionaries and containers that were compared.
        before: shallow copies of them.
        forwards: the modules, each with the forward of its class.
        orders: the dictionaries in attributes, each with its keys in order, which equality ignores.
    """

    now: list[Any]
    before: list[Any]
    forwards: list[tuple[nn.Module, Any]]
    orders: list[tuple[dict[Any, Any], list[Any]]]


class _Change(NamedTuple):
    """A change of the modules that a graph was traced from.

    Attributes:
        what: the change in words.
        same_way: whether forward goes the same way through the model: modules got hooks, or weights other values.
    """

    what: str
    same_way: bool = False


class Guard:
    """The conditions under which a graph was checked.

    Args:
        bio: the transformed model.
        structures: the structures of the arguments on which it was checked; None for any.
        known: the kinds of the arguments with which it was traced; empty for any.

    Attributes:
        needs: why the graph runs in place of the model's Python; None if it does not.
        widened_by: the pass that changed the units of the model, or None. What the model's Python computes with these
            units is known of the run that was checked: of other ways through it, nothing is.
    """

    def __init__(
        self, bio: fx.GraphModule, structures: frozenset[CallStructure] | None, known: Mapping[str, Any]
    ) -> None:
        # Including the containers around traced modules: their children may be replaced.
        around = (accumulate(path.split("."), "{}.{}".format) for path in record_of(bio).traced)
        self.traced = tuple(dict.fromkeys(["", *chain.from_iterable(around), *_only_looked_at(bio)]))
        self.structures, self.kinds = structures, known
        self._assigned = {
            ("" if node.args[0].target == WHOLE_MODEL else str(node.args[0].target), str(node.args[1]))
            for node in bio.graph.nodes
            if node.op == "call_function" and node.target is assign_attribute
        }
        self._owners = tuple(path for path in self.traced if has_synapses(bio.get_submodule(path)))
        self._tied = _tied_names(bio)
        self._saved = {path: self._state(path, bio.get_submodule(path)) for path in self.traced}
        plain = {p: m for p in self.traced if not isinstance(m := bio.get_submodule(p), fx.GraphModule)}
        self._made_anew = {path: made_anew(module) for path, module in plain.items()}
        self._forwards: dict[str, Any] | None = self._forwards_of_classes(bio)
        self.refresh(bio)
        self._outside: OutsideVariables | None = self._outside_of(bio)
        self._keys, self._changed_name = self._outside.keys, ""
        self._names = self._outside.names
        followed = [attribute(bio, name) for name in record_of(bio).followed]
        own = (x for _, _, x in kept_in_attributes(bio, self.traced) if isinstance(x, Tensor))
        self._own_tensors = watch(own, followed)
        self._was_written = False
        self._outside_tensors: list[WatchedTensor] | None = None
        self._equal_tensors: list[WatchedTensor] = []  # that took the places of some outside of the model
        self._tensors_outside(bio)
        self.watch(bio)

    def __getstate__(self) -> dict[str, Any]:
        # Pickle cannot save generated functions; what is unpickled takes those that it finds.
        found = ("still_holds", "_held", "_helpers", "_synapses", "_outside", "_forwards", "_outside_tensors")
        saved = {
            path: {name: value for name, value in state.items() if name not in self._made_anew.get(path, ())}
            for path, state in self._saved.items()
        }
        was_written = self._was_written or any(tensor.is_written() for tensor in self._own_tensors)
        return vars(self) | dict.fromkeys(found) | {"_equal_tensors": [], "_saved": saved, "_was_written": was_written}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._own_tensors = [tensor.in_copy() for tensor in self._own_tensors]

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        guard = object.__new__(Guard)
        saved = (value for state in self._saved.values() for value in state.values())
        for value in (*saved, *(watched.tensor for watched in self._own_tensors)):
            # What a hook computed, which `copy.deepcopy` refuses, and which the model may have no more.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value)
        guard.__setstate__(copy.deepcopy(self.__getstate__(), memo) | {"_forwards": self._forwards})
        return guard

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to guard, because the model's Python runs, whatever changes."""
        return self.needs is None and self.widened_by is None

    def watch(self, bio: fx.GraphModule) -> None:
        """Begin with a model, which may be a copy: note the tensors outside of it, and make `still_holds`."""
        guard, model = weakref.ref(self), weakref.ref(bio)

        @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # it is not compiled
        def still_holds() -> bool:
            mine, it = guard(), model()
            if mine is None or it is None:
                return True
            return mine._first_change(it) is None and not (mine.needs is not None and has_global_hooks())

        self.still_holds: Callable[[], bool] | None = still_holds
        self._followed = _read_anew(bio)
        if not self.is_idle:
            self._tensors_outside(bio)

    def holds_while_compiling(self, bio: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether torch.compile may compile the graph; it calls this at compile time."""
        if self.is_idle:
            return True
        if self.needs is not None and self.kinds and other_kind(kinds(self.defaults, args, kwargs), self.kinds):
            return False
        if self.replaced(bio) is not None or (self.needs is None and self.structures == frozenset()):
            return False
        return self.still_holds is None or self.still_holds()

    def refresh(self, bio: fx.GraphModule) -> None:
        """Derive the state of the guard from the graph and the modules, after either may have changed."""
        self.needs = reason_for_graph(bio)
        self.defaults = placeholders(bio.graph)  # which an edit may rename, move, add or remove
        self._followed = _read_anew(bio)
        self.widened_by = _doubling_pass(bio)
        self._held: _LastComparison | None = None
        self._helpers: list[tuple[nn.Module, nn.Module]] | None = None
        self._synapses: tuple[Synapses, ...] | None = None
        self._outside = None

    def synapses(self, bio: nn.Module) -> tuple[Synapses, ...]:
        """The synapses of all weights."""
        if self._synapses is None:
            self._synapses = tuple(synapses_in(bio).values())
        return self._synapses

    def change(self, bio: fx.GraphModule) -> str | None:
        """What changed since the graph was checked, in words; None if it may run.

        Raises:
            CaptureError: something changed, and a pass needs the graph.
        """
        changed = self._first_change(bio)
        if changed is not None and self.needs is not None:
            raise _not_followed(changed.what, self.needs)
        return None if changed is None else changed.what

    def replaced(self, bio: nn.Module) -> str | None:
        """Return the name of a weight that was replaced, as by `torch.func.functional_call`; None if there is none.

        Raises:
            CaptureError: there is one, and a pass needs the graph.
        """
        for path in self._owners:
            for key in replaced_weights(bio.get_submodule(path)):
                name = f"{path}.{key}".lstrip(".")
                if self.needs is not None:
                    raise _not_followed(f"{name} was replaced", self.needs)
                return name
        return None

    def check(self, bio: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check a call.

        Raises:
            ArgumentError: a weight was written to, and the write is lost; or an argument is of another kind than the
                one with which a graph was traced that a pass needs.
            CaptureError: something changed that the graph does not follow; or arguments take a way through the model on
                which the units were not checked that a pass doubled.
        """
        for child in self.synapses(bio):
            child.refuse_lost_writes()
        changed = self._first_change(bio)
        if self.needs is not None:
            if changed is not None:
                raise _not_followed(changed.what, self.needs)
            other = other_kind(kinds(self.defaults, args, kwargs), self.kinds) if self.kinds else None
            if other is not None:
                raise InputError(
                    f"{other} when the graph was traced, and {self.needs}; transform the model with example_inputs "
                    "like these"
                )
            if has_global_hooks():
                raise CaptureError(f"hooks for all modules are registered, and {self.needs}; remove them for this call")
            for owner, helper in self._helpers_of(bio):
                if helper.training is not owner.training:  # which was set as an attribute
                    helper.train(owner.training)
            return
        if changed is not None and not changed.same_way:
            raise _not_followed(changed.what, f"{self.widened_by} doubled units")
        if not (is_plain(args, kwargs) if self.structures is None else structure(args, kwargs) in self.structures):
            raise CaptureError(
                f"{self.widened_by} doubled units, which was checked on arguments of another structure (types, numbers "
                "of axes, keys, values that are no tensors); transform the model with example_inputs like these"
            )

    def _first_change(self, bio: fx.GraphModule) -> _Change | None:
        """Describe the first change of modules, ties, variables outside of the model, and tensors that either hold."""
        changed = (None if self._holds() else self._changed(bio)) or self._changed_outside(bio)
        for name, first in self._tied if changed is None else ():
            if _tensor(bio, name) is not _tensor(bio, first):
                return _Change(f"{name}, which was tied to {first}, changed", same_way=True)
        if changed is None and self._wrote_tensors(bio):
            return _Change("a tensor in an attribute, or outside of the model, was written into")
        return changed

    def _helpers_of(self, bio: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """The modules that stand for a mode in the graph, each with the module whose mode it is."""
        if self._helpers is None:
            self._helpers = [
                (owner, child)
                for owner in bio.modules()
                for child in owner.children()
                if isinstance(child, HelperModule)
            ]
        return self._helpers

    def _wrote_tensors(self, bio: fx.GraphModule) -> bool:
        """Whether a tensor with which the trace computed, in an attribute or outside, was written to."""
        watched = (*self._own_tensors, *self._tensors_outside(bio), *self._equal_tensors)
        return self._was_written or any(tensor.is_written() for tensor in watched)

    def _tensors_outside(self, bio: fx.GraphModule) -> list[WatchedTensor]:
        """The tensors outside of the model."""
        if self._outside_tensors is None:
            outside = self._outside_of(bio) if self._outside is None else self._outside
            self._outside_tensors = watch(outside.tensors, self._tensors_inside())
        return self._outside_tensors

    def _tensors_inside(self) -> list[Tensor]:
        return [watched.tensor for watched in self._own_tensors]

    def _holds(self) -> bool:
        """Whether the shallow copies of the last full comparison still equal their originals; a fast test."""
        if self._held is None:
            return False
        try:
            # Containers compare their parts by identity first, so equal tensors are not compared by their numbers.
            if self._held.now != self._held.before:
                return False
            if any([*dictionary] != keys for dictionary, keys in self._held.orders):
                return False
            return all(_forward_of(module) is forward for module, forward in self._held.forwards)
        except (RuntimeError, ValueError):  # a changed tensor or array has no truth value
            return False

    def _changed(self, bio: fx.GraphModule) -> _Change | None:
        """Describe the first change of the traced modules; if there is none, update the copies for the fast test."""
        modules = {}
        for path in self.traced:
            try:
                modules[path] = module = bio.get_submodule(path)
            except AttributeError:
                return _Change(f"{path} was removed")
            for key in replaced_weights(module):
                return _Change(f"{path}.{key}".lstrip(".") + " was replaced", same_way=True)
            for name, value in self._saved[path].items():
                if not _is_same(_compared(module, name), value):
                    is_hook, whole = name in HOOKS, f"{path}.{name}".lstrip(".")
                    return _Change(f"{path or 'the model'} got hooks" if is_hook else f"{whole} changed", is_hook)
            new = next((name for name, _ in attributes_of(module) if self._reads_new(path, name)), None)
            if new is not None:
                return _Change(f"{path}.{new}".lstrip(".") + " was set")
        if self._forwards is None:
            self._forwards = self._forwards_of_classes(bio)
        for path, forward in self._forwards.items():
            if _forward_of(modules[path]) is not forward:
                return _Change(f"the forward of the class of {path} changed")
        seen: set[int] = set()
        held = [holder for module in modules.values() for holder in _looked_at(module, seen)]
        forwards = [(modules[path], forward) for path, forward in self._forwards.items()]
        attributes = (value for module in modules.values() for _, value in attributes_of(module))
        again: set[int] = set()
        found = [*chain.from_iterable(holders(value, again) for value in attributes)]
        found += [module._modules for module in modules.values() if isinstance(module, nn.ModuleDict)]
        orders = [(each, [*each]) for each in found if isinstance(each, dict)]
        self._held = _LastComparison(held, [copy_of(holder) for holder in held], forwards, orders)
        return None

    def _reads_new(self, path: str, name: str) -> bool:
        """Whether forward may read an attribute that was not there, as by `getattr(self, name, None)`."""
        return name in self._names and name not in self._saved[path] and (path, name) not in self._assigned

    def _forwards_of_classes(self, bio: nn.Module) -> dict[str, Any]:
        modules = ((path, bio.get_submodule(path)) for path in self.traced)
        # Graphs, such as the model itself, have a forward of their own, which is replaced in each copy.
        return {path: _forward_of(module) for path, module in modules if not isinstance(module, fx.GraphModule)}

    def _changed_outside(self, bio: fx.GraphModule) -> _Change | None:
        """Describe the first change of a variable outside of the model; None if there is none."""
        if self._outside is None or not self._outside.is_same():
            self._outside = self._outside_of(bio)
            self._changed_name = first_difference(self._keys, self._outside.keys) or ""
            known = (watched.tensor for watched in self._tensors_outside(bio))
            self._equal_tensors = watch(self._outside.tensors, [*self._tensors_inside(), *known])
        changed = self._changed_name or self._parted(bio)
        return _Change(f"the variable {changed}, which forward reads, changed") if changed else None

    def _parted(self, bio: nn.Module) -> str:
        """A variable that held a tensor of the model where the graph reads another one now; empty if there is none."""
        met = {} if self._outside is None or uses_copies() else self._outside.met
        return next((label for label, (name, tensor) in met.items() if _tensor(bio, name) is not tensor), "")

    def _outside_of(self, bio: fx.GraphModule) -> OutsideVariables:
        return OutsideVariables(self._modules_of(bio), frozenset(self._assigned), self._followed)

    def _modules_of(self, bio: nn.Module) -> dict[str, nn.Module]:
        """The traced modules that are still there, by path."""
        modules = {}
        for path in self.traced:
            with contextlib.suppress(AttributeError):  # it was removed
                modules[path] = bio.get_submodule(path)
        return modules

    def _state(self, path: str, module: nn.Module) -> dict[str, Any]:
        own = [name for name, _ in attributes_of(module) if (path, name) not in self._assigned]
        # Hooks of the model itself run around its forward, whether that is the graph or the Python.
        names = (*own, *(HOOKS if path else ()), "forward", *_OF_TENSORS, "_modules")
        return {name: _compared(module, name) for name in names}


def _not_followed(changed: str, needs: str) -> CaptureError:
    return CaptureError(
        f"{changed} since the transform, and {needs}, which does not follow that; change the original model, then "
        "transform it"
    )


def _forward_of(module: nn.Module) -> Any:
    cls = type(module)
    return vars(cls).get(ORIGINAL_CLASS, cls).forward  # a class that owns synapses calls the original's


def _looked_at(module: nn.Module, seen: set[int]) -> Iterator[Any]:
    """All that is compared at each call: a module's attributes, children, hooks, and the contents of attributes."""
    yield vars(module)
    yield module._modules
    # `torch.func.functional_call` replaces weights there; a bias may be set that was None.
    yield from (getattr(module, name) for name in _OF_TENSORS)
    yield from (getattr(module, name) for name in HOOKS)
    for _, value in attributes_of(module):
        yield from holders(value, seen)


def _doubling_pass(bio: fx.GraphModule) -> str | None:
    """The name of the pass that doubled units, or None."""
    return next((run.pass_.name for run in record_of(bio).passes if run.pass_.changes_units and run.weights), None)


def _only_looked_at(bio: fx.GraphModule) -> Iterator[str]:
    """The paths of modules that the graph does not call, such as lists of modules, and modules that hold settings.

    A graph follows what changes in modules that it calls, but whether these mix units was checked as they were.
    """
    calls = [] if _doubling_pass(bio) else bio.graph.find_nodes(op="call_module")
    called = {str(node.target) for node in calls} | record_of(bio).islands.keys()
    for path, module in bio.named_modules():
        around = accumulate(path.split("."), "{}.{}".format)
        if not isinstance(module, Synapses | HelperModule | fx.GraphModule) and called.isdisjoint(around):
            yield path


def _read_anew(bio: fx.GraphModule) -> dict[int, str]:
    """The names of the parameters and buffers that the graph, or a module that it calls, reads in each call, by id."""
    registered = dict(chain(bio.named_parameters(remove_duplicate=False), bio.named_buffers(remove_duplicate=False)))
    live = set[fx.Node]()  # torch.export leaves reads whose results became constants
    for node in reversed(bio.graph.nodes):
        # `is_impure` asks the module of a call, which a user may have dropped.
        if node in live or node.op == "call_module" or node.is_impure():
            live.update((node, *node.all_input_nodes))
    read = {str(node.target) for node in bio.graph.find_nodes(op="get_attr") if node in live}
    called = tuple(f"{node.target}." for node in bio.graph.find_nodes(op="call_module"))
    read -= {*record_of(bio).constants}  # buffers that capture made of tensors that variables hold
    names = (name for name in registered if name in read or name.startswith(called))
    return {id(registered[name]): name for name in names}


def _tied_names(bio: fx.GraphModule) -> list[tuple[str, str]]:
    """The names of parameters and buffers that the graph reads under the name of the same tensor elsewhere."""
    read, names = {str(node.target) for node in bio.graph.find_nodes(op="get_attr")}, dict[int, list[str]]()
    for path, module in bio.named_modules():
        for key, tensor in chain.from_iterable(getattr(module, name).items() for name in _OF_TENSORS):
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{path}.{key}".lstrip("."))
    return [
        (name, first) for same in names.values() for first in read.intersection(same) for name in same if name != first
    ]


def _tensor(bio: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer, or None if there is none of that name."""
    path, _, key = name.rpartition(".")
    try:
        module = bio.get_submodule(path)
    except AttributeError:
        return None
    return next((held[key] for held in (module._parameters, module._buffers) if key in held), None)


def _compared(module: nn.Module, name: str) -> Any:
    """What is compared of an attribute: its contents if it has any, otherwise the object itself."""
    if name in HOOKS:
        return [*getattr(module, name).values()]
    if name in _OF_TENSORS:  # which of them exist, and which are None, like weights with synapses
        return {key: tensor is not None for key, tensor in getattr(module, name).items()}
    if name == "_modules":
        return dict(module._modules)
    value = vars(module).get(name)
    return contents_key(value) if is_holder(value) else value


def _is_same(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if isinstance(now, Tensor | nn.Module) or isinstance(before, Tensor | nn.Module):
        return False
    try:
        return type(now) is type(before) and bool(now == before)
    except (RuntimeError, ValueError, TypeError):
        return False
