"""Unit numbers: every unit of a network has one, and so has every pair of units that merges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NOBODY = 0  # the number of what comes from no unit: parameters, constants, padding


@dataclass(frozen=True)
class Population:
    """The units that one activation carries.

    Attributes:
        name: where it comes from: the weight whose postsynaptic units they are, `input x`, or the operator that made or
            merged them, with the path of the module that calls it.
        origin: `"weight"`, `"input"` (also what known operators make of inputs only), `"merged"`, `"unknown"`
            (an operator that cannot be followed), `"constant"` (a parameter or constant that a weight reads) or
            `"shared"` (the positions of a weight that is used on different units).
        size: how many units it has.
    """

    name: str
    origin: str
    size: int


class UnitNumbers:
    """The numbers that were given.

    What cannot be followed, or is an input, has a number for each entry of its tensors: such numbers are *elastic*,
    they may turn out to be one unit. The smallest of them then stands for all.

    Attributes:
        unifications: how often numbers turned out to be one unit.
    """

    def __init__(self) -> None:
        self.unifications = 0
        self._populations = [Population("nobody", "constant", 0)]
        self._index: dict[Any, int] = {}  # of a population, by what made it
        self._made: dict[Any, Tensor] = {}  # numbers, by what made them
        self._owner = torch.zeros(1, dtype=torch.int64)  # by number: the index of its population
        self._standing = torch.zeros(1, dtype=torch.int64)  # by number: the number that stands for the unit
        self._parts = torch.zeros(1, 2, dtype=torch.int64)  # by number: the pair that merged, or nobody twice
        self._pairs = torch.zeros(2, 1, dtype=torch.int64)  # keys of all pairs in order, and their numbers

    def once(self, maker: Any, name: str, origin: str, count: int) -> Tensor:
        """The numbers of what `maker` made, shape (count,), float64; the same each time."""
        if maker not in self._made:
            self._made[maker] = self._new(maker, name, origin, torch.zeros(count, 2, dtype=torch.int64))
        return self.standing(self._made[maker]).double()

    def standing(self, numbers: Tensor) -> Tensor:
        """The numbers that stand for units, int64."""
        return self._standing[numbers.long()]

    def are_inputs(self, numbers: Tensor) -> bool:
        """Whether all units are inputs."""
        return all(self._populations[index].origin == "input" for index in self._owner[numbers].unique().tolist())

    def merge(self, maker: Any, name: str, a: Tensor, b: Tensor) -> Tensor:
        """The unit of each pair, which is a new one unless there are fewer than two units in the pair."""
        merged = torch.maximum(a, b)
        two = (a != NOBODY) & (b != NOBODY) & (a != b)
        if not bool(two.any()):
            return merged
        a, b = torch.broadcast_tensors(a, b)
        keys, inverse = torch.unique(a[two].long() << 32 | b[two].long(), return_inverse=True)
        known = self._pairs[0][torch.searchsorted(self._pairs[0], keys).clamp(max=self._pairs.shape[1] - 1)]
        new = keys[known != keys]
        if len(new):
            parts = torch.stack([new >> 32, new & 0xFFFFFFFF], 1)
            origin = "input" if self.are_inputs(parts) else "merged"
            numbers = self._new((maker, origin), name, origin, parts)
            pairs = torch.cat([self._pairs, torch.stack([new, numbers])], 1)
            self._pairs = pairs[:, pairs[0].argsort()]
        found = self._pairs[1, torch.searchsorted(self._pairs[0], keys)]
        merged[two] = self.standing(found)[inverse].double()
        return merged

    def unify(self, rows: Tensor) -> None:
        """Make one unit of the numbers in each row, if they are elastic, or merge what may be one in turn."""
        rows = self.standing(rows)
        rows = rows[~is_one(rows)]
        rows = rows[self._may_be_one(rows)]
        if not len(rows):
            return
        self.unifications += 1
        elastic = self._is_elastic(rows)
        self._stand_together(rows[elastic])
        if not bool(elastic.all()):
            for part in self._parts[rows[~elastic]].unbind(-1):
                self.unify(part)

    def start_again(self) -> None:
        """Forget the numbers of what turned out to be another unit, and all pairs: they are as if never given."""
        made = {maker: self.standing(numbers) for maker, numbers in self._made.items()}
        is_kept = torch.zeros(len(self._standing), dtype=torch.bool)
        for numbers in (torch.tensor([NOBODY]), *made.values()):
            is_kept[numbers] = True
        new = is_kept.cumsum(0) - 1
        self._made = {maker: new[numbers] for maker, numbers in made.items()}
        self._owner = self._owner[is_kept]
        self._standing = torch.arange(len(self._owner))
        self._parts = torch.zeros(len(self._owner), 2, dtype=torch.int64)
        self._pairs = torch.zeros(2, 1, dtype=torch.int64)

    def summary(self, carried: Iterable[Tensor]) -> tuple[tuple[Population, ...], Tensor]:
        """The populations of the numbers in some tensors, and by number the index of its population.

        Numbers that are in no tensor, such as those that turned out to be another unit, are nobody's.
        """
        is_carried = torch.zeros(len(self._owner), dtype=torch.bool)
        for numbers in carried:
            is_carried[numbers.long()] = True
        owner = torch.where(is_carried, self._owner, 0)
        kept, index, sizes = torch.unique(owner, return_inverse=True, return_counts=True)
        populations, count = [Population("nobody", "constant", 0)], Counter[str]()
        for old, size in list(zip(kept.tolist(), sizes.tolist(), strict=True))[1:]:
            population = self._populations[old]
            count[population.name] += 1
            number = f" ({count[population.name]})" if count[population.name] > 1 else ""
            populations.append(replace(population, name=population.name + number, size=size))
        return tuple(populations), index

    def _new(self, maker: Any, name: str, origin: str, parts: Tensor) -> Tensor:
        if maker not in self._index:
            self._index[maker] = len(self._populations)
            self._populations.append(Population(name, origin, 0))
        numbers = torch.arange(len(self._standing), len(self._standing) + len(parts))
        self._standing = torch.cat([self._standing, numbers])
        self._owner = torch.cat([self._owner, torch.full_like(numbers, self._index[maker])])
        self._parts = torch.cat([self._parts, parts])
        return numbers

    def _is_elastic(self, rows: Tensor) -> Tensor:
        elastic = torch.tensor([population.origin in ("input", "unknown") for population in self._populations])
        is_pair = self._parts[rows].any(-1)
        return ((rows == NOBODY) | (elastic[self._owner[rows]] & ~is_pair)).all(1)

    def _may_be_one(self, rows: Tensor) -> Tensor:
        result = self._is_elastic(rows) | is_one(rows)
        merged = ~result & ((rows == NOBODY) | self._parts[rows].any(-1)).all(1)
        if bool(merged.any()):
            first, second = self.standing(self._parts[rows[merged]]).unbind(-1)
            result[merged] = self._may_be_one(first) & self._may_be_one(second)
        return result

    def _stand_together(self, rows: Tensor) -> None:
        while len(rows := self.standing(rows)[~is_one(self.standing(rows))]):
            high = torch.iinfo(torch.int64).max
            lowest = torch.where(rows == NOBODY, high, rows).amin(1, keepdim=True).expand_as(rows)
            self._standing.scatter_reduce_(0, rows[rows != NOBODY], lowest[rows != NOBODY], "amin")
            while not torch.equal(self._standing, self._standing[self._standing]):
                self._standing = self._standing[self._standing]


def is_one(rows: Tensor) -> Tensor:
    """Whether there is no more than one unit in each row."""
    return ((rows == NOBODY) | (rows == rows.amax(1, keepdim=True))).all(1)
