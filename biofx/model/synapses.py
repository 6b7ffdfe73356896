"""Synapses: what a weight is made of. THE idea of biofx.

    stored [Γ, *shape] → gradient hooks → sign constraint → sum over synapses → the weight

A module whose weight has synapses has a child for it, which holds the stored tensor, the links of this chain and their
state. The module's attribute is the weight at the end of the chain, whoever reads it: a graph, Python, a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from biofx.base.errors import PipelineError
from biofx.base.gains import coded, decoded
from biofx.model import running
from biofx.model.handed_out import Change, handed_out
from biofx.model.operators import operator_of, tell_caches, written_name
from biofx.model.slots import Inserted, Slot

CHILD = "{}_synapses"  # name of the child, by the name of the weight in its module


@dataclass(frozen=True)
class State:
    """An argument of a link: a tensor that is kept with the weight.

    Attributes:
        key: its name.
    """

    key: str


@dataclass(frozen=True)
class Link:
    """One step of the way from what is stored to the weight: `target(weight, *args)`.

    Attributes:
        target: a dispatcher operator or a PyTorch function.
        args: constants and state.
        origin: who inserted it.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    origin: Inserted

    @property
    def name(self) -> str:
        """The target's name."""
        name = getattr(self.target, "_qualified_op_name", getattr(self.target, "__name__", self.target))
        return written_name(str(name)).replace("::", ".")

    def __reduce__(self) -> tuple[Any, ...]:
        name = getattr(self.target, "_qualified_op_name", None)  # of a dispatcher operator, which is not pickled itself
        return _link, (self.target if name is None else str(name), self.args, self.origin)

    def __deepcopy__(self, memo: dict[int, Any]) -> Link:
        return self  # the copy of a model runs what the model runs; one that was pickled, what a name means then


def _link(target: Any, args: tuple[Any, ...], origin: Inserted) -> Link:
    if isinstance(target, str):
        namespace, _, name = target.partition("::")
        target = operator_of(name) if namespace == "biofx" else getattr(getattr(torch.ops, namespace), name)
        tell_caches(target)
    return Link(target, args, origin)


