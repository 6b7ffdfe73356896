"""Synapses: how a weight is computed from its stored tensor. THE idea of biofx.

    stored [Γ, *shape] → gradient hooks → sign constraint → sum over synapses → interneurons → the weight

A module whose weight has synapses gets a child module for it. The child holds the stored tensor, the links of this
chain, and their state. Every reader of `module.weight` gets the end of the chain: the graph, Python code, a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from biofx.base.errors import ArgumentError, PipelineError
from biofx.base.gains import coded, decoded
from biofx.base.shards import is_sharded, local, placed_like
from biofx.base.torch_internals import qualified_name
from biofx.model import weight_cache
from biofx.model.definitions import operator_of, written_name
from biofx.model.gradient_hooks import apply_rule, tell_caches
from biofx.model.slots import Inserted, Slot
from biofx.model.weight_tensors import LOST, WeightTensor, WriteProbe, as_weight_tensor

CHILD = "{}_synapses"  # name of the child, by the name of the weight in its module
_READ: WeakValueDictionary[int, Synapses] = WeakValueDictionary()  # by the id of the stored tensor that a read returned


@dataclass(frozen=True)
class State:
    """An argument of a link: a buffer or a parameter of the synapses.

    Attributes:
        key: its name.
    """

    key: str


@dataclass(frozen=True)
class Link:
    """One step from the stored tensor to the weight: `target(weight, *args)`.

    Attributes:
        target: a dispatcher operator or a PyTorch function.
        args: constants and state.
        origin: the passes that inserted it.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    origin: Inserted

    @property
    def name(self) -> str:
        """The target's name."""
        name = qualified_name(self.target) or str(getattr(self.target, "__name__", self.target))
        return written_name(name).replace("::", ".")

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle cannot save dispatcher operators.
        return _unpickled_link, (qualified_name(self.target) or self.target, self.args, self.origin)

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return self  # a copied model runs the same operator; an unpickled one, the operator that has the name then


def _unpickled_link(target: Any, args: tuple[Any, ...], origin: Inserted) -> Link:
    if isinstance(target, str):
        namespace, _, name = target.partition("::")
        target = operator_of(name) if namespace == "biofx" else getattr(getattr(torch.ops, namespace), name)
        tell_caches(target)
    return Link(target, args, origin)


class Place(NamedTuple):
    """Where something was found.

    Attributes:
        container: the dictionary that held it.
        key: its key there.
        value: what was found.
    """

    container: Mapping[str, Any]
    key: str
    value: Any


class _Derived(NamedTuple):
    """What follows from the links of some synapses, and from who acts for their hooks.

    Attributes:
        links: the links, and `acts`: where these are others, it is derived anew.
        acts: whether rules act at the steps of an optimizer, and whether the user calls them.
        active: the active links.
        is_computed: whether the weight differs from the stored tensor.
    """

    links: tuple[Link, ...]
    acts: tuple[bool, bool]
    active: tuple[Link, ...]
    is_computed: bool

    @classmethod
    def of(cls, synapses: Synapses) -> _Derived:
        """Derive it."""
        links, attached, by_hand = synapses.links, synapses.attached, synapses.by_hand
        if attached:
            active = tuple(
                replace(link, args=(link.args[0] ** 0.5,)) if link.target is torch.ops.biofx.share_grad else link
                for link in links
                if link.origin.slot is not Slot.HOOK and link.target is not torch.ops.biofx.project_sign
            )
        else:
            active = tuple(link for link in links if not by_hand or link.origin.slot is not Slot.HOOK)
        is_computed = any(link.origin.slot > Slot.HOOK for link in links)
        return cls(links, (attached, by_hand), active, is_computed)


