"""Whether gradients and weights are finite: a rule would spread what is not, or hide it.

On a CPU the answer is known before the step, which is refused. A step on another device does not wait for the answer:
if something was not finite, what rules did is undone there, and the error comes as soon as the host knows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biofx.base.errors import LifecycleError
from biofx.training import blocks
from biofx.training.counting import is_captured, on_host
from biofx.training.ranks import summed

if TYPE_CHECKING:
    from biofx.analysis.sites import WeightSite
    from biofx.training.plastic_weight import PlasticWeight

HELP = "Lower the learning rate, clip gradients, or use torch.amp.GradScaler in half precision"


def is_waited_for(device: torch.device) -> bool:
    """Whether a number on a device is read at once."""
    return device.type == "cpu"


class Finite:
    """What is known about the steps of an attachment."""

    def __init__(self) -> None:
        self._found: dict[torch.device, _Found] = {}

    def look(self, weights: Sequence[PlasticWeight], acted_on: Sequence[PlasticWeight]) -> dict[torch.device, Tensor]:
        """Look at gradients and weights.

        Args:
            weights: the weights.
            acted_on: those on which a rule acts in this step. Others are not checked where the host waits for the
                answer; elsewhere the answer is late, so it has to be about the same weights.

        Returns:
            For each device that is not waited for, whether all are finite.

        Raises:
            LifecycleError: something on another one is not finite.
        """
        result = {}
        for device in dict.fromkeys(weight.raw.device for weight in weights):
            waits = is_waited_for(device)
            own = [weight for weight in (acted_on if waits else weights) if weight.raw.device == device]
            if not waits:
                result[device] = self._found.setdefault(device, _Found(device)).look(own)
            elif own:
                _refuse(own)
        return result

    def refuse_if_known(self) -> None:
        """Raise for an earlier step, if the host knows already that something was not finite."""
        for found in self._found.values():
            found.refuse(wait=False)

    def check(self) -> None:
        """Wait until the host knows about all steps, and raise if something was not finite."""
        for found in self._found.values():
            found.refuse(wait=True)


class _Found:
    """The first thing on a device that was not finite.

    The host may ask about a step after other steps in which other weights took part. So a thing keeps its place for
    good; in a step in which it takes no part, a number that is finite stands there.
    """

    def __init__(self, device: torch.device) -> None:
        self._places: dict[str, None] = {}  # in order
        self._sites: dict[str, WeightSite] = {}  # by name
        self._absent = torch.zeros((), device=device)
        self._first = torch.full((), -1, device=device)  # its place; -1 if there is none
        is_asynchronous = device.type == "cuda" and torch.cuda.is_available()
        self._host = torch.full((), -1, device="cpu", pin_memory=is_asynchronous)
        self._arrived = torch.cuda.Event() if is_asynchronous else None

    def look(self, weights: Sequence[PlasticWeight]) -> Tensor:
        self._sites.update((weight.name, weight.site) for weight in weights)
        kinds = [("weight", [w.raw.detach() for w in weights]), ("gradient", [w.gradient for w in weights])]
        names = [f"{weight.name}: its {what}" for what, _ in kinds for weight in weights]
        tensors = [x if x.numel() else x.new_zeros(1) for _, values in kinds for x in values]  # a shard may be empty
        norms = summed([*weights, *weights], [norm.float() for norm in torch._foreach_norm(tensors, math.inf)])
        found = dict(zip(names, norms, strict=True))
        self._places.update(dict.fromkeys(names))
        is_finite = torch.isfinite(torch.stack([found.get(place, self._absent) for place in self._places]))
        now = torch.where(is_finite.all(), -1, is_finite.logical_not().int().argmax())
        self._first.copy_(torch.where(self._first < 0, now, self._first))
        if not is_captured():
            self._host.copy_(self._first, non_blocking=True)
            if self._arrived is not None:
                self._arrived.record()
        return is_finite.all()

    def refuse(self, *, wait: bool) -> None:
        if wait:
            self._host.copy_(self._first)
        elif self._arrived is not None and not self._arrived.query():
            return
        place: Any = self._host.tolist()  # without an operator: it is on the host
        if place >= 0:
            self._first.fill_(-1)
            self._host.fill_(-1)
            raise LifecycleError(
                f"{[*self._places][place]} was not finite at an earlier step, so rules did not act at that step. "
                f"{_advice(self._sites.values())}"
            )


@contextlib.contextmanager
def undone_unless_finite(finite: dict[torch.device, Tensor], tensors: Iterable[Tensor]) -> Iterator[None]:
    """Undo what the block does to tensors, except on devices on which everything is finite.

    Args:
        finite: whether it is, for each device that is not waited for.
        tensors: the tensors.
    """
    if not finite:
        yield
        return
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in dict.fromkeys(tensors):
        if tensor.device in finite:
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    before = {kind: [torch.empty_like(tensor) for tensor in own] for kind, own in kinds.items()}
    for kind, own in kinds.items():
        torch._foreach_copy_(before[kind], own)
    yield
    for (device, dtype), own in kinds.items():
        for block in blocks.blocks(own, before[device, dtype]):
            now, old = (torch.cat([part.reshape(-1) for part in parts]) for parts in block.parts)
            chosen = torch.where(finite[device], now, old).split([part.numel() for part in block.parts[0]])
            parts = [x.view(part.shape) for x, part in zip(chosen, block.parts[0], strict=True)]
            torch._foreach_copy_(block.parts[0], parts)


def _refuse(weights: Sequence[PlasticWeight]) -> None:
    # First weights: one that is not finite leads to gradients that are not.
    kinds = {"weight": [w.raw for w in weights], "gradient": [w.gradient for w in weights]}
    # Norms cost a fraction of looking at every entry. They can overflow, so only a finite one is proof.
    # A sum over ranks is finite on none of them if it is not on one, so all of them refuse.
    norms = summed([*weights, *weights], torch._foreach_norm([x for values in kinds.values() for x in values], 2))
    if all(map(math.isfinite, on_host(norms))):
        return
    for what, values in kinds.items():
        for weight, value in zip(weights, values, strict=True):
            (bad,) = summed([weight], [torch.isfinite(value).logical_not().sum()])
            if int(bad):
                advice = _advice(weight.site for weight in weights)
                raise LifecycleError(
                    f"{weight.name}: its {what} is not finite, so rules cannot act on it; nothing was changed. {advice}"
                )


def _advice(sites: Iterable[WeightSite]) -> str:
    """What to do: look at a rule, if what it keeps for a weight is not finite; else, what helps in general."""
    for site in sites:
        state = None if site.child is None else site.child.not_finite()
        if state is not None:
            return f"State of a rule is not finite either, which may be why: {site.name}: {state}"
    return HELP
