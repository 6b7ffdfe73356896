"""References: what a module reaches that is not its child."""

import functools

import pytest
import torch
from torch import nn

from biofx.base.references import held_parameters


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_nothing_is_held():
    assert held_parameters(Block()) == set()


@pytest.mark.parametrize(
    "hold",
    [
        lambda layer: [layer.weight],
        lambda layer: {"a": (layer.weight,)},
        lambda layer: functools.partial(torch.add, layer.weight),
        lambda layer: closed(layer.weight),
    ],
    ids=["list", "nested", "partial", "closure"],
)
def test_parameters_that_are_held(hold):
    block = Block()
    block.held = hold(block.layer)
    assert held_parameters(block) == {id(block.layer.weight)}


def closed(weight):
    return lambda: weight.sum()


def test_a_list_that_holds_itself():
    block = Block()
    block.held = [block.layer.weight]
    block.held.append(block.held)
    assert held_parameters(block) == {id(block.layer.weight)}


def test_what_recurrent_layers_hold_is_looked_up_by_name():
    assert held_parameters(nn.LSTM(2, 2)) == set()