class Synapses(nn.Module):
    """The synapses of one weight; its buffers are their state.

    Args:
        key: the weight's name in its module, which is the name of the stored tensor here.
        stored: the stored tensor, shape (Γ, *shape) if there are Γ synapses for each connection, else just shape.

    Attributes:
        links: the steps from what is stored to the weight, in order.
        attached: whether rules act at the steps of an optimizer. Then gradient hooks sleep, and so does a projection on
            signs, as every step leaves weights behind that have them. A copy is not attached.
        by_hand: whether rules are called by hand, so that hooks sleep.
        resting: the states to which observers add nothing now, by name, as their rule does not act at the next step. A
            copy knows of none, and neither does what loads a checkpoint, as its next step is another.
        users: the names of the passes that use each state, by its name.
        rewired: the pass that changes what the operator of the weight returns, which only the graph does; else empty.
    """

    def __init__(self, key: str, stored: nn.Parameter) -> None:
        super().__init__()
        self.links: tuple[Link, ...] = ()
        self.attached = False
        self.by_hand = False
        self.resting: tuple[str, ...] = ()  # a constant for torch.compile, which keeps one graph for each
        self.users: dict[str, tuple[str, ...]] = {}
        self.rewired = ""
        self._change: Change | None = None
        # An attribute of a module, such as `forward`, cannot be a parameter's name.
        self._key = f"{key}_" if hasattr(self, key) else key
        self.register_parameter(self._key, stored)

    @property
    def stored(self) -> nn.Parameter:
        """The stored tensor."""
        return getattr(self, self._key)  # type: ignore[no-any-return]  # replicas of data parallelism keep a plain one

    @property
    def stored_name(self) -> str:
        """The name of the stored tensor in this module."""
        return self._key

    @property
    def is_computed(self) -> bool:
        """Whether the weight is computed from what is stored, and not the same numbers."""
        return any(link.origin.slot > Slot.HOOK for link in self.links)

    @property
    def is_split(self) -> bool:
        """Whether there is a leading axis of synapses."""
        return any(link.origin.slot is Slot.SUM for link in self.links)

    @property
    def shares(self) -> int:
        """The number of synapses of a connection that together learn as fast as the connection would."""
        return next((round(1 / link.args[0]) for link in self.links if link.target is torch.ops.biofx.share_grad), 1)

    @property
    def acting(self) -> tuple[Link, ...]:
        """The links that act now, in order.

        While hooks sleep, each of Γ synapses gets 1/√Γ of the gradient of its connection, so that all of them together
        have the norm of that gradient.
        """
        if not self.attached:
            return tuple(link for link in self.links if not self.by_hand or link.origin.slot is not Slot.HOOK)
        return tuple(
            replace(link, args=(link.args[0] ** 0.5,)) if link.target is torch.ops.biofx.share_grad else link
            for link in self.links
            if link.origin.slot is not Slot.HOOK and link.target is not torch.ops.biofx.project_sign
        )

    def forward(self, *, until: Slot = Slot.SUM, stored: Tensor | None = None) -> Tensor:
        """Compute the weight, or what it is after the links up to a slot; differentiable in what is stored.

        Args:
            until: the last slot.
            stored: what is stored; None: what is stored here.
        """
        return self._run([link for link in self.acting if link.origin.slot <= until], stored)

    def _run(self, links: Iterable[Link], stored: Tensor | None) -> Tensor:
        value: Tensor = self.stored if stored is None else stored
        for link in links:
            value = link.target(value, *self.arguments(link))
        return value

    def arguments(self, link: Link) -> list[Any]:
        """The arguments of a link beside the weight, as they are now."""
        return [getattr(self, arg.key) if isinstance(arg, State) else arg for arg in link.args]

    def read(self) -> Tensor:
        """The weight, as the attribute of its module.

        It is computed once in the outermost forward that runs. If it is the same numbers as what is stored, what is
        written into it takes effect; else it refuses to be written.

        Raises:
            ArgumentError: the weight that was read last was changed, and that change is lost.
        """
        if torch.compiler.is_compiling():
            return self.forward()
        given = running.given(self)
        if given is not None:
            return given
        self.refuse_lost_change()
        if not self.acting or not (self.is_computed or torch.is_grad_enabled()):
            return self.stored
        return running.once(self, self.stored, self._hand_out)

    def _hand_out(self) -> Tensor:
        weight = handed_out(self.forward(), self)
        if self.is_computed:
            self._change = Change.of(weight)
        return weight

    def refuse_lost_change(self) -> None:
        """Refuse that somebody has written into a weight that is computed, by a way that it could not refuse itself.

        Raises:
            ArgumentError: somebody has.
        """
        change = self._change
        if change is not None:
            self._change = None  # said once
            change.refuse()
            self._change = change

    def insert(self, link: Link) -> None:
        """Put a link at the place of its slot, behind what is there already.

        Raises:
            PipelineError: the link does not do what its slot promises.
        """
        index = sum(each.origin.slot <= link.origin.slot for each in self.links)
        self._refuse_broken_promise(link, self.links[:index])
        tell_caches(link.target)
        self.links = (*self.links[:index], link, *self.links[index:])

    @torch.no_grad()
    def _refuse_broken_promise(self, link: Link, before: tuple[Link, ...]) -> None:
        """Run a link, to see whether a hook is the identity, and whether a sign constraint keeps the shape."""
        slot, value = link.origin.slot, self._run(before, self.stored)
        for arg in link.args:
            shape = getattr(self, arg.key).shape if isinstance(arg, State) else ()
            if len(shape) > value.dim() or any(
                n not in (1, m) for n, m in zip(shape[::-1], value.shape[::-1], strict=False)
            ):
                raise _broken(link, f"its {arg.key} has shape {tuple(shape)}, and the weight {tuple(value.shape)}")
        result = link.target(value, *self.arguments(link))
        if slot <= Slot.SIGN and result.shape != value.shape:
            raise _broken(link, f"it makes shape {tuple(result.shape)} of {tuple(value.shape)}")
        if slot is Slot.HOOK and not (result.is_set_to(value) or _are_equal(result, value)):
            raise _broken(link, "it changes the weight, and a gradient hook changes gradients alone")

    def keep(self, key: str, value: Tensor, by: str) -> None:
        """Keep a tensor as state.

        Raises:
            PipelineError: there is something of that name.
        """
        if hasattr(self, key):
            raise PipelineError(f"{by} keeps its {key} with a weight, but there is something of that name")
        self.register_buffer(key, value.to(self.stored.device).contiguous())
        self.users[key] = (by,)

    def share(self, key: str, by: str, links: bool) -> Tensor | None:
        """State that several passes use, or None: note that one more does, and that it shares the links on it."""
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
        """State by its name, or None."""
        return getattr(self, key) if key in self.users else None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_change": None, "attached": False, "resting": ()}

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:  # PyTorch's way to load
        given, own = state.get(f"{prefix}gain"), self.state("gain")
        if isinstance(given, Tensor) and own is not None and torch.uint8 in (given.dtype, own.dtype):
            state[f"{prefix}gain"] = coded(decoded(given), own.dtype)
        super()._load_from_state_dict(state, prefix, *args)
        self.resting = ()

    def rest(self, key: str, resting: bool) -> None:
        """Let the observers of a state look at what the weight's operator returns, or not."""
        if resting is not (key in self.resting):
            self.resting = (*self.resting, key) if resting else tuple(each for each in self.resting if each != key)

    def extra_repr(self) -> str:
        """The shape of what is stored, and the links."""
        steps = [f"stored {tuple(self.stored.shape)}", *(link.name for link in self.links)]
        return " → ".join(steps)


