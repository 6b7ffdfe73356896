"""Unit numbers: every unit of a network has one, and so has every set of units that merge into one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_HIGHEST = torch.iinfo(torch.int64).max
NOBODY = 0  # the number of what comes from no unit: parameters, constants, padding
MOST = 1 << 24  # units of one tensor that cannot be followed


@dataclass(frozen=True)
class Population:
    """The units that one activation carries.

    Attributes:
        name: where it comes from: the weight whose postsynaptic units they are, `input x`, or the operator that made or
            merged them, with the path of the module that calls it.
        origin: `"weight"`, `"input"` (also what is made of inputs only), `"merged"`, `"unknown"` (an operator that
            cannot be followed), `"foreign"` (a tensor that no operator of the run made), `"constant"` (a parameter or
            constant that a weight reads) or `"shared"` (the positions of a weight whose units are unknown).
        size: how many units it has.
    """

    name: str
    origin: str
    size: int


@dataclass(frozen=True, eq=False)
class _Block:
    """Numbers that were given together.

    Attributes:
        population: their population.
        start: the first of them.
        count: how many there are.
        parts: the base units that each of them is the set of: vectors of their numbers, by a digest.
    """

    population: int
    start: int
    count: int
    parts: Mapping[bytes, Tensor]


class UnitNumbers:
    """The numbers that were given, and which of them are of one class.

    A unit that others merge into is the *set* of the units in it: merging is associative, commutative and idempotent,
    so a leak, a gate or a running sum of itself makes no new unit. Units that one column of a weight reads are of one
    *class*, and have one sign; the lowest number stands for the class. Merges are those of classes.
    """

    def __init__(self) -> None:
        self.populations = [Population("nobody", "constant", 0)]
        self.representative = torch.zeros(1, dtype=torch.int64)  # by number
        self._blocks = [_Block(0, 0, 1, {})]
        self._starts = torch.full((64,), _HIGHEST)  # of blocks, in order; longer than there are blocks
        self._starts[0] = 0
        self._made: dict[Any, Tensor] = {}
        self._index: dict[Any, int] = {}  # of a population, by what made it
        self._merged: dict[Any, Tensor] = {}
        self._sets: dict[bytes, int] = {}  # numbers of small sets
        self._owner = torch.zeros(1, dtype=torch.int64)

    def __len__(self) -> int:
        last = self._blocks[-1]
        return last.start + last.count

    def numbers_for(self, maker: Any, name: str, origin: str, count: int) -> Tensor:
        """The numbers of what `maker` made, shape (count,); the same each time."""
        if maker not in self._made:
            numbers = self._give(self._population(maker, name, origin), count, {})
            self._blocks[-1] = replace(self._blocks[-1], parts={_digest(numbers): numbers})
            self._made[maker] = numbers
        return self._made[maker]

    def population_of(self, maker: Any) -> int | None:
        """The index of the population of what `maker` made."""
        return self._index.get(maker)

    def classes(self, numbers: Tensor) -> Tensor:
        """The numbers that stand for the classes of units."""
        known = len(self.representative)
        return torch.where(numbers < known, self.representative[numbers.clamp(max=known - 1)], numbers)

    def settled(self, numbers: Tensor) -> Tensor:
        """Unit numbers; entries of inputs, or of what cannot be followed, that turned out to be one unit share one."""
        return torch.where(self._is_elastic()[numbers], self.classes(numbers), numbers)

    def _is_elastic(self) -> Tensor:
        """By number: whether it may turn out to be the same unit as another."""
        elastic = [i for i, p in enumerate(self.populations) if p.origin in ("input", "unknown", "foreign")]
        return torch.isin(self.owner(), torch.tensor(elastic, dtype=torch.int64))

    def owner(self) -> Tensor:
        """The index in `populations` of each number's population."""
        if len(self._owner) != len(self):
            counts = torch.tensor([block.count for block in self._blocks])
            self._owner = torch.repeat_interleave(torch.tensor([block.population for block in self._blocks]), counts)
        return self._owner

    def merge(self, maker: Any, name: str, a: Tensor, b: Tensor) -> Tensor:
        """The set of each pair of units, which is a new unit unless one of the two is in the other, or nobody."""
        a, b = self.classes(a), self.classes(b)
        merged = torch.maximum(a, b)  # NOBODY is 0, so this is the other unit, or the same one twice
        two = (a != NOBODY) & (b != NOBODY) & (a != b)
        if not bool(two.any()):
            return merged
        a, b = torch.broadcast_tensors(a, b)
        # A pair is one integer, which `unique` finds faster than rows; numbers stay below 2³².
        keys, inverse = torch.unique(a[two] << 32 | b[two], return_inverse=True)
        result = torch.broadcast_to(merged, two.shape).clone()
        result[two] = self._merge_pairs(maker, name, keys >> 32, keys & 0xFFFFFFFF)[inverse]
        return result

    def are_open(self, numbers: Tensor) -> Tensor:
        """Whether units are entries of inputs, or of what cannot be followed, of a class of their own so far."""
        alone = torch.ones(len(self), dtype=torch.bool)
        alone[: len(self.representative)] = torch.bincount(self.representative)[self.representative] == 1
        return (self._is_elastic() & alone)[numbers]

    def may_be_one(self, rows: Tensor) -> bool:
        """Whether the units in each row are one, or may become one: entries of inputs, and what cannot be followed."""
        rows = rows[(rows != rows.amax(1, keepdim=True)).any(1)] if rows.numel() else rows[:0]
        return bool(((rows == NOBODY) | self._is_elastic()[rows]).all())

    def mix_positions(self, rows: Tensor) -> bool:
        """Whether a row has several units of which another row has one, as weights over tokens read them."""
        rows = self.classes(rows)
        if rows.shape[0] < 2 or rows.shape[1] < 2:
            return False
        positions = torch.arange(len(rows))[:, None].expand_as(rows)
        known = (rows != NOBODY) & ~self.are_open(rows)
        pairs = torch.unique(positions[known] << 32 | rows[known])
        position, unit = pairs >> 32, pairs & 0xFFFFFFFF
        _, index, readers = torch.unique(unit, return_inverse=True, return_counts=True)
        of_position = torch.bincount(position, minlength=len(rows))
        return bool(((readers[index] > 1) & (of_position[position] > 1)).any())

    def unite(self, rows: Tensor) -> None:
        """Make one class of the units in each row, shape (rows, units)."""
        if not rows.numel():
            return
        rows = self.classes(rows.reshape(rows.shape[0], -1))
        lowest = torch.where(rows == NOBODY, _HIGHEST, rows).amin(1, keepdim=True).expand_as(rows)
        differ = (rows != NOBODY) & (rows != lowest)
        if not bool(differ.any()):
            return
        pairs = torch.unique(lowest[differ] << 32 | rows[differ])
        known = torch.arange(len(self))
        known[: len(self.representative)] = self.representative
        self.representative = connected(known, torch.stack([pairs >> 32, pairs & 0xFFFFFFFF]))

    def named(self, carried: Iterable[Tensor]) -> tuple[tuple[Population, ...], Tensor]:
        """The populations of some numbers, with distinct names, and by number the index of its population.

        Numbers that are not carried are nobody's, unless they are of a weight's units of which others are.
        """
        is_carried = torch.zeros(len(self), dtype=torch.bool)
        for numbers in carried:
            is_carried[numbers] = True
        owners = self.owner()
        whole = [i for i in owners[is_carried].unique().tolist() if self.populations[i].origin == "weight"]
        is_carried |= torch.isin(owners, torch.tensor(whole, dtype=torch.int64))
        is_carried[NOBODY] = False
        owner = torch.where(is_carried, self.owner(), 0)
        kept, index, sizes = torch.unique(owner, return_inverse=True, return_counts=True)
        populations, count = [self.populations[0]], Counter[str]()
        for old, size in list(zip(kept.tolist(), sizes.tolist(), strict=True))[1:]:
            population = self.populations[old]
            count[population.name] += 1
            number = f" ({count[population.name]})" if count[population.name] > 1 else ""
            populations.append(replace(population, name=population.name + number, size=size))
        return tuple(populations), index

    # --- sets ----------------------------------------------------------------------------------------------------

    def _merge_pairs(self, maker: Any, name: str, a: Tensor, b: Tensor) -> Tensor:
        """The numbers of the sets of pairs, which are all different."""
        of_a, of_b = (torch.searchsorted(self._starts, numbers, right=True) - 1 for numbers in (a, b))
        result = torch.zeros_like(a)
        for key in torch.unique(of_a << 32 | of_b).tolist():
            chosen = (of_a == key >> 32) & (of_b == key & 0xFFFFFFFF)
            result[chosen] = self._merge_blocks(maker, name, key >> 32, a[chosen], key & 0xFFFFFFFF, b[chosen])
        return result

    def _merge_blocks(self, maker: Any, name: str, block_a: int, a: Tensor, block_b: int, b: Tensor) -> Tensor:
        parts_a, parts_b = self._parts(block_a, a), self._parts(block_b, b)
        if parts_a.keys() >= parts_b.keys():
            return a
        if parts_b.keys() >= parts_a.keys():
            return b
        parts = {**parts_a, **parts_b}
        key = frozenset(parts)
        if key not in self._merged:
            known = self._known_sets(parts)
            if known is not None:
                self._merged[key] = known
                return known
            origins = {self.populations[self._blocks[block].population].origin for block in (block_a, block_b)}
            origin = "input" if origins == {"input"} else "merged"
            numbers = self._give(self._population((maker, origin), name, origin), len(a), parts)
            self._merged[key] = numbers
            self._sets.update(zip(_sets(parts), numbers.tolist(), strict=False))
        return self._merged[key]

    def _known_sets(self, parts: Mapping[bytes, Tensor]) -> Tensor | None:
        """The numbers that some sets have already, if all have one: as units of a larger block, or in another order."""
        found = [self._sets.get(units) for units in _sets(parts)]
        return None if not found or None in found else torch.tensor(found)

    def _parts(self, block: int, numbers: Tensor) -> Mapping[bytes, Tensor]:
        """The base units in some numbers of a block."""
        found = self._blocks[block]
        places = numbers - found.start
        if len(places) == found.count and torch.equal(places, torch.arange(found.count)):
            return found.parts
        parts = [part[places] for part in found.parts.values()]
        return {_digest(part): part for part in parts}

    def parts_of(self, numbers: Tensor) -> list[Tensor]:
        """The base units that some units consist of: vectors with one for each, nobody where there are no more."""
        blocks = torch.searchsorted(self._starts, numbers.contiguous(), right=True) - 1
        found: list[Tensor] = []
        for index in blocks.unique().tolist():
            block, chosen = self._blocks[index], blocks == index
            for part in block.parts.values():
                vector = torch.zeros_like(numbers)
                vector[chosen] = part[numbers[chosen] - block.start]
                found.append(vector)
        return found

    def _population(self, maker: Any, name: str, origin: str) -> int:
        if maker not in self._index:
            self._index[maker] = len(self.populations)
            self.populations.append(Population(name, origin, 0))
        return self._index[maker]

    def _give(self, population: int, count: int, parts: Mapping[bytes, Tensor]) -> Tensor:
        numbers = torch.arange(len(self), len(self) + count)
        self._blocks.append(_Block(population, len(self), count, parts))
        if len(self._blocks) > len(self._starts):
            self._starts = torch.cat([self._starts, torch.full_like(self._starts, _HIGHEST)])
        self._starts[len(self._blocks) - 1] = self._blocks[-1].start
        return numbers


