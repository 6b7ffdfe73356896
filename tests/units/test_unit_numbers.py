"""Unit numbers: who is who, after merging and after finding out."""

import pytest
import torch

from biofx.units.numbers import NOBODY, UnitNumbers, is_one


@pytest.fixture
def numbers():
    return UnitNumbers()


def test_what_is_made_once_has_the_same_numbers_each_time(numbers):
    first = numbers.once("fc", "fc.weight", "weight", 3)
    assert first.tolist() == [1, 2, 3]
    assert numbers.once("other", "other.weight", "weight", 2).tolist() == [4, 5]
    assert torch.equal(numbers.once("fc", "fc.weight", "weight", 3), first)


def test_a_pair_is_a_new_unit_whichever_operator_merges_it(numbers):
    a, b = numbers.once("a", "a", "weight", 2), numbers.once("b", "b", "weight", 2)
    merged = numbers.merge("add", "add", a, b)
    assert not set(merged.tolist()) & {*a.tolist(), *b.tolist()}
    assert torch.equal(numbers.merge("add_1", "add", a, b), merged)


def test_a_pair_of_one_unit_is_that_unit(numbers):
    a = numbers.once("a", "a", "weight", 2)
    assert torch.equal(numbers.merge("add", "add", a, a), a)
    assert torch.equal(numbers.merge("add", "add", a, torch.full_like(a, NOBODY)), a)


def test_entries_of_an_input_may_turn_out_to_be_one_unit(numbers):
    entries = numbers.once("x", "input x", "input", 4)
    numbers.unify(entries.long().view(2, 2))
    assert numbers.once("x", "input x", "input", 4).tolist() == [1, 1, 3, 3]
    assert numbers.unifications == 1


def test_units_of_weights_never_do(numbers):
    units = numbers.once("fc", "fc.weight", "weight", 4)
    numbers.unify(units.long().view(2, 2))
    assert torch.equal(numbers.once("fc", "fc.weight", "weight", 4), units)
    assert numbers.unifications == 0


def test_pairs_are_one_if_their_parts_can_be(numbers):
    units, entries = numbers.once("fc", "fc.weight", "weight", 1), numbers.once("x", "input x", "input", 2)
    merged = numbers.merge("add", "add", units.expand(2), entries)
    numbers.unify(merged.long()[None])
    assert bool(is_one(numbers.standing(entries)[None]))


def test_pairs_of_different_units_stay_different(numbers):
    units, entries = numbers.once("fc", "fc.weight", "weight", 2), numbers.once("x", "input x", "input", 2)
    numbers.unify(numbers.merge("add", "add", units, entries).long()[None])
    assert entries.tolist() == numbers.once("x", "input x", "input", 2).tolist()


def test_starting_again_keeps_who_is_one_and_forgets_pairs(numbers):
    entries = numbers.once("x", "input x", "input", 2)
    units = numbers.once("fc", "fc.weight", "weight", 2)
    numbers.merge("add", "add", units, entries)
    numbers.unify(entries.long()[None])
    numbers.start_again()
    assert bool(is_one(numbers.standing(numbers.once("x", "input x", "input", 2))[None]))
    again = numbers.once("fc", "fc.weight", "weight", 2)
    assert len({*again.tolist(), *numbers.once("x", "input x", "input", 2).tolist()}) == 3


def test_the_summary_counts_what_is_carried(numbers):
    units = numbers.once("fc", "fc.weight", "weight", 3)
    numbers.once("x", "input x", "input", 5)
    populations, owner = numbers.summary([units])
    assert [(p.name, p.origin, p.size) for p in populations] == [("nobody", "constant", 0), ("fc.weight", "weight", 3)]
    assert owner[units.long()].tolist() == [1, 1, 1]


def test_merged_inputs_are_inputs(numbers):
    a, b = numbers.once("a", "input a", "input", 2), numbers.once("b", "input b", "input", 2)
    merged = numbers.merge("add", "add", a, b)
    assert numbers.are_inputs(merged.long())
    assert not numbers.are_inputs(numbers.once("fc", "fc.weight", "weight", 2).long())


@pytest.mark.parametrize(("row", "one"), [([0, 0], True), ([0, 3], True), ([3, 3], True), ([3, 4], False)])
def test_nobody_is_beside_anybody(row, one):
    assert bool(is_one(torch.tensor([row]))) is one