def is_observed(synapses: Synapses, key: str, of: Any) -> Any:
    """Whether the observers of a state look now: in training mode, unless they rest; one node in the graph.

    Args:
        synapses: the synapses of the weight whose operator they look at.
        key: the state's name.
        of: what they look at: under a tracer, a proxy.
    """
    if not isinstance(of, fx.Proxy):
        return synapses.training and key not in synapses.resting
    read = of.tracer.create_proxy("get_attr", of.tracer.path_of_module(synapses), (), {})  # type: ignore[attr-defined]
    return of.tracer.create_proxy("call_function", is_observed, (read, key, of), {})


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _broken(link: Link, what: str) -> PipelineError:
    return PipelineError(
        f"{link.origin.by}: {link.origin.parameter}: {link.name} cannot be a {link.origin.slot.label}: {what}"
    )


def child_of(owner: nn.Module, key: str) -> Synapses | None:
    """The synapses of a weight of a module, or None if it has none."""
    child = owner._modules.get(CHILD.format(key))
    return child if isinstance(child, Synapses) and owner._parameters.get(key) is None else None


def has_synapses(owner: nn.Module) -> bool:
    """Whether a module has weights with synapses, which somebody may have replaced."""
    return any(isinstance(child, Synapses) for child in owner._modules.values())


def replaced_weights(owner: nn.Module) -> Iterator[str]:
    """The names of weights of a module in whose place there is a tensor, although they have synapses."""
    for key, parameter in owner._parameters.items():
        if parameter is not None and isinstance(owner._modules.get(CHILD.format(key)), Synapses):
            yield key


def synapses_of(model: nn.Module, name: str) -> Synapses | None:
    """The synapses of a weight, by its name in the original model, or None if it has none."""
    path, _, key = name.rpartition(".")
    try:
        return child_of(model.get_submodule(path), key)
    except AttributeError:
        return None


def stored(model: nn.Module, name: str) -> nn.Parameter:
    """The stored tensor of a parameter, by its name in the original model.

    Raises:
        AttributeError: there is no such parameter.
    """
    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    child, parameter = child_of(owner, key), owner._parameters.get(key)
    if child is not None:
        return child.stored
    if parameter is None:
        raise AttributeError(f"{type(owner).__name__} has no parameter {key}")
    return parameter


def stored_name(model: nn.Module, name: str) -> str:
    """The name of the stored tensor of a parameter, by its name in the original model."""
    path, _, key = name.rpartition(".")
    child = synapses_of(model, name)
    return name if child is None else f"{path}.{CHILD.format(key)}.{child.stored_name}".lstrip(".")


def stored_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """All stored tensors, by the names that their parameters have in the original model, and in its order.

    Args:
        model: a model, transformed or not.
        remove_duplicate: list each once, by its first name.
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
    """All synapses, by the name of their weight in the original model; the first one, if it is tied."""
    found: dict[Synapses, str] = {}
    for path, owner in model.named_modules():
        for key in owner._parameters:
            child = child_of(owner, key)
            if child is not None:
                found.setdefault(child, f"{path}.{key}".lstrip("."))
    return {name: child for child, name in found.items()}
