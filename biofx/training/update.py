"""Updates: gains scale the change that an optimizer makes to weights, whichever optimizer that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from biofx.base.shards import local, shard_of
from biofx.training import blocks, compiling
from biofx.training.factors import NO_HOOKS, Hook, WeightHooks, alike, combined, draw, factors, hooks_of
from biofx.training.finite import undone_unless_finite

if TYPE_CHECKING:
    from biofx.model.synapses import Synapses
    from biofx.training.copies import Copies


class Update:
    r"""One step of an optimizer on weights with gains.

    A weight moves by gain times the distance that it would have moved without:

    $$w \leftarrow w_\mathrm{old} + c\,(w_\mathrm{new} - w_\mathrm{old})$$

    A connection of Γ synapses is to move as the plain connection would: the optimizer sees Γ·w and the connection's
    gradient, and the change is divided by Γ.

    Args:
        synapses: the synapses with gains.
        copies: the optimizer's copies of the weights, if gains act on them as well.
        compiled: whether to compile what gains do.
    """

    def __init__(self, synapses: Iterable[Synapses], *, copies: Copies | None = None, compiled: bool = False) -> None:
        self._synapses = list(synapses)
        self._shards = [shard_of(each.stored_name, each.stored) for each in self._synapses]
        self._copies = copies
        self._compiled = compiled
        self._old: list[Tensor] = []
        self._kinds: list[tuple[Any, ...]] = []
        self._copied: dict[tuple[nn.Parameter, str], Tensor] = {}  # the copies before, with their keys in the state
        self._is_open = False
        self.look_again()

    def look_again(self) -> None:
        """Look up the hooks again, since something was assigned to the synapses."""
        self._hooks: list[WeightHooks] = []
        self._shares = [synapses.shares for synapses in self._synapses]

    @property
    def _weights(self) -> list[Tensor]:
        return [local(synapses.stored) for synapses in self._synapses]

    @torch.no_grad()
    def begin(self) -> None:
        """Save the weights, and show them to the optimizer as if each connection were one synapse."""
        weights = self._weights
        kinds = [_kind(weight) for weight in weights]
        if kinds != self._kinds:
            self._old = [torch.empty_like(w) for w in weights]  # kept, so that no step has to allocate memory
            self._kinds = kinds
        if weights:
            torch._foreach_copy_(self._old, weights)
        self._scale_split(up=True)
        if self._copies is not None:
            self._copied = {(weight, key): copy.clone() for weight, key, copy in self._copies.found(in_step=True)}
        self._is_open = True

    @property
    def old(self) -> list[Tensor]:
        """What was stored before the last step, of the part of each weight that this process holds."""
        return self._old

    @torch.no_grad()
    def _scale_split(self, *, up: bool) -> None:
        split = [(s, shares) for s, shares in zip(self._synapses, self._shares, strict=True) if shares > 1]
        if split:
            scale = torch._foreach_mul_ if up else torch._foreach_div_
            scale([local(synapses.stored) for synapses, _ in split], [float(shares) for _, shares in split])

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
        if self._copies is not None:
            self._move_copies(self._copies, taking_part)
        if not self._hooks:
            self._hooks = alike([hooks_of(*each) for each in zip(self._synapses, self._shards, strict=True)])
        groups: dict[tuple[int, int, torch.device], list[tuple[Tensor, Tensor, WeightHooks]]] = {}
        rows = zip(self._weights, self._old, self._hooks, self._shares, taking_part, strict=True)
        for weight, old, known, shares, takes_part in rows:
            own = known if takes_part else NO_HOOKS
            if own.hooks or shares > 1:
                groups.setdefault((id(own.hooks), shares, old.device), []).append((weight, old, own))
        for (_, shares, _), members in groups.items():
            hooks = members[0][2].hooks
            if finite and shares > 1:  # first the step of the optimizer, which stays, and then the gains on it
                self._move(members, (), shares, {})
                self._move(members, hooks, 1, finite)
            else:
                self._move(members, hooks, shares, finite or {})

    def _move(
        self,
        rows: Sequence[tuple[Tensor, Tensor, WeightHooks]],
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
            with undone_unless_finite(finite, block.parts[0]):
                compiling.run_kernel(after_gains, move_, *entries, compiled=self._compiled, hooks=hooks, shares=shares)

    def _move_copies(self, copies: Copies, taking_part: Sequence[bool]) -> None:
        gains = factors(self._synapses, self._shards, self._old)
        places = {synapses.stored: index for index, synapses in enumerate(self._synapses)}
        for weight, key, copy in copies.found(in_step=True):
            index = places.get(weight)
            gain = None if index is None or not taking_part[index] else gains[index]
            if index is not None and gain is not None:
                before = self._copied.get((weight, key), self._old[index] * self._synapses[index].shares).to(copy)
                copy.copy_(before + gain.to(copy) * (copy - before))


def after_gains(weight: Tensor, old: Tensor, *others: Tensor, hooks: tuple[Hook, ...], shares: int) -> Tensor:
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
