"""Contents: what can be changed inside of a value, and whether it was."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from biofx.contents import frozen, holders, is_holder


class Settings:
    def __init__(self, **values):
        vars(self).update(values)


def nested():
    return Settings(a=1, b=[1, {"x": SimpleNamespace(y=2.0)}], c=({3},), d=torch.ones(2), e=nn.Linear(1, 1), f=len)


CHANGES = [
    lambda v: setattr(v, "a", 2),
    lambda v: v.b.append(1),
    lambda v: setattr(v.b[1]["x"], "y", 3.0),
    lambda v: v.c[0].add(4),
    lambda v: setattr(v, "g", None),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_frozen_is_equal_as_long_as_nothing_changes(change):
    value = nested()
    before = frozen(value)
    assert frozen(copy.deepcopy(value)) == before
    assert pickle.loads(pickle.dumps(before)) == before
    change(value)
    assert frozen(value) != before


@pytest.mark.parametrize("change", CHANGES)
def test_holders_are_all_that_can_change(change):
    value = nested()
    now = list(holders(value, set()))
    before = [holder.copy() for holder in now]
    change(value)
    assert sum(new != old for new, old in zip(now, before, strict=True)) == 1


def test_tensors_modules_and_functions_are_not_looked_into():
    assert not any(map(is_holder, (torch.ones(1), nn.Linear(1, 1), len, Settings, 1, "text")))


def test_what_holds_itself_comes_to_an_end():
    value = []
    value.append(value)
    assert len(list(holders(value, set()))) == 1
    assert frozen(value) == frozen(value)
