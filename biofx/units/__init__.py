"""Units: which unit feeds each presynaptic position of every weight.

Every unit of a network has a number. The numbers travel forward through the graph: operators on the layout of a tensor
are *executed on the tensor of unit numbers*; operators that act on each value by itself keep it; where values merge,
each pair of units makes a new one; an operator on weights returns a new population. What cannot be followed starts a
new population as well, which all its readers share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from biofx.capture import capture, check
from biofx.copying import copied
from biofx.dry_run import Values, dry_run
from biofx.errors import ArgumentError
from biofx.provenance import transformed, unwrapped
from biofx.units.analysis import Reading, UnitAnalysis
from biofx.units.numbers import NOBODY, Population
from biofx.weights.sites import WeightSite, find

__all__ = ["NOBODY", "Population", "Reading", "Units", "analyse", "units"]


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a network; `biofx.units` makes it, and as a string it is a table.

    Attributes:
        populations: the populations whose units reach a weight; the first is nobody.
        owner: the index in `populations` of each unit, by its number; 0 for numbers that no unit has any more.
        readings: what each weight reads, by the weight's name; only weights with which presynaptic units act are in it.
        scales: the parameters that multiply units on their way to a weight, such as γ of a batch norm.
        sites: the weights.
        activations: the unit numbers that a node carries to a weight, float64, in the shape of its value.
    """

    populations: tuple[Population, ...]
    owner: Tensor
    readings: dict[str, Reading]
    scales: frozenset[str]
    activations: dict[fx.Node, Any] = field(repr=False)
    sites: dict[str, WeightSite] = field(repr=False)

    def members(self, index: int) -> Tensor:
        """The numbers of a population's units, in order, by its index in `populations`."""
        return (self.owner == index).nonzero().flatten()

    def mixed(self) -> Tensor:
        """The numbers of the units with outgoing weights of both signs, over all weights that read them.

        Inputs are left out: they are no units of the network. So `len(biofx.units(model).mixed()) == 0` says that a
        model, transformed, folded or any other, obeys Dale's principle.
        """
        positive, negative = (torch.zeros(len(self.owner), dtype=torch.bool) for _ in range(2))
        for name, reading in self.readings.items():
            site = self.sites[name]
            weight = site.outgoing(site.effective().detach()).cpu()
            positive[reading.numbers[(weight > 0).any(1)]] = True
            negative[reading.numbers[(weight < 0).any(1)]] = True
        inputs = [index for index, population in enumerate(self.populations) if population.origin == "input"]
        return (positive & negative & ~torch.isin(self.owner, torch.tensor(inputs))).nonzero().flatten()

    def __str__(self) -> str:
        rows = [self._row(site, self.readings.get(name)) for name, site in self.sites.items()]
        headers = ["weight", "operator", "positions", "presynaptic units", "activity", "remark"]
        if not any(row[-1] for row in rows):
            headers, rows = headers[:-1], [row[:-1] for row in rows]
        return "\n".join(line.rstrip() for line in tabulate(rows, headers, disable_numparse=True).splitlines())

    def _row(self, site: WeightSite, reading: Reading | None) -> list[str]:
        if reading is None:
            return [site.name, site.operator, "", "", "", site.why_no_source or ""]
        activity = f"any sign ({reading.signed_by})" if reading.signed_by else "≥ 0"
        positions = str(len(reading.numbers))
        return [site.name, site.operator, positions, self.describe(reading.numbers), activity, reading.remark]

    def describe(self, numbers: Tensor) -> str:
        """Units in words, in the order of their first appearance."""
        owners = self.owner[numbers]
        parts = []
        for index in dict.fromkeys(owners.tolist()):
            mine = numbers[owners == index]
            count = len(mine.unique())
            repeated = f" × {len(mine) // count}" if len(mine) > count else ""
            if len(mine) % count:
                repeated = f" at {len(mine)} positions"
            of = f" of {self.populations[index].size}" if count < self.populations[index].size else ""
            parts.append(f"{count}{of}{repeated}: {self.populations[index].name}")
        return ",\n".join(parts)


def units(model: nn.Module, example_inputs: Any = None) -> Units:
    """Which unit feeds each presynaptic position of every weight. Printed, the result is a table.

    A *unit* is one neuron: a position on the feature axis of an activation, or a channel of a feature map. Columns:
    the weight and its operator; its presynaptic positions; the units that feed them, by the weight whose outputs they
    are (`16 × 49` are 16 units with 49 positions each, as after a flatten); whether their activity can be negative, and
    by which operator; and a remark where the weight has to have units of its own, because it is used on different ones.

    Units are followed through activations, dropout, normalisation, pooling, interpolation, every operator on layout,
    and mixtures such as attention, whose values keep their units. Where values merge (`a + b`), each pair of units
    makes a new one. An operator that cannot be followed starts a new population, which all its readers share.

    Args:
        model: a model made by `biofx.transform`, or any other that can be captured.
        example_inputs: arguments of the model, as for `transform`. Without them, shapes are those that the weights ask
            for, and a flattened feature map is taken to be flattened channel by channel.

    Raises:
        ArgumentError: the example inputs do not fit the model.
        CaptureError: the model cannot be traced.

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
    if _is_transformed(model):
        bio = transformed(model)
    else:
        check(model)
        bio = capture(copied(model), example_inputs)
    sites = find(bio)[0]
    return analyse(bio, sites, dry_run(bio, sites, example_inputs))


def _is_transformed(model: Any) -> bool:
    try:
        unwrapped(model)
    except ArgumentError:
        return False
    return True


def analyse(bio: fx.GraphModule, sites: dict[str, WeightSite], values: Values) -> Units:
    """The unit analysis of a transformed model; see `biofx.units`.

    Args:
        bio: the transformed model.
        sites: its weight sites.
        values: what its nodes compute (`dry_run`).
    """
    analysis = UnitAnalysis(bio, sites, values)
    populations, owner = analysis.populations()
    return Units(populations, owner, analysis.readings, analysis.scales, analysis.activations, sites)
