"""Wiring: which synapses lead into a unit, and which lead out of it, in whichever weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biofx.analysis.numbers import NOBODY, connected
from biofx.recording.operations import Depends

if TYPE_CHECKING:
    from biofx.analysis.flow import Point
    from biofx.analysis.understanding import Understanding
    from biofx.recording.operations import Recording


@dataclass(frozen=True, eq=False)
class Layer:
    """Units of which all synapses are known.

    Units of several weights that merge, as in a residual stream, are one unit, with the incoming synapses of all.

    Attributes:
        name: the first weight that leads into them.
        size: how many units there are.
        incoming: for each weight that leads into them, the places of each unit among the weight's postsynaptic units,
            int64, shape (size, places); the number of those units where there are no more.
        outgoing: for each weight that reads them, the places of each unit among its presynaptic positions, likewise.
    """

    name: str
    size: int
    incoming: dict[str, Tensor]
    outgoing: dict[str, Tensor]


def wire(
    understood: Understanding, fixed: Mapping[str, str], unread: Mapping[str, str]
) -> tuple[list[Layer], dict[str, str]]:
    """The layers of a network of whose units all synapses are known.

    Args:
        understood: the analysis of a run.
        fixed: weights whose postsynaptic units are left out, each with the reason.
        unread: weights whose presynaptic units are left out, each with the reason.

    Returns:
        The layers, and for each weight that leads into none of them the reason.
    """
    return _Wiring(understood, fixed, unread).layers()


class _Wiring:
    """The base units of a run, joined where they merge."""

    def __init__(self, understood: Understanding, fixed: Mapping[str, str], unread: Mapping[str, str]) -> None:
        self._unit_readings, self._flow = understood.unit_readings, understood.flow
        self._unread = unread
        self._numbers = self._unit_readings.units.numbers
        units = self._unit_readings.units
        self._own = {n: units.own(n, self._unit_readings.deciding(n)) for n in understood.readings if n not in fixed}
        self._parts = {name: self._parts_of(name) for name in understood.readings if name not in unread}
        self._origins = [population.origin for population in self._numbers.populations]
        self._feeds = {name: self._feeders(parts) for name, parts in self._parts.items()}
        self._weighing = self._weighing_points(understood.recording)
        self._reasons = dict(fixed)
        for name in self._own:
            reason = self._why_open(name)
            if reason:
                self._reasons[name] = reason

    def _weighing_points(self, recording: Recording) -> set[Point | None]:
        """Where activity acts on other activity in a way that is not followed, as queries and keys do."""
        acting = (operation for operation in recording.operations if operation.depends is Depends.INPUTS)
        return {
            self._flow.of(value).point
            for operation in acting
            if not self._unit_readings.units.is_read(operation)
            for value in set(operation.operands).difference(self._unit_readings.units.carried(operation))
        }

    def _parts_of(self, name: str) -> Tensor:
        """The base units at each position of a weight, shape (positions, units); nobody where there are no more."""
        rows = self._unit_readings.units.rows(self._unit_readings.deciding(name))
        if rows is None:  # it reads tokens
            return torch.zeros(0, 1, dtype=torch.int64)
        parts = self._numbers.parts_of(rows.flatten())
        return torch.stack([torch.zeros(rows.numel(), dtype=torch.int64), *parts], 1).view(len(rows), -1)

    def _feeders(self, parts: Tensor) -> set[str]:
        """The names of the populations whose units are read."""
        owners = self._numbers.owner()[parts[parts != NOBODY]].unique().tolist()
        names = {index: self._numbers.populations[index].name for index in owners}
        return {names[i] if self._origins[i] in ("weight", "input", "constant") else "unknown" for i in owners}

    def _why_open(self, name: str) -> str:
        """Why it is not known, or not open to change, what all units of a weight do; empty if it is."""
        readers, points = self._flow.ahead(name)
        is_returned = not points.isdisjoint(self._flow.returned)
        if not readers:
            return "it computes what the model returns" if is_returned else "no weight reads its units"
        if is_returned:
            return "the model returns what its units compute, also without another weight"
        if not points.isdisjoint(self._weighing):
            return "what its units compute also acts on others, as queries and keys do"
        for reader in sorted(readers):
            if reader in self._unread:
                return f"its units are read by {reader}, and {self._unread[reader]}"
            feeders = self._feeds.get(reader, set())
            if name not in feeders or "unknown" in feeders:
                return f"it cannot be told which of its units {reader} reads"
        return ""

    def layers(self) -> tuple[list[Layer], dict[str, str]]:
        """The layers, and the reasons of weights that lead into none."""
        firsts = {name: parts.amax(1) for name, parts in self._parts.items()}
        edges = [
            torch.stack([firsts[name][:, None].expand_as(parts)[parts != NOBODY], parts[parts != NOBODY]])
            for name, parts in self._parts.items()
        ]
        joined = connected(torch.arange(len(self._numbers)), torch.cat([torch.zeros(2, 0).long(), *edges], 1))
        spread = torch.zeros(len(self._numbers), dtype=torch.bool)
        for parts in self._parts.values():
            spread[_spread(parts)] = True
        spread[joined[spread]] = True
        good = torch.zeros(len(self._numbers), dtype=torch.bool)
        for name, own in self._own.items():
            good[own] = name not in self._reasons and not bool(spread[joined[own]].any())
        whole, is_read = torch.ones_like(good), torch.zeros_like(good)
        whole[joined[~good]] = False
        for first in firsts.values():
            is_read[joined[first]] = True
        chosen = (whole & is_read)[joined] & good
        layer_of = torch.arange(len(joined))  # layers are joined by weights that lead into several units
        pairs = [joined[own[chosen[own]]] for own in self._own.values()]
        links = [torch.stack([units[:1].expand_as(units), units]) for units in pairs]
        layer_of = connected(layer_of, torch.cat([torch.zeros(2, 0).long(), *links], 1))[joined]
        names: dict[int, str] = {}  # of the first weight that leads into each layer
        for name, own in self._own.items():
            mine = own[chosen[own]]
            if len(mine):
                names.setdefault(int(layer_of[mine[0]]), name)
            else:
                self._reasons.setdefault(name, self._why_merged(own, joined, spread))
        members = joined[chosen].unique()
        index, sizes = _index_within(layer_of[members])
        place = torch.full_like(joined, -1).index_put((members,), index)[joined]
        into = {name: own for name, own in self._own.items() if name not in self._reasons}
        incoming, outgoing = (_by_layer(side, place, layer_of, sizes) for side in (into, firsts))
        layers = [Layer(name, sizes[layer], incoming[layer], outgoing[layer]) for layer, name in names.items()]
        return layers, self._reasons

    def _why_merged(self, own: Tensor, joined: Tensor, spread: Tensor) -> str:
        """Why a weight has units in no layer: what they merge with, or that no weight reads them."""
        others = torch.isin(joined, joined[own]).nonzero().flatten()
        owner = self._numbers.owner()[others].unique().tolist()
        for index in owner:
            name, origin = self._numbers.populations[index].name, self._origins[index]
            if origin != "weight":
                return f"its units merge with {name}, which has no synapses"
            if name in self._reasons:
                return f"its units merge with those of {name}: {self._reasons[name]}"
        if bool(spread[joined[own]].any()):
            return "some of its units merge with one that merges with others, too"
        return "no weight reads its units"


def _spread(parts: Tensor) -> Tensor:
    """The units that act at several positions of a weight, each time with other units, as broadcast units do.

    `parts` has the units at each position, shape (positions, units at a position).
    """
    row_of = parts.sort(1).values.unique(dim=0, return_inverse=True)[1]
    pairs = torch.stack([parts, row_of[:, None].expand_as(parts)]).flatten(1).T.unique(dim=0)
    units, counts = pairs[:, 0].unique(return_counts=True)
    found: Tensor = units[(counts > 1) & (units != NOBODY)]
    return found


def _index_within(groups: Tensor) -> tuple[Tensor, dict[int, int]]:
    """The index of each of some things among those of its group, and the size of each group."""
    ordered, order = groups.sort(stable=True)
    index = torch.empty_like(groups)
    index[order] = torch.arange(len(groups)) - torch.searchsorted(ordered, ordered)
    kinds, counts = groups.unique(return_counts=True)
    return index, dict(zip(kinds.tolist(), counts.tolist(), strict=True))


def _by_layer(
    side: Mapping[str, Tensor], place: Tensor, layer_of: Tensor, sizes: Mapping[int, int]
) -> dict[int, dict[str, Tensor]]:
    """The places of the units of each layer in each weight, as in `Layer`, by layer.

    Args:
        side: the base unit at each position of each weight.
        place: the index of each base unit in its layer, or −1 if it is in none.
        layer_of: the layer of each.
        sizes: the number of units in each layer.
    """
    found: dict[int, dict[str, Tensor]] = {layer: {} for layer in sizes}
    for name, units in side.items():
        for layer in layer_of[units[place[units] >= 0]].unique().tolist():
            own = place[units].masked_fill(layer_of[units] != layer, -1)
            found[layer][name] = _places(own, sizes[layer])
    return found


def _places(units: Tensor, count: int) -> Tensor:
    """Where each unit is, from the unit at each place, or −1: shape (count, places), as in `Layer`."""
    places = (units >= 0).nonzero().flatten()
    places = places[units[places].argsort(stable=True)]
    counts = torch.bincount(units[places], minlength=count)
    within = torch.arange(len(places)) - (counts.cumsum(0) - counts)[units[places]]
    table = torch.full((count, int(counts.max())), len(units))
    table[units[places], within] = places
    return table
