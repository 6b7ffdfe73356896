"""ModelEditor: the hands of a pass that looks at the whole model, as one does that gives units their signs."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import fx

from biofx import randomness
from biofx.chain import attribute
from biofx.dry_run import Values, dry_run
from biofx.editor import Editor, owners
from biofx.provenance import RunnablePass, record_of
from biofx.units import Units, analyse
from biofx.weights.sites import WeightSite, find


class ModelEditor:
    """Edits a model on behalf of one pass.

    Attributes:
        bio: the model.
        all_sites: all weights, by name.
        sites: those that the pass may touch.
        edits: an editor for each of them.
        excluded: parameters that no pass may touch, each with the reason.
        example_inputs: arguments of the model, as `transform` got them, or None.
    """

    def __init__(
        self, bio: fx.GraphModule, by: RunnablePass, seed: int, excluded: dict[str, str], example_inputs: Any = None
    ) -> None:
        self.bio = bio
        self.example_inputs = example_inputs
        self.excluded = excluded
        self.all_sites = find(bio)[0]
        self.sites: dict[str, WeightSite] = {n: site for n, site in self.all_sites.items() if n not in excluded}
        self.places = owners(bio)
        self.edits = {name: Editor(bio, site.node, by, seed, self.places) for name, site in self.sites.items()}
        self._by = by
        self._seed = seed

    @cached_property
    def values(self) -> Values:
        """What the nodes of the model compute, on example inputs or on inputs of a shape that fits."""
        return dry_run(self.bio, self.all_sites, self.example_inputs)

    @cached_property
    def units(self) -> Units:
        """The unit analysis of the model as it is when it is first asked for."""
        return analyse(self.bio, self.all_sites, self.values)

    def generator(self, *purpose: str) -> torch.Generator:
        """Random numbers that depend on the seed, the pass and the purpose only. A CPU generator."""
        return randomness.generator(self._seed, self._by.name, *purpose)

    def keep_nonnegative(self, parameter: str) -> None:
        """Keep a parameter that multiplies units from being negative: at every step, and in `verify`."""
        record_of(self.bio).nonnegative[parameter] = self._by.name

    def value(self, parameter: str) -> torch.nn.Parameter:
        """A parameter by its name."""
        return attribute(self.bio, parameter)  # type: ignore[no-any-return]
