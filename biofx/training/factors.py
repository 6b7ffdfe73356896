"""Learning factors: the products of the gradient hooks of many weights, in few operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biofx.base.shards import Shard, is_sharded, local
from biofx.model.definitions import name_of
from biofx.model.gradient_hooks import counter_of, draw_noise, factors_of, is_hook
from biofx.training.blocks import Place

if TYPE_CHECKING:
    from biofx.base.noise import Counter
    from biofx.model.synapses import Synapses


@dataclass(frozen=True)
class Hook:
    """A gradient hook, without what differs from weight to weight.

    Attributes:
        name: its name.
        others: the other arguments of its rule, without weight and noise; None stands for a tensor of the weight's own.
        drawn_from: what its noise is drawn from in addition to the counter; None if its rule takes no noise.
    """

    name: str
    others: tuple[Any, ...]
    drawn_from: tuple[Any, ...] | None = None

    @property
    def is_noisy(self) -> bool:
        """Whether its rule takes noise."""
        return self.drawn_from is not None


@dataclass(frozen=True)
class WeightHooks:
    """The gradient hooks of a weight.

    Attributes:
        hooks: the hooks, in order.
        tensors: the tensors that stand for None in their arguments.
        counters: the counters of the noisy ones.
    """

    hooks: tuple[Hook, ...]
    tensors: tuple[Tensor, ...]
    counters: tuple[Counter, ...]


NO_HOOKS = WeightHooks((), (), ())


def hooks_of(synapses: Synapses, shard: Shard) -> WeightHooks:
    """The gradient hooks of the part of a weight, except for the share of each of several synapses."""
    hooks: list[Hook] = []
    tensors: list[Tensor] = []
    counters: list[Counter] = []
    for link in synapses.links:
        if not is_hook(link.target) or link.target is torch.ops.biofx.share_grad:
            continue
        counter, drawn_from, others = counter_of(link.target, synapses.arguments(link))
        if counter is not None:
            counters.append(shard.counter(counter))
        tensors.extend(local(x) if is_sharded(x) else shard.part(x) for x in others if isinstance(x, Tensor))
        own = tuple(None if isinstance(x, Tensor) else x for x in others)
        hooks.append(Hook(name_of(link.target), own, None if counter is None else drawn_from))
    return WeightHooks(tuple(hooks), tuple(tensors), tuple(counters))


def alike(members: Sequence[WeightHooks]) -> list[WeightHooks]:
    """The same, where equal hooks of several weights are one object, so that they are told apart by it."""
    known: dict[tuple[Hook, ...], tuple[Hook, ...]] = {}
    return [replace(each, hooks=known.setdefault(each.hooks, each.hooks)) for each in members]


def draw(
    likes: Sequence[Tensor], places: Sequence[Place], members: Sequence[WeightHooks], *, compiled: bool = False
) -> list[list[Tensor]]:
    """The noise of parts of weights, a list for each noisy hook.

    Args:
        likes: the parts.
        places: where they come from.
        members: the hooks of all weights, which have the same ones.
        compiled: whether to compile what is computed.
    """
    return [
        draw_noise(
            hook.name,
            likes,
            [members[place.index].counters[which].at(place.start) for place in places],
            hook.drawn_from or (),
            compiled=compiled,
        )
        for which, hook in enumerate(hook for hook in members[0].hooks if hook.is_noisy)
    ]


def combined(
    hooks: Sequence[Hook], weights: list[Tensor], others: Sequence[list[Tensor]], *, one_by_one: bool = False
) -> list[Tensor]:
    """The product of the factors of all hooks, for weights that have the same ones.

    Args:
        hooks: the hooks; at least one.
        weights: the weights, or parts of them.
        others: the tensors that stand for None in their arguments, a list for each, and then the noise of the noisy
            ones, a list for each.
        one_by_one: whether to call the rule of each hook for one weight after the other.
    """
    own, noises = iter(others), iter(others[sum(x is None for hook in hooks for x in hook.others) :])
    result: list[Tensor] = []
    for hook in hooks:
        arguments: list[Any] = [next(noises)] if hook.is_noisy else []
        arguments += [next(own) if x is None else x for x in hook.others]
        given = factors_of(hook.name, weights, arguments, one_by_one=one_by_one)
        factors = [x if x.dtype is w.dtype else x.to(w.dtype) for x, w in zip(given, weights, strict=True)]
        result = list(torch._foreach_mul(result, factors)) if result else factors
    return result


def factors(synapses: Sequence[Synapses], shards: Sequence[Shard], weights: Sequence[Tensor]) -> list[Tensor | None]:
    """The factor on the learning of every synapse, for each weight; None for one without hooks.

    Args:
        synapses: the synapses of the weights.
        shards: the part of each that this process holds.
        weights: what they store, or stored when the change was computed.
    """
    result: list[Tensor | None] = []
    for each, shard, weight in zip(synapses, shards, weights, strict=True):
        own = hooks_of(each, shard)
        drawn = draw([weight], [Place(0, 0)], [own])
        tensors = [[x] for x in own.tensors]
        result.append(combined(own.hooks, [weight], [*tensors, *drawn])[0] if own.hooks else None)
    return result
