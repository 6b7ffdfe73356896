"""Isolation: runs a model without side effects on the model, its inputs and global random numbers."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from biofx.base.contents import (
    ATOMS,
    Slots,
    copy_of,
    holders,
    is_array,
    is_holder,
    is_of_user,
    put_back,
    slots_of,
    tensors_in,
    values_within,
)
from biofx.base.errors import ArgumentError
from biofx.base.generators import global_states, is_generator, set_state, state_of
from biofx.base.lazy_copies import is_plain, is_untouched, lazy_copy, settle
from biofx.base.torch_internals import DERIVED, pytree, without_dispatch_modes

LOCK = threading.RLock()  # random number generators and torch.nn.Module, which tracing patches, are global


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as arguments of a call: a tuple is positional, a mapping by keyword, anything else the first."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Mapping):  # such as the output of a tokenizer of transformers, which is no dict
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def refuse_misfit(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], by: str = "") -> None:
    """Raise if example inputs on which a model failed do not fit the signature of its forward.

    Not before the model has run: a decorator or a hook may pass other arguments to forward than it gets. For the same
    reason, the signature is that of the decorator, not of what it wraps.

    Args:
        model: the model.
        args: the arguments by position.
        kwargs: the arguments by keyword.
        by: what begins the message.

    Raises:
        ArgumentError: they do not fit.
    """
    try:
        signature = inspect.signature(model.forward, follow_wrapped=False)
    except ValueError:  # none, as of TorchScript
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = type(model).__name__
        raise ArgumentError(f"{by}example_inputs do not fit {name}.forward{signature}: {error}") from error


def run_in_mode(
    model: nn.Module, example_inputs: Any, *, training: bool = False, learning: bool = False
) -> list[Tensor]:
    """The tensors that a model returns in evaluation or in training mode, detached.

    Neither the model's mode and buffers, nor the inputs, nor the global random number generators change.

    Args:
        model: any module.
        example_inputs: arguments of the model, as for `transform`.
        training: whether it runs in training mode.
        learning: whether gradients are enabled.
    """
    with parameters_kept(model), undisturbed(model), torch.set_grad_enabled(learning):
        model.train(training)
        if is_function(example_inputs):
            found = tensors_in(example_inputs(model))
        else:
            with arguments_kept(split_inputs(example_inputs)) as (args, kwargs):
                found = tensors_in(model(*args, **kwargs))
        return [tensor.detach() for tensor in found] if learning else found


@contextmanager
def arguments_kept(arguments: Any) -> Iterator[Any]:
    """Restore what a run of a model changes in the objects among its arguments, such as `data.x = …` in forward.

    Yields:
        The arguments for the run, with copies of the tensors that are in no object.
    """
    found: set[int] = set()
    copies = pytree.tree_map_only(Tensor, torch.clone, arguments)
    objects = [leaf for leaf in pytree.tree_leaves(copies) if is_of_user(leaf)]
    parts = [part for each in objects for part in values_within(each, found) if type(part) is Tensor]
    found.clear()
    held = [(holder, copy_of(holder)) for each in objects for holder in holders(each, found)]
    with without_dispatch_modes():
        tensors = [(SavedTensor.now(x), x.requires_grad) for x in parts if not x.is_inference()]
    try:
        yield copies
    finally:
        for holder, content in held:
            if not (isinstance(holder, dict) and _has_same(holder, content)):
                put_back(holder, content)
        with torch.no_grad(), without_dispatch_modes():
            for saved, is_learned in tensors:
                saved.restore()
                if saved.tensor.is_leaf:
                    saved.tensor.requires_grad_(is_learned)


def is_function(example_inputs: Any) -> bool:
    """Whether example inputs are a function that runs the model."""
    return callable(example_inputs) and not isinstance(example_inputs, Tensor | nn.Module | Mapping)


def gradients(outputs: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Sketches of the gradients of a scalar that depends on all outputs, by parameter; None if autograd fails.

    Each gradient is sketched (see `sketch`) and freed before the next one is computed, to save memory.
    """
    ends = [output for output in outputs if output.requires_grad]
    starts = seeds_of(ends)
    sketches: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[Tensor], Tensor | None]:
        def hook(gradient: Tensor) -> Tensor | None:
            sketches[name] = sketch(gradient)
            is_strided = gradient.layout is torch.strided and not gradient.is_nested
            return gradient.new_zeros(()).expand_as(gradient) if is_strided else None

        return hook

    learned = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    handles = [parameter.register_hook(note(name)) for name, parameter in learned.items()]
    try:
        torch.autograd.grad(ends, [*learned.values()], starts, allow_unused=True)
    except RuntimeError:  # such as an operator that has no gradient
        return None if ends else {}
    finally:
        for handle in handles:
            handle.remove()
    return {name: sketches[name] for name in learned if name in sketches}


