"""Model editor: changes a whole model for a pass, such as one that gives units their signs."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import fx

from biofx.analysis.sites import WeightSite, find_weights
from biofx.analysis.understanding import Understanding, remember, understand_again
from biofx.analysis.units import Units
from biofx.base import randomness
from biofx.model.provenance import record_of
from biofx.rewrite.editor import Editor, owners

if TYPE_CHECKING:
    from biofx.rewrite.registry import Pass


class ModelEditor:
    """Edits a model on behalf of one pass.

    Attributes:
        bio: the model.
        all_sites: all weights, by name.
        sites: those that the pass may touch.
        edits: an editor for each of them.
        excluded: parameters that no pass may touch, each with the reason.
        understood: the analysis of the model's last recorded run; None if the model could not be run.
        seed: seed of all random draws.
        values_will_be_loaded: whether all values are replaced afterwards, as by saved ones, so initial ones do not
            matter.
    """

    def __init__(
        self,
        bio: fx.GraphModule,
        by: Pass,
        seed: int,
        excluded: dict[str, str],
        understood: Understanding | None,
        *,
        values_will_be_loaded: bool = False,
    ) -> None:
        self.bio = bio
        self.understood = understood
        self.seed = seed
        self.values_will_be_loaded = values_will_be_loaded
        self.excluded = excluded
        self.all_sites = find_weights(bio).sites
        self.sites: dict[str, WeightSite] = {n: site for n, site in self.all_sites.items() if n not in excluded}
        self.places = owners(bio)
        self.edits = {name: Editor(bio, name, site.node, by, seed, self.places) for name, site in self.sites.items()}
        self._by = by

    @cached_property
    def units(self) -> Units | None:
        """The unit analysis of the model; None if it could not be run."""
        return None if self.understood is None else Units.of(self.understood, self.all_sites)

    def look_again(self) -> None:
        """Record and analyse a new run, after the pass has changed the units."""
        record = record_of(self.bio)
        if self.understood is not None:
            told = record.others  # in words of the model's own Python, and not of its graph
            with randomness.callers_defaults():
                self.understood = understand_again(self.bio, self.understood)
                remember(self.bio, self.understood)
            record.others |= {name: reason for name, reason in told.items() if name in record.others}
        self.all_sites = find_weights(self.bio).sites
        self.sites = {name: self.all_sites[name] for name in self.sites if name in self.all_sites}
        vars(self).pop("units", None)

    def generator(self, *purpose: str) -> torch.Generator:
        """A CPU generator, which depends only on the seed, the pass and the purpose."""
        return randomness.generator(self.seed, self._by.name, *purpose)

    def leave(self, reason: str) -> None:
        """Leave all weights alone; `summary` shows the reason."""
        for edit in self.edits.values():
            edit.leave(reason)

    def keep_nonnegative(self, parameter: str) -> None:
        """Keep a scale parameter from being negative: it is clamped at every step, and `verify` checks it."""
        record_of(self.bio).nonnegative[parameter] = self._by.name