class Synapses(nn.Module):
    """The synapses of one weight; their state is in buffers, and in parameters if it is trained.

    Args:
        key: the weight's name in its module; here it is the name of the stored tensor.
        stored: the stored tensor, shape (Γ, *shape) if there are Γ synapses for each connection, else just shape.

    Attributes:
        links: the steps from the stored tensor to the weight, in order.
        attached: whether rules act at the steps of an optimizer. If so, gradient hooks are inactive. So is the
            projection onto signs, because the rules restore the signs after every step. Copies are not attached.
        by_hand: whether the user calls the rules, so that hooks are inactive.
        paused: the names of states whose observers are paused until their rule acts next. Copying and loading a
            checkpoint clear it, because the next step is a different one then.
        users: for each state, the names of the passes that use it.
        output_rewritten_by: the pass that changes the output of the weight's operator; empty if there is none. Only the
            graph contains this change.
    """

    def __init__(self, key: str, stored: nn.Parameter) -> None:
        super().__init__()
        self.links: tuple[Link, ...] = ()
        self.attached = False
        self.by_hand = False
        self.paused: tuple[str, ...] = ()  # a constant for torch.compile, which keeps one graph for each
        self.users: dict[str, tuple[str, ...]] = {}
        self.output_rewritten_by = ""
        self._probes: tuple[WriteProbe, ...] = ()
        # A parameter cannot have the name of an attribute of modules, such as `forward`.
        self._key = f"{key}_" if hasattr(self, key) else key
        self.register_parameter(self._key, stored)

    @property
    def stored(self) -> nn.Parameter:
        """The stored tensor."""
        parameter = self._parameters.get(self._key)
        # Replicas of DataParallel have a plain tensor as an attribute instead. To look that up takes longer.
        return getattr(self, self._key) if parameter is None else parameter

    @property
    def stored_name(self) -> str:
        """The parameter name of the stored tensor in this module."""
        return self._key

    @property
    def is_computed(self) -> bool:
        """Whether the weight differs from the stored tensor; gradient hooks alone leave it the same."""
        return self._derived.is_computed

    @property
    def is_split(self) -> bool:
        """Whether the stored tensor has a leading axis of synapses."""
        return any(link.origin.slot is Slot.SUM for link in self.links)

    @property
    def has_interneurons(self) -> bool:
        """Whether interneurons inhibit the postsynaptic units."""
        return any(link.origin.slot is Slot.INTERNEURONS for link in self.links)

    @property
    def shares(self) -> int:
        """The number of synapses that share the gradient of their connection."""
        return next((round(1 / link.args[0]) for link in self.links if link.target is torch.ops.biofx.share_grad), 1)

    @property
    def active_links(self) -> tuple[Link, ...]:
        """The active links, in order.

        While an optimizer is attached, each of Γ synapses gets 1/√Γ of the gradient of its connection. Together they
        then have the norm of that gradient, so `clip_grad_norm_` clips as in the plain model.
        """
        return self._derived.active

    @property
    def _derived(self) -> _Derived:
        """What follows from the links, which a forward asks for at every read."""
        known: _Derived | None = vars(self).get("_known")
        if known is None or known.links is not self.links or known.acts != (self.attached, self.by_hand):
            known = vars(self)["_known"] = _Derived.of(self)
        return known

    def forward(self, *, until: Slot = Slot.INTERNEURONS, stored: Tensor | None = None) -> Tensor:
        """Compute the weight, or an intermediate value of its chain; differentiable in the stored tensor.

        Args:
            until: the last slot whose links are applied.
            stored: a tensor to use instead of the stored one.
        """
        is_compiling = torch.compiler.is_compiling()  # which must not keep what it derives
        active = _Derived.of(self).active if is_compiling else self.active_links
        return self._run([link for link in active if link.origin.slot <= until], stored)

    def computed_from(self, stored: Tensor) -> Tensor:
        """Compute the weight from a tensor in the place of the stored one, with all links, active or not."""
        return self._run(self.links, stored)

    def _run(self, links: Iterable[Link], stored: Tensor | None) -> Tensor:
        value: Tensor = self.stored if stored is None else stored
        for link in links:
            value = link.target(value, *placed_like(self.arguments(link), value))
        return value

    def arguments(self, link: Link) -> list[Any]:
        """The current arguments of a link, without the weight."""
        return [getattr(self, arg.key) if isinstance(arg, State) else arg for arg in link.args]

    def scaled(self, gradient: Tensor, weight: Tensor, hooks: Iterable[Link]) -> Tensor:
        """Apply the rules of gradient hooks, in order, to a gradient of the stored weight."""
        for link in hooks:
            gradient = apply_rule(link.target, gradient, weight, *self.arguments(link))
        return gradient

    def read(self) -> Tensor:
        """Return the value of `module.weight`.

        The outermost forward computes it once. A write into the result reaches the stored tensor, or raises if the
        weight is computed from it.

        Raises:
            ArgumentError: a computed weight that was read earlier was written to, so the write is lost.
        """
        if torch.compiler.is_compiling():
            return self.forward()
        substitute = weight_cache.substitute_for(self)
        if substitute is not None:
            return substitute
        self.refuse_lost_writes()
        # In a forward it is a `WeightTensor` also without gradients: forward decides alike with and without them.
        if not self.active_links or not (self.is_computed or torch.is_grad_enabled() or weight_cache.is_active()):
            _READ[id(self.stored)] = self
            return self.stored
        return weight_cache.cached(self, self.stored, self._compute)

    def _compute(self) -> Tensor:
        weight = as_weight_tensor(self.forward(), self)
        if self.is_computed:
            probe = WriteProbe.of(weight)
            kept = tuple(each for each in self._probes if not each.is_over)
            vars(self)["_probes"] = kept if probe is None else (*kept, probe)  # modules set attributes slowly
        return weight

    def refuse_lost_writes(self) -> None:
        """Raise if the computed weight was written to in a way that the tensor could not refuse.

        Raises:
            ArgumentError: it was.
        """
        if any(probe.is_written for probe in self._probes):
            self._probes = ()  # raise only once
            raise ArgumentError(f"a weight was written to, and {LOST}")

    def places(self) -> Iterator[Place]:
        """Where the links and all tensors are, and what is there."""
        yield Place(vars(self), "links", self.links)
        for container in (self._parameters, self._buffers):
            yield from (Place(container, key, value) for key, value in container.items())

    def insert(self, link: Link) -> None:
        """Insert a link behind the links of the same slot.

        Raises:
            PipelineError: the link does not do what its slot promises.
        """
        index = sum(each.origin.slot <= link.origin.slot for each in self.links)
        self._refuse_broken_promise(link, self.links[:index])
        tell_caches(link.target)
        self.links = (*self.links[:index], link, *self.links[index:])

    @torch.no_grad()
    def _refuse_broken_promise(self, link: Link, before: tuple[Link, ...]) -> None:
        """Run a link: a gradient hook has to be the identity, and only the sum over synapses may change the shape."""
        slot, value = link.origin.slot, self._run(before, self.stored)
        if not value.is_inference():
            value = value.detach().requires_grad_()
        for arg in link.args if slot is not Slot.INTERNEURONS else ():  # whose state is between other units
            shape = getattr(self, arg.key).shape if isinstance(arg, State) else ()
            if not broadcasts(shape, value.shape):
                raise _broken(
                    link,
                    f"its {arg.key} of shape {tuple(shape)} does not broadcast to the weight's {tuple(value.shape)}",
                )
        with torch.enable_grad():
            result = link.target(value, *self.arguments(link))
        if not isinstance(result, Tensor) or result.dtype is not value.dtype:
            found = getattr(result, "dtype", type(result).__name__)
            raise _broken(link, f"it returns {found} for a weight of {value.dtype}")
        if slot is not Slot.SUM and result.shape != value.shape:
            raise _broken(link, f"it changes the shape from {tuple(value.shape)} to {tuple(result.shape)}")
        if slot is Slot.HOOK and not (result.is_set_to(value) or _are_equal(result, value)):
            raise _broken(link, "it changes the weight, but a gradient hook may only change gradients")
        if value.requires_grad and not result.requires_grad:
            raise _broken(link, "what it returns has no gradient, so the weight would not learn")

    def keep(self, key: str, value: Tensor, by: str) -> None:
        """Add a tensor as state; one that is a parameter is trained, unless the stored tensor is frozen.

        Raises:
            PipelineError: the name is taken.
        """
        if hasattr(self, key):
            raise PipelineError(f"{by} cannot keep a state called {key} with a weight: the name is taken")
        placed = value.detach().to(self.stored.device).contiguous()
        if isinstance(value, nn.Parameter):
            self.register_parameter(key, nn.Parameter(placed, requires_grad=self.stored.requires_grad))
        else:
            self.register_buffer(key, placed)
        self.users[key] = (by,)

    def share(self, key: str, by: str, links: bool) -> Tensor | None:
        """Return the state `key` for one more pass, or None if there is no such state.

        Args:
            key: the state's name.
            by: the pass.
            links: whether the pass also shares the links that read the state.
        """
        if key not in self.users:
            return None
        self.users[key] = tuple(dict.fromkeys([*self.users[key], by]))
        if links:
            self.links = tuple(
                replace(link, origin=replace(link.origin, passes=self.users[key])) if State(key) in link.args else link
                for link in self.links
            )
        return self.state(key)

    def state(self, key: str) -> Tensor | None:
        """Return a state by its name, or None if there is none."""
        if key not in self.users:
            return None
        buffer = self._buffers.get(key)
        return getattr(self, key) if buffer is None else buffer

    def not_finite(self) -> str | None:
        """A state that is not finite, with the passes that keep it, in words; None if there is none."""
        for key, users in self.users.items():
            state = local(getattr(self, key)).detach()
            if state.is_floating_point() and not bool(state.isfinite().all()):
                return f"{key} of {', '.join(users)}"
        return None

    def _apply(self, fn: Callable[[Tensor], Any], recurse: bool = True) -> Any:
        def apply(tensor: Tensor) -> Any:
            # Each synapse is a weight of a 2-D convolution, which may become `channels_last`; five axes may not.
            if not self.is_split or tensor.dim() != 5 or is_sharded(tensor):
                return fn(tensor)
            return fn(tensor.flatten(0, 1)).unflatten(0, tensor.shape[:2])

        return super()._apply(apply, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        self.refuse_lost_writes()
        return vars(self) | {"_probes": (), "_known": None, "attached": False, "paused": ()}

    def _save_to_state_dict(self, *args: Any) -> None:
        self.refuse_lost_writes()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        given, own = state.get(f"{prefix}gain"), self.state("gain")
        if isinstance(given, Tensor) and own is not None and torch.uint8 in (given.dtype, own.dtype):
            state[f"{prefix}gain"] = coded(decoded(given), own.dtype)
        super()._load_from_state_dict(state, prefix, *args)
        self.paused = ()

    def named_modules(self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        """Yield the synapses once in a model, under the first name of their weight; see `torch.nn.Module`."""
        # `torch.func.functional_call` replaces what has two names twice, and restores what it found the second time.
        yield from super().named_modules(memo, prefix)  # not return: torch.compile leaves generators alone

    def pause(self, key: str, paused: bool) -> None:
        """Pause or resume the observers of a state."""
        if paused is not (key in self.paused):
            self.paused = (*self.paused, key) if paused else tuple(each for each in self.paused if each != key)

    def extra_repr(self) -> str:
        """The shape of the stored tensor, and the links."""
        steps = [f"stored {tuple(self.stored.shape)}", *(link.name for link in self.links)]
        return " → ".join(steps)


def is_observed(synapses: Synapses, key: str, of: Any) -> Any:
    """Whether the observers of a state are active: in training mode, unless paused. One node in the graph.

    Args:
        synapses: the synapses of the weight whose operator they observe.
        key: the state's name.
        of: the observed activity. A proxy means that a graph is traced again, so the call becomes a node again.
    """
    if not isinstance(of, fx.Proxy):
        return synapses.training and key not in synapses.paused
    read = of.tracer.create_proxy("get_attr", of.tracer.path_of_module(synapses), (), {})  # type: ignore[attr-defined]
    return of.tracer.create_proxy("call_function", is_observed, (read, key, of), {})


def observers_in(graph: fx.Graph) -> set[tuple[str, str]]:
    """The states in which observers of a graph accumulate: the path of the synapses, and the name of the state."""
    looks = graph.find_nodes(op="call_function", target=is_observed)
    return {(str(node.args[0].target), node.args[1]) for node in looks}


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of a shape broadcasts to another shape."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, other) for size, other in pairs)


def _broken(link: Link, what: str) -> PipelineError:
    return PipelineError(
        f"{link.origin.by}: {link.origin.parameter}: {link.name} cannot be a {link.origin.slot.label}: {what}"
    )


def child_of(owner: nn.Module, key: str) -> Synapses | None:
    """Return the synapses of a weight of a module, or None if it has none."""
    child = owner._modules.get(CHILD.format(key))
    return child if isinstance(child, Synapses) and owner._parameters.get(key) is None else None


def synapses_read_as(value: Any) -> Synapses | None:
    """Return the synapses of which a value is the weight, as `module.weight` returned it; None if there are none."""
    if isinstance(value, WeightTensor):
        return value.synapses  # type: ignore[no-any-return]
    found = _READ.get(id(value))
    return found if found is not None and found.stored is value else None


def has_synapses(owner: nn.Module) -> bool:
    """Whether a module has synapses, including those of a replaced weight."""
    return any(isinstance(child, Synapses) for child in owner._modules.values())


def replaced_weights(owner: nn.Module) -> Iterator[str]:
    """Names of a module's weights that have synapses, but were replaced, as by `torch.func.functional_call`."""
    for key, parameter in owner._parameters.items():
        if parameter is not None and isinstance(owner._modules.get(CHILD.format(key)), Synapses):
            yield key


def synapses_of(model: nn.Module, name: str) -> Synapses | None:
    """Return the synapses of a weight by its name in the original model, or None if it has none."""
    path, _, key = name.rpartition(".")
    owner = submodule(model, path)
    return None if owner is None else child_of(owner, key)


def stored(model: nn.Module, name: str) -> nn.Parameter:
    """Return the stored tensor of a parameter by its name in the original model.

    Raises:
        AttributeError: there is no such parameter.
    """
    found = _find_stored(model, name)
    if found is None:
        raise AttributeError(f"{type(model).__name__} has no parameter {name}")
    return found


def is_parameter(model: nn.Module, name: str) -> bool:
    """Whether there is a parameter of a name in the original model."""
    return _find_stored(model, name) is not None


def _find_stored(model: nn.Module, name: str) -> nn.Parameter | None:
    path, _, key = name.rpartition(".")
    owner = submodule(model, path)
    if owner is None:
        return None
    child = child_of(owner, key)
    return owner._parameters.get(key) if child is None else child.stored


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """A submodule; None if there is none. `get_submodule` takes longer, and each step looks up every weight."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module


def places_of(model: nn.Module, name: str) -> Iterator[Place]:
    """Where a parameter, or its synapses, are looked for by its name in the original model, and what is there."""
    path, _, key = name.rpartition(".")
    owner: nn.Module | None = model
    for part in path.split(".") if path else ():
        if owner is not None:
            yield Place(owner._modules, part, owner := owner._modules.get(part))
    if owner is not None:
        for container, own in ((owner._parameters, key), (owner._modules, CHILD.format(key))):
            yield Place(container, own, container.get(own))


def stored_name(model: nn.Module, name: str) -> str:
    """Return the name of a parameter's stored tensor; `name` is the parameter's name in the original model."""
    path, _, key = name.rpartition(".")
    child = synapses_of(model, name)
    return name if child is None else f"{path}.{CHILD.format(key)}.{child.stored_name}".lstrip(".")


def stored_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """All stored tensors with the names of their parameters in the original model, in its order.

    Args:
        model: a model, transformed or not.
        remove_duplicate: yield a tied parameter once, with its first name.
    """
    seen: set[int] = set()
    for path, owner in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(owner, Synapses):
            continue
        for key, registered in owner._parameters.items():
            child = child_of(owner, key) if registered is None else None
            parameter = registered if child is None else child.stored
            if parameter is not None and not (remove_duplicate and id(parameter) in seen):
                seen.add(id(parameter))
                yield f"{path}.{key}".lstrip("."), parameter


def synapses_in(model: nn.Module) -> dict[str, Synapses]:
    """All synapses by the name of their weight in the original model; tied weights by their first name."""
    found: dict[Synapses, str] = {}
    for path, owner in model.named_modules():
        for key in owner._parameters:
            child = child_of(owner, key)
            if child is not None:
                found.setdefault(child, f"{path}.{key}".lstrip("."))
    return {name: child for child, name in found.items()}
