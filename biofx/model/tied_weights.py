"""Tied weights: modules that share the synapses of a weight, of which `torch.func.functional_call` replaces one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from biofx.model import weight_cache
from biofx.model.synapses import CHILD, Synapses, submodule

_owners_made = 0  # in all models


def note_owner() -> None:
    """Note that a module anywhere was given synapses, of its own or of another module, or lost some."""
    global _owners_made
    _owners_made += 1


class TiedWeights:
    """The tied weights of a model; they are looked for again after a module anywhere became an owner."""

    def __init__(self, model: nn.Module) -> None:
        self.places = _places_in(weakref.ref(model))

    def replaced(self, model: nn.Module) -> dict[nn.Module, Tensor]:
        """The tensors in the places of tied weights, by the synapses of these."""
        replaced: dict[nn.Module, Tensor] = {}
        for path, key in self.places():
            owner = submodule(model, path)
            if owner is None:  # it was removed since
                continue
            given, synapses = owner._parameters.get(key), owner._modules.get(CHILD.format(key))
            if given is not None and isinstance(synapses, Synapses):
                replaced[synapses] = given
        return replaced

    @contextmanager
    def computed_once(self, model: nn.Module) -> Iterator[None]:
        """Compute each weight once inside the block; all that are tied follow one that `functional_call` replaced."""
        replaced = self.replaced(model)
        with weight_cache.caching(), weight_cache.substituted(replaced) if replaced else nullcontext():
            yield


def _places_in(reference: weakref.ref[nn.Module]) -> Callable[[], tuple[tuple[str, str], ...]]:
    """A function that returns the paths of modules with the keys of weights that share their synapses with others."""
    seen, found = -1, tuple[tuple[str, str], ...]()

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # it is not compiled
    def places() -> tuple[tuple[str, str], ...]:
        nonlocal seen, found
        model = reference()
        if seen != _owners_made and model is not None:
            seen, found = _owners_made, tuple(_tied_places(model))
        return found

    return places  # type: ignore[no-any-return]


def _tied_places(model: nn.Module) -> Iterator[tuple[str, str]]:
    places: dict[Synapses, list[tuple[str, str]]] = {}
    for path, owner in model.named_modules():
        for key in owner._parameters:
            synapses = owner._modules.get(CHILD.format(key))
            if isinstance(synapses, Synapses):
                places.setdefault(synapses, []).append((path, key))
    for same in places.values():
        yield from same if len(same) > 1 else ()