def _sets(parts: Mapping[bytes, Tensor]) -> list[bytes]:
    """The base units in each of some units, as keys; none if there are many."""
    vectors = list(parts.values())
    if len(vectors) > 4 or len(vectors[0]) > 4096:
        return []
    return [row.tobytes() for row in torch.stack(vectors, 1).sort(1).values.numpy()]


def _digest(numbers: Tensor) -> bytes:
    return hashlib.blake2b(numbers.contiguous().numpy().tobytes(), digest_size=16).digest() + len(numbers).to_bytes(
        4, "little"
    )


def connected(found: Tensor, edges: Tensor) -> Tensor:
    """The smallest number of the component of each number, by pointer jumping.

    Args:
        found: a number of its component that is known, for each; changed in place.
        edges: pairs of numbers that are of one component, shape (2, edges).
    """
    while not torch.equal(*(ends := found[edges])):  # each takes the smallest at its edges, then of its component
        for end in ends:
            found.scatter_reduce_(0, end, ends.amin(0), "amin")
        while not torch.equal(found, found[found]):
            found = found[found]
    return found


def different_columns(numbers: Tensor) -> Tensor:
    """The columns of a matrix without repetitions, distinguished by a 64-bit hash of each.

    Comparing whole columns takes minutes for large feature maps. Two of a million columns collide with a probability
    of 3·10⁻⁸.
    """
    if numbers.shape[1] < 2:
        return numbers
    factors = torch.empty(len(numbers), 1, dtype=torch.int64)
    factors.random_(-_HIGHEST, _HIGHEST, generator=torch.Generator().manual_seed(0))
    keys, inverse = torch.unique((numbers * factors).sum(0), return_inverse=True)
    chosen = torch.empty_like(keys).scatter_(0, inverse, torch.arange(len(inverse)))
    return numbers[:, chosen]
