"""Updates: what gains make of the change that an optimizer makes to weights, whatever optimizer that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from biofx.model.synapses import Synapses
from biofx.operators import factors_of, is_hook
from biofx.training.blocks import blocks

CLOSE = 0.1  # the relative distance from a weight below which what an optimizer remembers is a copy of the weight


class Update:
    r"""One step of an optimizer on weights with gains.

    A weight moves by gain times the distance that it would have moved without:

    $$w \leftarrow w_\mathrm{old} + c\,(w_\mathrm{new} - w_\mathrm{old})$$

    A connection of Γ synapses is to move as the plain connection would: the optimizer sees Γ·w and the connection's
    gradient, and the change is divided by Γ.

    Args:
        synapses: the synapses with gains.
        optimizer: the optimizer that holds them.
        with_copies: whether gains act as well on what the optimizer keeps of the weights themselves.
    """

    def __init__(self, synapses: Iterable[Synapses], optimizer: Optimizer, *, with_copies: bool = False) -> None:
        self._synapses = list(synapses)
        self._optimizer = optimizer
        self._with_copies = with_copies
        self._old: list[Tensor] = []
        self._copies: dict[tuple[int, str], Tensor] = {}  # by the place of the weight and the key in the state: before
        self._looked_at: set[tuple[int, str]] = set()
        self._is_open = False

    @property
    def _weights(self) -> list[Tensor]:
        return [synapses.stored for synapses in self._synapses]

    @torch.no_grad()
    def begin(self) -> None:
        """Take note of the weights, and show them to the optimizer as if each connection were one synapse."""
        weights = self._weights
        if [_kind(w) for w in weights] != [_kind(w) for w in self._old]:
            self._old = [torch.empty_like(w) for w in weights]
        if weights:
            torch._foreach_copy_(self._old, weights)
        self._scale_split(up=True)
        if self._with_copies:
            self._copies = {place: memory.clone() for place, memory in self._found()}
        self._is_open = True

    @torch.no_grad()
    def _scale_split(self, *, up: bool) -> None:
        split = [synapses for synapses in self._synapses if synapses.shares > 1]
        if split:
            scale = torch._foreach_mul_ if up else torch._foreach_div_
            scale([synapses.stored for synapses in split], [float(synapses.shares) for synapses in split])

    def pause(self) -> None:
        """Put the weights back while a closure runs the model."""
        self._scale_split(up=False)

    def resume(self) -> None:
        """Show them to the optimizer again."""
        self._scale_split(up=True)

    @torch.no_grad()
    def undo(self) -> None:
        """Put everything back, as the optimizer failed."""
        if self._is_open:
            self._is_open = False
            for weight, old in zip(self._weights, self._old, strict=True):
                weight.copy_(old)

    @torch.no_grad()
    def end(self, taking_part: Sequence[bool]) -> None:
        """Let gains act on what the optimizer did.

        Args:
            taking_part: for each weight, whether it has a gradient.
        """
        self._is_open = False
        gains = factors(self._synapses, self._old)
        whole: list[tuple[Tensor, ...]] = []
        split: list[tuple[Tensor, ...]] = []
        for synapses, old, gain, takes_part in zip(self._synapses, self._old, gains, taking_part, strict=True):
            own = gain.to(old.dtype) if takes_part and gain is not None else None
            if synapses.shares > 1:
                one, shares = old.new_ones(()), old.new_tensor(float(synapses.shares))
                split.append((synapses.stored, old, one if own is None else own, shares))
            elif own is not None:
                whole.append((synapses.stored, old, own))
        if self._with_copies:
            self._move_copies(gains, taking_part)
        for weights, olds, factor in blocks(*zip(*whole, strict=True)):
            torch._foreach_lerp_(olds, weights, factor)  # a gain of 1 is exact to the bit
            torch._foreach_copy_(weights, olds)
        for weights, olds, factor, numbers in blocks(*zip(*split, strict=True)):
            torch._foreach_sub_(weights, torch._foreach_mul(olds, numbers))
            torch._foreach_mul_(weights, factor)
            torch._foreach_div_(weights, numbers)
            torch._foreach_add_(weights, olds)

    def copied(self) -> str | None:
        """The key in the optimizer's state under which it keeps a copy of a weight, or None."""
        return next((key for (_, key), _ in self._found()), None)

    def _found(self) -> Iterator[tuple[tuple[int, str], Tensor]]:
        """What the optimizer keeps of the weights themselves."""
        for index, synapses in enumerate(self._synapses):
            state: dict[str, Any] = self._optimizer.state.get(synapses.stored, {})
            for key, memory in state.items():
                is_alike = isinstance(memory, Tensor) and memory.shape == synapses.stored.shape
                if not is_alike or not memory.is_floating_point():
                    continue
                place = index, key
                if place not in self._copies and place not in self._looked_at and _is_close(memory, synapses.stored):
                    self._copies[place] = self._old[index] * synapses.shares
                self._looked_at.add(place)
                if place in self._copies:
                    yield place, memory

    def _move_copies(self, gains: Sequence[Tensor | None], taking_part: Sequence[bool]) -> None:
        for (index, key), memory in [*self._found()]:
            gain = gains[index]
            if gain is not None and taking_part[index]:
                before = self._copies[index, key].to(memory)
                memory.copy_(before + gain.to(memory) * (memory - before))


def factors(synapses: Sequence[Synapses], weights: Sequence[Tensor]) -> list[Tensor | None]:
    """The factor on the learning of every synapse, for each weight; None for one without gains.

    Args:
        synapses: the synapses of the weights.
        weights: what they store, or stored when the change was computed.
    """
    result: list[Tensor | None] = [None] * len(weights)
    rounds: dict[tuple[Any, int], list[tuple[int, tuple[Any, ...]]]] = {}  # all hooks of a kind at once
    for index, each in enumerate(synapses):
        count: Counter[Any] = Counter()
        for link in each.links:
            if is_hook(link.target) and link.target is not torch.ops.biofx.share_grad:
                rounds.setdefault((link.target, count[link.target]), []).append((index, tuple(each.arguments(link))))
                count[link.target] += 1
    for (target, _), found in rounds.items():
        own = factors_of(target, [weights[index] for index, _ in found], [arguments for _, arguments in found])
        for (index, _), factor in zip(found, own, strict=True):
            before = result[index]
            result[index] = factor if before is None else before * factor
    return result


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def _is_close(memory: Tensor, weight: Tensor) -> bool:
    size = torch.linalg.vector_norm(weight.detach().float())
    return bool(torch.linalg.vector_norm(memory.float() - weight.detach().float()) < CLOSE * size)
