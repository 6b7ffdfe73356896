"""Updates: gains scale the change that an optimizer makes to weights, whichever optimizer that is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from biofx.base.shards import local, shard_of
from biofx.training import blocks, compiling
from biofx.training.factors import Hook, Learning, combined, draw, factors, learning_of
from biofx.training.finite import taken_back
from biofx.training.wrappers import CLOSE, memory_of

if TYPE_CHECKING:
    from biofx.model.synapses import Synapses


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
        compiled: whether to compile what gains do.
    """

    def __init__(
        self, synapses: Iterable[Synapses], optimizer: Optimizer, *, with_copies: bool = False, compiled: bool = False
    ) -> None:
        self._synapses = list(synapses)
        self._shards = [shard_of(each.stored_name, each.stored) for each in self._synapses]
        self._optimizer = optimizer
        self._with_copies = with_copies
        self._compiled = compiled
        self._old: list[Tensor] = []
        self._copies: dict[tuple[int, str], Tensor] = {}  # by the place of the weight and the key in the state: before
        self._looked_at: set[tuple[int, str]] = set()
        self._is_open = False

    @property
    def _weights(self) -> list[Tensor]:
        return [local(synapses.stored) for synapses in self._synapses]

    @torch.no_grad()
    def begin(self) -> None:
        """Save the weights, and show them to the optimizer as if each connection were one synapse."""
        weights = self._weights
        if [_kind(w) for w in weights] != [_kind(w) for w in self._old]:
            self._old = [torch.empty_like(w) for w in weights]  # kept, so that no step has to allocate memory
        if weights:
            torch._foreach_copy_(self._old, weights)
        self._scale_split(up=True)
        if self._with_copies:
            self._copies = {place: memory.clone() for place, memory in self._found()}
        self._is_open = True

    @property
    def old(self) -> list[Tensor]:
        """What was stored before the last step, of the part of each weight that this process holds."""
        return self._old

    @torch.no_grad()
    def _scale_split(self, *, up: bool) -> None:
        split = [synapses for synapses in self._synapses if synapses.shares > 1]
        if split:
            scale = torch._foreach_mul_ if up else torch._foreach_div_
            scale([local(synapses.stored) for synapses in split], [float(synapses.shares) for synapses in split])

    def pause(self) -> None:
        """Put the weights back while a closure runs the model."""
        self._scale_split(up=False)

    def resume(self) -> None:
        """Show them to the optimizer again."""
        self._scale_split(up=True)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore everything after the optimizer failed."""
        if self._is_open:
            self._is_open = False
            for weight, old in zip(self._weights, self._old, strict=True):
                weight.copy_(old)

    @torch.no_grad()
    def end(self, taking_part: Sequence[bool], finite: dict[torch.device, Tensor] | None = None) -> None:
        """Apply gains to what the optimizer did.

        Args:
            taking_part: for each weight, whether it has a gradient.
            finite: for each device that is not waited for, whether all is finite there, so that gains may act.
        """
        self._is_open = False
        if self._with_copies:
            self._move_copies(taking_part)
        alike: dict[tuple[tuple[Hook, ...], int, torch.device], list[tuple[Tensor, Tensor, Learning]]] = {}
        for synapses, shard, old, takes_part in zip(self._synapses, self._shards, self._old, taking_part, strict=True):
            own = learning_of(synapses, shard) if takes_part else Learning((), (), ())
            if own.hooks or synapses.shares > 1:
                row = local(synapses.stored), old, own
                alike.setdefault((own.hooks, synapses.shares, old.device), []).append(row)
        for (hooks, shares, _), rows in alike.items():
            if finite and shares > 1:  # first the step of the optimizer, which stays, and then the gains on it
                self._move(rows, (), shares, {})
                self._move(rows, hooks, 1, finite)
            else:
                self._move(rows, hooks, shares, finite or {})

    def _move(
        self,
        rows: Sequence[tuple[Tensor, Tensor, Learning]],
        hooks: tuple[Hook, ...],
        shares: int,
        finite: dict[torch.device, Tensor],
    ) -> None:
        """Move weights that have the same hooks."""
        if not hooks and shares == 1:
            return
        weights, olds, members = zip(*rows, strict=True)
        tensors = zip(*(own.tensors for own in members), strict=True) if hooks else ()
        is_noisy, size = any(hook.is_noisy for hook in hooks), compiling.CPU if self._compiled else blocks.CPU
        for block in blocks.blocks(weights, olds, *tensors, cpu=size):
            drawn = draw(block.parts[1], block.places, members, compiled=self._compiled) if is_noisy else []
            entries = *block.parts, *drawn
            with taken_back(finite, block.parts[0]):
                compiling.change(moved, move_, *entries, compiled=self._compiled, hooks=hooks, shares=shares)

    def copied(self) -> str | None:
        """The key in the optimizer's state under which it keeps a copy of a weight, or None."""
        return next((key for (_, key), _ in self._found()), None)

    def _found(self) -> Iterator[tuple[tuple[int, str], Tensor]]:
        """What the optimizer keeps of the weights themselves."""
        for index, synapses in enumerate(self._synapses):
            state: dict[str, Any] = memory_of(self._optimizer, synapses.stored)
            weight = local(synapses.stored)
            for key, memory in ((key, local(value)) for key, value in state.items()):
                is_alike = isinstance(memory, Tensor) and memory.shape == weight.shape
                if not is_alike or not memory.is_floating_point():
                    continue
                place = index, key
                if place not in self._copies and place not in self._looked_at and _is_close(memory, weight):
                    self._copies[place] = self._old[index] * synapses.shares
                self._looked_at.add(place)
                if place in self._copies:
                    yield place, memory

    def _move_copies(self, taking_part: Sequence[bool]) -> None:
        gains = factors(self._synapses, self._shards, self._old)
        for (index, key), memory in [*self._found()]:
            gain = gains[index]
            if gain is not None and taking_part[index]:
                before = self._copies[index, key].to(memory)
                memory.copy_(before + gain.to(memory) * (memory - before))


def moved(weight: Tensor, old: Tensor, *others: Tensor, hooks: tuple[Hook, ...], shares: int) -> Tensor:
    """A weight after its hooks acted on the change that an optimizer made.

    Args:
        weight: what the optimizer left: Γ times the synapses.
        old: the synapses before.
        others: what the hooks take of the weight, and then their noise.
        hooks: the hooks.
        shares: the number Γ of synapses of a connection.
    """
    gain = combined(hooks, [old], [[x] for x in others], one_by_one=True)[0] if hooks else torch.ones_like(old)
    return torch.lerp(old, weight, gain) if shares == 1 else old + (weight - shares * old) * gain / shares


def move_(
    weights: list[Tensor], olds: list[Tensor], *others: list[Tensor], hooks: tuple[Hook, ...], shares: int
) -> None:
    """The same for many weights that have the same hooks, in place."""
    gains = combined(hooks, olds, others) if hooks else []
    if shares == 1:
        after = torch._foreach_lerp(olds, weights, gains)  # a gain of 1 is exact to the bit
    else:
        by = torch._foreach_add(weights, olds, alpha=-shares)
        if hooks:
            torch._foreach_mul_(by, gains)
        after = torch._foreach_add(olds, by, alpha=1 / shares)
    torch._foreach_copy_(weights, after)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def _is_close(memory: Tensor, weight: Tensor) -> bool:
    size = torch.linalg.vector_norm(weight.detach().float())
    return bool(torch.linalg.vector_norm(memory.float() - weight.detach().float()) < CLOSE * size)
