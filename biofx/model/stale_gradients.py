"""Stale gradients: a backward pass computed them while hooks were on and are off now, or the other way round."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING
from weakref import ref

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from biofx.base.shards import is_sharded, local

if TYPE_CHECKING:
    from biofx.model.synapses import Synapses


class StaleGradients:
    """The stale gradients of some weights, until somebody clears them."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[ref[Tensor], int | None]] = {}  # each gradient, with its version if nobody watches
        self._watches: list[RemovableHandle] = []

    def note(self, synapses: Mapping[str, Synapses], *, watch: bool) -> None:
        """Remember the gradients that weights have now.

        Args:
            synapses: the synapses of which hooks are switched, by the weight's name.
            watch: see, by a hook on the stored weight, whether a gradient is cleared before backward adds to it.
                Otherwise every change of a gradient counts as its end.
        """
        for name, each in synapses.items():
            stored, gradient = each.stored, each.stored.grad
            if gradient is None or gradient.is_inference() or not bool(local(gradient).any()):
                continue
            is_watched = watch and stored.requires_grad and not is_sharded(stored)
            self._known[name] = ref(gradient), None if is_watched else gradient._version
            if is_watched:
                self._watches.append(stored.register_hook(functools.partial(self._note_backward, name, stored)))

    def _note_backward(self, name: str, stored: nn.Parameter, _: Tensor) -> None:
        """Forget a gradient if backward is about to add to another one, or to zeros."""
        if name in self._known and not _is_kept(self._known[name], stored):
            del self._known[name]

    def first(self, synapses: Mapping[str, Synapses]) -> str | None:
        """The first of these weights that still has a stale gradient, or None."""
        found = (n for n, known in self._known.items() if n in synapses and _is_kept(known, synapses[n].stored))
        return next(found, None)

    def forget(self) -> None:
        """Forget all of them."""
        for watch in self._watches:
            watch.remove()
        self._watches.clear()
        self._known.clear()


def _is_kept(known: tuple[ref[Tensor], int | None], stored: nn.Parameter) -> bool:
    """Whether a weight still has a gradient, which is not zero."""
    gradient, version = known[0](), known[1]
    if gradient is None or stored.grad is not gradient or version not in (None, gradient._version):
        return False
    return bool(local(gradient).any())