def seeds_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of outputs from which a backward pass may begin: cosines, because the sum of a softmax has none."""
    return [torch.arange(x.numel(), device=x.device).reshape(x.shape).cos().to(x.dtype) for x in outputs]


DEEP = 64  # numbers in each sum of a sketch


def sketch(tensor: Tensor) -> Tensor:
    """Sums of `DEEP` numbers of a tensor each, weighted by random factors with magnitude of at least 1.

    A difference of d in one number changes its sum by at least d. Random signs alone would let differences that follow
    a pattern cancel.
    """
    parts = tensor.detach().unbind() if tensor.is_nested else [tensor.detach()]
    return torch.cat([_sketch(part if part.layout is torch.strided else part.to_dense()) for part in parts])


def _sketch(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    drawn = torch.randn(DEEP, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = (drawn + drawn.sign()).to(flat)
    deep = len(flat) - len(flat) % DEEP
    return torch.cat([factors @ flat[:deep].view(DEEP, -1), flat[deep:]])


_undisturbed = 0  # how many blocks of `undisturbed` run; only what holds `LOCK` changes it


def uses_copies() -> bool:
    """Whether a model uses copies of its buffers, in place of those that lists and variables may hold as well."""
    return _undisturbed > 0


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a block in which a model uses copies of its buffers; restore its attributes and random numbers afterwards."""
    global _undisturbed
    saved = [(module, dict(module._buffers), module.training) for module in model.modules()]
    buffers_of_all = list(model.buffers())
    copies = {id(buffer): lazy_copy(buffer) for buffer in buffers_of_all}
    try:
        for module, buffers, _ in saved:
            _put_buffers(module, {name: None if b is None else copies[id(b)] for name, b in buffers.items()})
        with unchanged(model), torch.random.fork_rng():  # which holds the lock
            _undisturbed += 1
            try:
                yield
            finally:
                _undisturbed -= 1
    finally:
        for module, buffers, mode in saved:
            _put_buffers(module, buffers)
            module.training = mode
        copies.clear()
        for buffer in buffers_of_all:
            settle(buffer)


def kept_in_attributes(model: nn.Module, paths: Iterable[str] | None = None) -> Iterator[tuple[str, str, Any]]:
    """The tensors and random number generators in attributes of modules, which are neither parameters nor buffers.

    Args:
        model: the model.
        paths: those of the modules that are searched; None for all.

    Yields:
        The path of the module, the attribute, and the tensor or generator, which several may hold, for the first.
    """
    seen = {id(x) for x in (*model.parameters(), *model.buffers())}
    modules = model.named_modules() if paths is None else ((path, model.get_submodule(path)) for path in paths)
    for path, module in modules:
        for name, value in vars(module).items():
            if type(value) in _WITHOUT_PARTS or name in _REGISTRIES or name in DERIVED:
                continue
            for part in values_within(value, seen):
                if (isinstance(part, Tensor) or is_generator(part)) and id(part) not in seen:
                    seen.add(id(part))
                    yield path, name, part


