"""A weight as a rule sees it at `optimizer.step()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from biofx.base import randomness
from biofx.base.errors import ArgumentError, LifecycleError
from biofx.base.noise import Counter
from biofx.base.shards import Shard, local
from biofx.model.slots import Slot
from biofx.signs.constraints import constraint_of, sign_of_stored
from biofx.training.wrappers import CLOSE, memory_of

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.model.synapses import Synapses

# Options from which an optimizer starts what it remembers; momentum and moments, which are not here, start from 0.
_STARTS_FROM = {"sum": "initial_accumulator_value", "step_size": "lr"}  # of Adagrad and Rprop


@dataclass(eq=False)
class PlasticWeight:
    """A weight at one step of its optimizer.

    If processes hold shards of the weight (FSDP), this is the part of this process, and so are all tensors that have a
    number for each synapse. State of another shape is whole on every rank.

    Attributes:
        site: the weight site.
        raw: the stored parameter; of a shard, its local tensor.
        gradient: its gradient as the optimizer sees it; a rule at `Moment.GRADIENT` may change it in place.
        optimizer: the optimizer that holds it; None if rules are called by hand.
        step: number of this step, counted from 1.
        by: name of the pass that acts on the weight.
        compiled: whether to compile what a rule does to entries.
        finite: whether gradients and weights are finite, on a device that is not waited for; else None.
        stored_before: what `raw` was before the step, for rules at `Moment.UPDATE`; else None.
        group: the optimizer's options for the weight; empty if rules are called by hand.
        is_frozen: whether it does not require a gradient, and the optimizer moves it by an old one.
    """

    site: WeightSite
    raw: Tensor
    gradient: Tensor
    optimizer: torch.optim.Optimizer | None
    step: int
    by: str = ""
    compiled: bool = False
    finite: Tensor | None = None
    stored_before: Tensor | None = None
    group: dict[str, Any] = field(default_factory=dict)
    is_frozen: bool = False

    @property
    def name(self) -> str:
        """The weight's name in the original model."""
        return self.site.name

    @property
    def synapses(self) -> Synapses:
        """What holds the stored parameter, its links and their state."""
        return self.site.known_synapses

    def seen_by(self, rule: str, finite: Tensor | None, before: Tensor | None) -> PlasticWeight:
        """The same weight for a rule.

        Args:
            rule: the name of the pass.
            finite: whether gradients and weights are finite, on a device that is not waited for; else None.
            before: what `raw` was before the step, if the rule needs it.
        """
        own = self.site, self.raw, self.gradient, self.optimizer, self.step  # `dataclasses.replace` is slow
        return PlasticWeight(*own, rule, self.compiled, finite, before, self.group, self.is_frozen)

    @property
    def shard(self) -> Shard:
        """Which part of the weight this process holds."""
        return self.site.shard

    @property
    def size(self) -> int:
        """The number of synapses, in all parts."""
        return self.site.raw.numel()

    def state(self, key: str) -> Tensor:
        """A tensor that the pass keeps for the weight.

        Raises:
            ArgumentError: there is no such state.
        """
        value = self.synapses.state(key)
        if value is None:
            known = ", ".join(self.synapses.users) or "none"
            raise ArgumentError(f"{self.by}: {self.name} has no state {key!r}; its states are {known}")
        return local(value)

    @property
    def old(self) -> Tensor:
        """What `raw` was before the step of the optimizer; at `Moment.UPDATE`.

        Raises:
            ArgumentError: the rule acts at another moment.
        """
        if self.stored_before is None:
            raise ArgumentError(
                f"{self.by}: {self.name}: old weights are kept only for a rule with moment = passes.Moment.UPDATE"
            )
        return self.stored_before

    def part(self, values: Tensor) -> Tensor:
        """The part of this process, as a view, of values that broadcast to the whole weight."""
        return self.shard.part(values)

    def observed(self, key: str) -> Tensor:
        """What an observer saw since the last call: its mean for each unit, 0 if it saw nothing.

        Args:
            key: the name of its state (see `Editor.observe`), which starts from 0 again.

        Raises:
            ArgumentError: no observer adds to a state of that name.

        Example:
            >>> import biofx, torch
            >>> from dataclasses import dataclass
            >>> from biofx import passes
            >>> @dataclass(frozen=True)
            ... class Look(passes.Pass):
            ...     name = "look"
            ...     slot = passes.Slot.OBSERVER
            ...     moment = passes.Moment.GAIN
            ...
            ...     def rewrite(self, site, edit):
            ...         edit.observe_input(torch.ops.biofx.sum_activity, site, "seen")
            ...
            ...     def at_step(self, weights):
            ...         for weight in weights:
            ...             print(weight.observed("seen"))
            >>> bio = biofx.transform(torch.nn.Linear(2, 1), [Look()])
            >>> attachment = biofx.attach(bio, torch.optim.SGD(bio.parameters(), lr=0.0))
            >>> bio(torch.tensor([[1.0, -2.0], [3.0, 0.0]])).sum().backward()
            >>> attachment.optimizer.step()
            tensor([2., 1.])
        """
        state = self.state(key)
        if state.dim() != 3 or state.shape[:2] != (2, 2):
            raise ArgumentError(f"{self.by}: {self.name}: no observer adds to {key!r}; weight.state reads other state")
        sums, positions = state.sum(0)
        state.zero_()
        mean: Tensor = sums / positions.clamp(min=1)
        return mean

    def own_state(self) -> list[Tensor]:
        """Everything that the pass keeps for the weight."""
        return [self.state(key) for key, users in self.synapses.users.items() if self.by in users]

    @property
    def sign(self) -> Tensor | None:
        """Sign of the unit behind every synapse, as `WeightSite.sign`."""
        sign = self.synapses.state("sign")
        return None if sign is None else self.part(sign)

    @cached_property
    def _values(self) -> Tensor:
        """What is stored, without its history."""
        return self.raw.detach()

    @property
    def value(self) -> Tensor:
        """Weight of every synapse, in the shape of `raw`: the stored one under its sign constraint, or that itself."""
        value = self._values
        for link in self.synapses.active_links:
            if link.origin.slot is Slot.SIGN:
                arguments = (self.part(x) if isinstance(x, Tensor) else x for x in self.synapses.arguments(link))
                value = link.target(value, *arguments)
        return value

    @property
    def stores_magnitude(self) -> bool:
        """Whether a synapse has the magnitude of what is stored for it."""
        constraint = constraint_of(self.site)
        return constraint is None or constraint.slope is sign_of_stored

    @property
    def slope(self) -> Tensor:
        """Derivative of every synapse's magnitude with respect to what is stored for it."""
        raw, constraint, sign = self.raw.detach(), constraint_of(self.site), self.sign
        return raw.sign() if constraint is None or sign is None else constraint.slope(raw, sign)

    def by_unit(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Sums of several values of synapses over the incoming synapses of each postsynaptic unit in this part."""
        units = self.site.units
        unit = self.part(self.site.spread(torch.arange(units, device=values[0].device)))
        outer = values[0].dim() - unit.dim()
        alike = [*range(outer), *(outer + axis for axis, length in enumerate(unit.shape) if length == 1)]
        rows = [each.sum(alike, keepdim=True) if alike else each for each in values]
        if unit.numel() == units and not self.shard.cuts:  # the rows are those of all units in order
            return [each.reshape(-1) for each in rows]
        places = unit.expand(rows[0].shape).reshape(-1)
        return [each.new_zeros(units).index_add_(0, places, each.reshape(-1)) for each in rows]

    def assign(self, value: Tensor) -> None:
        """Store weights, one for every synapse; those with another sign than their unit become zero."""
        constraint, sign = constraint_of(self.site), self.sign
        self.raw.copy_(value if constraint is None or sign is None else constraint.store(value, sign))

    def without_padding(self, values: Tensor) -> Tensor:
        """Values for every synapse, in place set to 0 in the row of an embedding that stands for no token."""
        padding = None if self.site.padding is None else self.shard.index(-2, self.site.padding)
        if padding is not None:
            values[..., padding, :] = 0
        return values

    def counter(self, purpose: str) -> Counter:
        """The counter of noise for every synapse: the seed, the step, the pass, the weight's name.

        Args:
            purpose: what it is for; for each of them it is independent.
        """
        return self.shard.counter(Counter(self.state("seed"), self.state("steps"), (self.by, self.name, purpose)))

    def generator(self) -> torch.Generator:
        """A CPU generator that follows from the same as `counter`; it waits for the device."""
        return randomness.generator(int(self.state("seed")), self.by, self.name, self.step)

    def replace(self, mask: Tensor, values: Tensor) -> None:
        """Store new weights where a mask is True, and reset what the optimizer remembers of them.

        Args:
            mask: bool, of the shape of `raw`.
            values: weights, of the shape of `raw`; those where the mask is False are ignored.

        Example:
            >>> import biofx, torch
            >>> from dataclasses import dataclass
            >>> from biofx import passes
            >>> @dataclass(frozen=True)
            ... class Prune(passes.Pass):
            ...     name = "prune"
            ...     slot = passes.Slot.HOOK
            ...     moment = passes.Moment.TURNOVER
            ...
            ...     def rewrite(self, site, edit):
            ...         pass
            ...
            ...     def at_step(self, weights):
            ...         for weight in weights:
            ...             weight.replace(weight.value.abs() < 0.1, torch.zeros_like(weight.value))
            >>> bio = biofx.transform(torch.nn.Linear(50, 50), [Prune()])
            >>> attachment = biofx.attach(bio, torch.optim.SGD(bio.parameters(), lr=0.0))
            >>> bio(torch.ones(1, 50)).sum().backward()
            >>> attachment.optimizer.step()
            >>> bool((bio.weight == 0).any())
            True
        """
        constraint, sign = constraint_of(self.site), self.sign
        values = values if constraint is None or sign is None else constraint.store(values, sign)
        self.raw.copy_(torch.where(mask, values.to(self.raw), self.raw))
        self.forget(mask)

    def forget(self, mask: Tensor) -> None:
        """Reset what the optimizer remembers of some synapses, as if they were new.

        Args:
            mask: bool, of the shape of `raw`.
        """
        own = mask if self.finite is None else mask & self.finite
        forget(self.optimizer, self.site.raw, own, self.memories, shares=self.synapses.shares)

    def check_can_forget(self) -> None:
        """Refuse optimizer state whose neutral value is not known, such as codes.

        Raises:
            LifecycleError: the optimizer remembers a synapse as whole numbers, which need not stand for themselves.
        """
        for key, memory in self.memories.items():
            if not memory.is_floating_point() and memory.dtype is not torch.bool:
                raise LifecycleError(
                    f"{self.name}: {type(self.optimizer).__name__} remembers {key!r} of every synapse in a code "
                    f"({memory.dtype}), so {self.by} cannot let it forget the synapses that are replaced; use an "
                    "optimizer whose state is in floating point"
                )

    @cached_property
    def memories(self) -> dict[str, Tensor]:
        """What the optimizer remembers of every synapse, by its key."""
        return memories_of(self.optimizer, self.site.raw)


def forget(
    optimizer: torch.optim.Optimizer | None,
    parameter: nn.Parameter,
    mask: Tensor,
    memories: Mapping[str, Tensor],
    *,
    shares: int = 1,
) -> None:
    """Reset what an optimizer remembers of some entries of a parameter, as if they were new.

    Args:
        optimizer: the optimizer.
        parameter: the parameter, with the new values.
        mask: bool, of the shape of the parameter, or of this process's part of it.
        memories: what it remembers, by its key (`memories_of`).
        shares: Γ, by which the optimizer sees the parameter multiplied.
    """
    for key, memory in memories.items():
        option = _STARTS_FROM.get(key)
        initial = 0.0 if option is None else _group(optimizer, parameter).get(option, 0.0)
        if key == "ax":  # ASGD: average of the weight
            memory.copy_(torch.where(mask, local(parameter).detach() * shares, memory))
        elif type(optimizer).__module__.startswith("torch.optim") or memory.dtype is torch.bool:
            memory.masked_fill_(mask, initial)
        else:
            value = memory if type(memory).dequantize is Tensor.dequantize else memory.dequantize()
            seen = local(parameter).detach() * shares
            memory.copy_(torch.where(mask, _like_new(seen, value, mask, initial), value))


def _like_new(raw: Tensor, memory: Tensor, replaced: Tensor, initial: float) -> Tensor:
    """What an optimizer remembers of new entries: the weight, if it keeps a copy of it, else the initial value."""
    raw, others = raw.to(memory), ~replaced
    distance, size = ((x * others).norm() for x in (memory - raw, raw))
    return torch.where(distance < CLOSE * size, raw, initial)


def _group(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> dict[str, Any]:
    """The optimizer's options for a parameter."""
    groups = [] if optimizer is None else optimizer.param_groups
    return next((group for group in groups if any(p is parameter for p in group["params"])), {})


def memories_of(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What an optimizer remembers of every entry of a parameter, by its key."""
    state = {} if optimizer is None else memory_of(optimizer, parameter)
    own = [(key, local(memory)) for key, memory in state.items() if isinstance(memory, Tensor)]
    shape = local(parameter).shape
    return {key: memory for key, memory in own if memory.shape == shape}
