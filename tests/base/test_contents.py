"""Contents: what can be changed inside of a value, and whether it was."""

import copy
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy
import pytest
import torch
from torch import nn

from biofx.base.contents import contents_key, copy_of, holders, is_array, is_holder, put_back, slots_of


class Settings:
    def __init__(self, **values):
        vars(self).update(values)


@dataclass(slots=True)
class Slotted:
    x: int
    y: list


@dataclass(slots=True)
class MoreSlots(Slotted):
    z: int = 0


class Pair(NamedTuple):
    one: list
    two: frozenset


def nested():
    return Settings(
        a=1,
        b=[1, {"x": SimpleNamespace(y=2.0)}],
        c=({3},),
        d=torch.ones(2),
        e=nn.Linear(1, 1),
        f=len,
        h=numpy.ones(3),
        k=Pair([1], frozenset({2})),
        s=MoreSlots(1, [2]),
    )


def differs(holder, content):
    return not numpy.array_equal(holder, content) if is_array(holder) else holder != content


CHANGES = [
    lambda v: setattr(v, "a", 2),
    lambda v: v.b.append(1),
    lambda v: setattr(v.b[1]["x"], "y", 3.0),
    lambda v: v.c[0].add(4),
    lambda v: setattr(v, "g", None),
    lambda v: v.h.__setitem__(1, 5.0),
    lambda v: v.k.one.append(2),
    lambda v: setattr(v.s, "x", 2),
    lambda v: setattr(v.s, "z", 2),
    lambda v: delattr(v.s, "x"),
    lambda v: v.s.y.append(3),
]


@pytest.mark.parametrize("change", CHANGES)
def test_keys_are_equal_as_long_as_nothing_changes(change):
    value = nested()
    before = contents_key(value)
    for other, other_before in (copy.deepcopy((value, before)), pickle.loads(pickle.dumps((value, before)))):
        assert contents_key(other) == other_before
        assert contents_key(other) != before  # it has a tensor and a module of its own
    change(value)
    assert contents_key(value) != before


@pytest.mark.parametrize("change", CHANGES)
def test_holders_are_all_that_can_change(change):
    value = nested()
    unchanged, now = contents_key(value), list(holders(value, set()))
    before = [copy_of(holder) for holder in now]
    change(value)
    assert sum(map(differs, now, before)) == 1
    for holder, content in zip(now, before, strict=True):
        put_back(holder, content)
    assert contents_key(value) == unchanged


def test_tensors_modules_and_functions_are_not_looked_into():
    assert not any(map(is_holder, (torch.ones(1), nn.Linear(1, 1), len, Settings, 1, "text")))


def test_what_holds_itself_comes_to_an_end():
    value = []
    value.append(value)
    assert len(list(holders(value, set()))) == 1
    assert contents_key(value) == contents_key(value)


def test_shared_contents_enter_a_key_once():
    """It would be a tree of 2 ** 16 parts."""
    value = [1]
    for _ in range(16):
        value = [value, value]
    assert len(contents_key(value)) < 200


class Hidden:
    __slots__ = ("__own",)

    def __init__(self):
        self.__own = [1]


class MoreHidden(Hidden):
    __slots__ = ("__own", "other")


def test_private_slots_are_searched_by_the_names_that_they_have():
    value = MoreHidden()
    assert slots_of(MoreHidden) == ("_MoreHidden__own", "other", "_Hidden__own")
    before = contents_key(value)
    value._Hidden__own.append(2)
    assert contents_key(value) != before