def tensors_in_attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors among them, by the name of the attribute."""
    for path, name, kept in kept_in_attributes(model):
        if isinstance(kept, Tensor):
            yield f"{path}.{name}".lstrip("."), kept


def _put_buffers(module: nn.Module, buffers: dict[str, Tensor | None]) -> None:
    """Replace the buffers of a module."""
    if isinstance(module._buffers, dict):  # a scripted module has no dictionary, and its set of buffers is fixed
        module._buffers.clear()
    for name, buffer in buffers.items():
        module._buffers[name] = buffer


@contextmanager
def parameters_kept(model: nn.Module, but: Collection[nn.Parameter] = ()) -> Iterator[list[SavedTensor]]:
    """Restore parameters that a forward changes, such as those of a teacher that follows its student, and gradients.

    Args:
        model: the model.
        but: parameters whose changes are kept.

    Yields:
        The saved parameters.
    """
    free = set(map(id, but))
    kept = [SavedTensor.now(p) for p in model.parameters() if not p.is_inference() and id(p) not in free]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, gradient in gradients:  # a forward that runs backward adds to the gradients in place
        parameter.grad = None if gradient is None else lazy_copy(gradient)
    try:
        yield kept
    finally:
        with torch.no_grad():
            for saved in kept:
                saved.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
            if gradient is not None:
                settle(gradient)


@dataclass(eq=False)
class SavedTensor:
    """A saved tensor, a parameter or an attribute: its memory, its version, and a lazy copy of its values."""

    tensor: Tensor
    memory: Tensor
    version: int
    value: Tensor | None

    @classmethod
    def now(cls, tensor: Tensor) -> SavedTensor:
        """Save a tensor."""
        with torch.no_grad():
            value = lazy_copy(tensor)
        return cls(tensor, tensor.detach(), tensor._version, value)

    def restore(self) -> None:
        """Restore the tensor, and release the copy."""
        assert self.value is not None
        if is_plain(self.memory) and self._is_other():
            self.tensor.data = self.memory
            self.tensor.data.copy_(self.value)  # through `data`: the version counts the undone write already
        elif not is_plain(self.memory) and self.tensor._version != self.version:
            self.tensor.copy_(self.value)
        self.value = None
        settle(self.tensor)

    def is_changed(self) -> bool:
        """Whether the tensor was written to, or its tensor replaced."""
        return self.tensor._version != self.version or (is_plain(self.memory) and self._is_other())

    def _is_other(self) -> bool:
        """Whether memory or values differ; a write through `data` does not raise the version."""
        assert self.value is not None
        now = self.tensor.data
        is_same = (now.dtype, now.device) == (self.value.dtype, self.value.device) and now.is_set_to(self.memory)
        return not (is_same and (is_untouched(now) or torch.equal(now, self.value)))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[Snapshot]:
    """Restore the attributes of modules and random numbers after a block, such as a trace, which leaves proxies.

    Yields:
        The saved attributes.
    """
    with LOCK:
        held = [*kept_in_attributes(model)]
        tensors = [SavedTensor.now(x) for _, _, x in held if isinstance(x, Tensor) and not x.is_inference()]
        generators = [(path, name, x, state_of(x)) for path, name, x in held if is_generator(x)]
        before, states = Snapshot(model, generators), global_states()
        with torch.random.fork_rng(devices=[]):
            try:
                yield before
            finally:
                before.restore()
                with torch.no_grad():
                    for tensor in tensors:
                        tensor.restore()
                for generator, state in [*states, *((x, state) for _, _, x, state in generators)]:
                    set_state(generator, state)


class Change(NamedTuple):
    """A change of a module's attribute.

    Attributes:
        path: the path of the module.
        name: the attribute.
        is_assigned: whether the attribute was assigned or deleted, not just changed in place.
    """

    path: str
    name: str
    is_assigned: bool


class Snapshot:
    """The attributes of modules, with the contents of lists, dictionaries, sets and plain objects among them.

    Tensors and modules are compared by identity, not by value.

    Args:
        model: the model.
        generators: random number generators in attributes: the path of the module, the attribute, and the state.
    """

    def __init__(self, model: nn.Module, generators: Sequence[tuple[str, str, Any, Any]] = ()) -> None:
        self._generators = generators
        self._held: list[tuple[str, str, Any, Any]] = []  # path, attribute, the container, and a copy of it
        self._seen: set[int] = set()
        for path, module in model.named_modules():
            attributes = vars(module)
            self._held.append((path, "", attributes, attributes.copy()))
            if slots_of(type(module)):
                self._held.append((path, "__slots__", Slots(module), copy_of(Slots(module))))
            for name, value in attributes.items():
                kind = type(value)
                if kind in ATOMS:  # like most attributes
                    continue
                if kind in _EMPTY and not value:  # like most registries of modules
                    self._held.append((path, name, value, _EMPTY[kind]))
                elif name in _OF_TENSORS_AND_MODULES and kind in _DICTIONARIES:
                    self._held.append((path, name, value, value.copy()))
                elif is_holder(value):
                    self._held += [(path, name, holder, copy_of(holder)) for holder in holders(value, self._seen)]

    def restore(self) -> None:
        """Restore all attributes and contents."""
        for _, _, holder, content in self._held:
            if content is _EMPTY.get(type(holder)) and not holder:
                continue
            if not (isinstance(holder, dict) and _has_same(holder, content)):
                put_back(holder, content)

    def changes(self) -> Iterator[Change]:
        """The changes since the snapshot."""
        for path, name, generator, state in self._generators:
            if state_of(generator) != state:
                yield Change(path, name, False)
        for path, attribute, holder, content in self._held:
            if attribute in DERIVED:
                continue
            if not isinstance(holder, dict):
                if not _is_same(copy_of(holder), content):
                    yield Change(path, attribute, False)
                continue
            for key in dict.fromkeys(key for key in [*content, *holder] if key not in DERIVED):
                if key not in holder or key not in content or not _is_same(holder[key], content[key]):
                    name = str(key) if attribute in ("", *_REGISTRIES) else attribute
                    yield Change(path, name, attribute in ("", "_buffers"))


_DICTIONARIES = frozenset((dict, OrderedDict))
# Most registries are empty: one container stands for the copies of all empty ones, which would take time to make.
_EMPTY: dict[type, Any] = {kind: kind() for kind in (*_DICTIONARIES, set)}
_OF_TENSORS_AND_MODULES = frozenset(("_parameters", "_buffers", "_modules"))
_REGISTRIES = frozenset(vars(nn.Module()))
_WITHOUT_PARTS = ATOMS - {Tensor, nn.Parameter}


def _has_same(holder: dict[Any, Any], content: dict[Any, Any]) -> bool:
    """Whether a dictionary holds the very same things, in the same order."""
    if len(holder) != len(content):
        return False
    return all(map(is_, holder, content)) and all(map(is_, holder.values(), content.values()))


def _is_same(a: Any, b: Any) -> bool:
    """Whether two attributes hold the same object or equal plain values."""
    if a is b:
        return True
    if isinstance(a, tuple | list | deque) and type(a) is type(b):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if is_array(a) and is_array(b):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return type(a) is type(b) and isinstance(a, int | float | complex | str | bytes | set) and bool(a == b)
