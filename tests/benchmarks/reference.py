"""The reference package, pytorch-bio-transformations, where it is installed: `pip install --no-deps` it."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable

from torch import nn

INSTALLED = importlib.util.find_spec("bio_transformations") is not None
# What a training loop calls between `backward()` and `optimizer.step()`, by the name of our rule, and every how many
# steps. Its Dale's principle is that of rows, and cannot be called on a model.
CALLS: dict[str, tuple[tuple[str, int], ...]] = {
    "fuzzy": (("fuzzy_learning_rates", 1),),
    "crystallize": (("fuzzy_learning_rates", 1), ("crystallize", 1)),
    "volume": (("volume_dependent_lr", 1),),
    "rejuvenate every step": (("rejuvenate_weights", 1),),
    "rejuvenate every 100": (("rejuvenate_weights", 100),),
    "fuzzy + volume + crystallize": (("volume_dependent_lr", 1), ("fuzzy_learning_rates", 1), ("crystallize", 1)),
}


def converted(model: nn.Module, rule: str) -> tuple[nn.Module, Callable[[], None]] | None:
    """A copy of a model as the package makes it, and what its loop calls; None if the package has not got the rule."""
    if not INSTALLED or rule not in CALLS:
        return None
    converter = importlib.import_module("bio_transformations").BioConverter()
    theirs: nn.Module = converter(copy.deepcopy(model))
    count = 0

    def act() -> None:
        nonlocal count
        count += 1
        for name, every in CALLS[rule]:
            if count % every == 0:
                getattr(theirs, name)()

    return theirs, act
