"""Units: which unit feeds each presynaptic position of every weight, and who obeys Dale's principle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from biofx.analysis.numbers import NOBODY, Population
from biofx.analysis.readings import PresynapticUnits
from biofx.analysis.sites import WeightSite, find_weights
from biofx.analysis.understanding import Understanding, UnitFacts, understand
from biofx.base.errors import ArgumentError, NotJudgedError
from biofx.base.modules import check_module
from biofx.base.tables import Cell, Report, ShownAsReport, Table, wrapped
from biofx.model.changes import transformed
from biofx.model.islands import GUARD
from biofx.model.provenance import is_transformed, without_wrappers
from biofx.weights.facts import NOT_RUN, Need

__all__ = ["NOBODY", "Population", "PresynapticUnits", "Units", "Verdict", "units"]

EFFECTS = ("silent", "excites", "inhibits", "mixed", "not judged")  # what the outgoing weights of a unit do
HEADERS = ("weight", "operator", "positions", "presynaptic units", "activity", "note")
LIMITS = {"weight": 24, "operator": 12, "presynaptic units": 22, "activity": 17}  # widths in a table that is too wide


@dataclass(frozen=True)
class Verdict:
    """Whether a weight obeys Dale's principle.

    Attributes:
        kind: `"obeys"`; `"breaks"`; `"free"`: it reads inputs and constants only, which are not units of the network;
            `"not constrained"`: no pass gave it signs, and `verify` does not check its units; or `"not judged"`.
        mixed: the number of its presynaptic units that excite and inhibit, through this weight or others.
        reason: why it is not judged, or an empty string.
        has_interneurons: of a weight that obeys, whether its units inhibit through interneurons, so that its effective
            values have both signs.
    """

    kind: str
    mixed: int = 0
    reason: str = ""
    has_interneurons: bool = False

    def __str__(self) -> str:
        if self.kind == "breaks":
            return f"breaks: {self.mixed} of its units excite and inhibit"
        if self.has_interneurons:
            return f"{self.kind}, with inhibition by interneurons"
        return f"not judged: {self.reason}" if self.kind == "not judged" else self.kind


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Units(ShownAsReport, UnitFacts):
    """The units of a network; `biofx.units` makes it, and as a string it is a table.

    Attributes:
        sites: the weights.
    """

    sites: dict[str, WeightSite]

    @classmethod
    def of(cls, understood: Understanding, sites: Mapping[str, WeightSite]) -> Units:
        """The units of a model, from what a run showed about it."""
        told = {key: value for key, value in vars(understood).items() if key in UnitFacts.__dataclass_fields__}
        told["readings"] = {name: reading for name, reading in understood.readings.items() if name in sites}
        return cls(**told, sites=dict(sites))

    def members(self, index: int) -> Tensor:
        """The numbers of a population's units, in order, by its index in `populations`."""
        return (self.owner == index).nonzero().flatten()

    def verdicts(self) -> dict[str, Verdict]:
        """For each weight, whether it obeys Dale's principle, or why that cannot be judged.

        Example:
            >>> import biofx, torch
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> _ = model[2].weight.data.copy_(torch.tensor([[1.0, 1, 1, 1], [-1, 1, 1, 1]]))
            >>> {name: verdict.kind for name, verdict in biofx.units(model, torch.randn(1, 3)).verdicts().items()}
            {'0.weight': 'free', '2.weight': 'breaks'}
        """
        mixed = set(self._mixed().tolist())
        unjudged = {name: Verdict("not judged", reason=self.others[name]) for name in sorted(self.acting)}
        return {name: self._verdict(name, site, mixed) for name, site in self.sites.items()} | unjudged

    def _verdict(self, name: str, site: WeightSite, mixed: set[int]) -> Verdict:
        reason = self._unjudged(name, site)
        if reason:
            return Verdict("not judged", reason=reason)
        reading = self.readings[name]
        if bool(reading.is_free.all()):
            return Verdict("free")
        count = len(mixed & set(reading.classes[~reading.is_free].tolist()))
        return Verdict("breaks", mixed=count) if count else Verdict("obeys", has_interneurons=site.has_interneurons)

    def _unjudged(self, name: str, site: WeightSite) -> str:
        if name not in self.readings:
            return site.unmet(Need.UNITS) or NOT_RUN
        if site.raw.is_meta:
            return "it is on the meta device, and has no values"
        if not bool(site.raw.detach().isfinite().all()):
            return "it has values that are not finite"
        return site.unmet(Need.UNITS) or self.readings[name].remark

    def mixed(self) -> Tensor:
        """The numbers of the units with outgoing weights of both signs, over all weights that read them.

        Inputs are left out: they are not units of the network. Of units that inhibit through interneurons, their own
        synapses count; `fold` adds up both. If it returns no unit, the model, transformed, folded or any other, obeys
        Dale's principle in every weight. A parameter that multiplies activity entry by entry is no weight: `scales` and
        `others` have those.

        Raises:
            NotJudgedError: no unit was found to be mixed, but some weights, or other parameters that act on units,
                could not be judged; names them, with the reasons. `verdicts` says what is known about each.
        """
        found = self._mixed()
        unjudged = {n: r for n, site in self.sites.items() if (r := self._unjudged(n, site))}
        unjudged |= {name: self.others[name] for name in sorted(self.acting)}
        if not len(found) and unjudged:
            raise NotJudgedError(unjudged)
        return found

    def effects(self) -> Tensor:
        """What the outgoing weights of each unit do, over all weights that read it, by the unit's number.

        Returns:
            A tensor of indices into `EFFECTS`: `"excites"` or `"inhibits"`: all of its outgoing weights that are not 0
            are positive, or negative; `"mixed"`: it has both; `"silent"`: all are 0, or nothing reads it; `"not
            judged"`: a weight that may read it could not be judged, and the others are not mixed.

        Example:
            >>> import biofx, torch
            >>> from biofx.analysis.units import EFFECTS
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
            >>> _ = model[2].weight.data.copy_(torch.tensor([[1.0, -1, 1, 0], [2, -1, -1, 0]]))
            >>> units = biofx.units(model, torch.randn(1, 3))
            >>> members = units.members([population.name for population in units.populations].index("0.weight"))
            >>> [EFFECTS[index] for index in units.effects()[members]]
            ['excites', 'inhibits', 'mixed', 'silent']
        """
        positive, negative = self._signs()
        unjudged = torch.zeros(len(self.classes), dtype=torch.bool)
        for name, site in self.sites.items():
            if self._unjudged(name, site):
                reading = self.readings.get(name)  # what did not run may read any unit
                unjudged[slice(None) if reading is None else torch.cat((reading.classes, reading.sources))] = True
        if self.acting:  # which units they read is not known
            unjudged[:] = True
        unjudged[self.classes[unjudged]] = True
        found = positive.long() + 2 * negative.long()  # silent, excites, inhibits, mixed
        found[unjudged & ~(positive & negative)] = EFFECTS.index("not judged")
        return found[self.classes]

    def _mixed(self) -> Tensor:
        positive, negative = self._signs()
        return (positive & negative).nonzero().flatten()

    def _signs(self) -> tuple[Tensor, Tensor]:
        """Whether units have positive and negative outgoing weights, by the number that stands for their class."""
        positive, negative = (torch.zeros(len(self.classes), dtype=torch.bool) for _ in range(2))
        for name, reading in self.readings.items():
            if self._unjudged(name, self.sites[name]):
                continue
            site = self.sites[name]
            weight = site.outgoing(site.direct().detach()).cpu()
            neural = ~reading.is_free
            positive[reading.classes[neural & (weight > 0).any(1)]] = True
            negative[reading.classes[neural & (weight < 0).any(1)]] = True
        return positive, negative

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table as data: a dict for each weight.

        `units` has a dict for each population that the weight reads: how many `units` `of` it, and how many
        presynaptic `positions` they feed. It is empty if the weight cannot be judged.
        """
        return [self._row(name, site) for name, site in self.sites.items()]

    def to_dict(self) -> dict[str, Any]:
        """Everything that the printed table says, as data."""
        return self._report().to_dict()

    def _report(self) -> Report:
        rows = self.rows
        run = [f"inputs: {self.inputs}"] if self.inputs != "given" else []
        parts: list[Table | str] = [
            Table(HEADERS, [_cells(row) for row in rows], LIMITS),
            *map(wrapped, [*run, *self.notes]),
        ]
        return Report(parts, rows, inputs=self.inputs, notes=list(self.notes))

    def _row(self, name: str, site: WeightSite) -> dict[str, Any]:
        reason, reading = self._unjudged(name, site), self.readings.get(name)
        return {
            "weight": name,
            "operator": site.operator,
            "positions": None if reading is None else len(reading.numbers),
            "units": [] if reason or reading is None else self._counted(reading.numbers),
            "signed_by": None if reading is None else reading.signed_by,
            "inverted_by": None if reading is None else reading.inverted_by,
            "not_judged": reason,
        }

    def _counted(self, numbers: Tensor) -> list[dict[str, Any]]:
        """Units by population, in the order of their first appearance."""
        owners = self.owner[numbers]
        found = []
        for index in dict.fromkeys(owners.tolist()):
            mine, population = numbers[owners == index], self.populations[index]
            counts = {"units": len(mine.unique()), "of": population.size, "positions": len(mine)}
            found.append({"population": population.name, **counts})
        return found

    def describe(self, numbers: Tensor) -> str:
        """Units in words, in the order of their first appearance."""
        return ",\n".join(map(_in_words, self._counted(numbers)))


def _in_words(counted: Mapping[str, Any]) -> str:
    """The units of one population."""
    count, positions = counted["units"], counted["positions"]
    repeated = f" × {positions // count}" if positions > count else ""
    if positions % count:
        repeated = f" at {positions} positions"
    of = f" of {counted['of']}" if count < counted["of"] else ""
    return f"{count}{of}{repeated}: {counted['population']}"


def _cells(row: Mapping[str, Any]) -> list[Cell]:
    note = [f"not judged: {row['not_judged']}"] if row["not_judged"] else []
    note += [f"{row['inverted_by']} subtracts or negates what it returns"] if row["inverted_by"] else []
    if row["positions"] is None:
        return [row["weight"], row["operator"], "", "", "", note]
    activity = f"any sign ({row['signed_by']})" if row["signed_by"] else "≥ 0"
    units = ",\n".join(map(_in_words, row["units"]))
    return [row["weight"], row["operator"], str(row["positions"]), units, activity, note]


def units(model: nn.Module, example_inputs: Any = None) -> Units:
    """Which unit feeds each presynaptic position of every weight. Printed, the result is a table.

    A *unit* is one neuron: a position on the feature axis of an activation, or a channel of a feature map. Columns:
    the weight and its operator; its presynaptic positions; the units that feed them, by the weight whose outputs they
    are (`16 × 49` are 16 units with 49 positions each, as after a flatten); whether their activity can be negative, and
    by which operator; and a note where the units are unknown.

    The model's own Python runs once, in evaluation mode, and its operators are recorded: loops, caches, and code that
    no graph holds are followed like anything else. Layouts are executed on the numbers of units. Activations,
    normalisation, pooling and mixtures such as attention keep units. Units that merge (`a + b`) become the set of both,
    so a unit keeps its identity over time: a leak, a gate or a running sum of itself makes no new one. What one column
    of a weight reads, over all its uses and steps, has one sign: `classes` says which units have to agree. An operator
    that cannot be followed starts a new population, which all its readers share.

    Args:
        model: any module: transformed, folded, or any other. It is not changed.
        example_inputs: arguments of the model, as for `transform`; or a function that runs the model, for state that is
            carried from call to call. Without them, arguments that fit are guessed, and shown below the table.

    Raises:
        ArgumentError: the example inputs do not fit the model, or none were given and none that were tried fit.
        CaptureError: a pass needs the graph of the model, which does not follow what was changed since the transform.

    Example:
        >>> import biofx, torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10))
        >>> print(biofx.units(model, example_inputs=torch.randn(1, 1, 8, 8)))
        weight    operator    positions    presynaptic units    activity
        --------  ----------  -----------  -------------------  ----------------------
        0.weight  conv2d      1            1: input input       any sign (input input)
        4.weight  linear      36           4 × 9: 0.weight      ≥ 0
    """
    bio = transformed(model) if is_transformed(without_wrappers(model)) else None
    if bio is None:
        check_module(model)
    elif (guard := vars(bio).get(GUARD)) is not None:
        guard.change(bio)  # which raises if only the graph does what calls do, and does not follow
    understood = understand(model if bio is None else bio, example_inputs)
    if understood is None:
        raise ArgumentError(f"{type(model).__name__}: {NOT_RUN}")
    sites = {n: WeightSite(model if bio is None else bio, n, facts) for n, facts in understood.weights.items()}
    if bio is not None:  # what was assigned after the transform is judged as in any model
        sites |= find_weights(bio).sites
    return Units.of(understood, sites)
