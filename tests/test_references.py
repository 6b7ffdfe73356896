"""References: what a module reaches that is not its child."""

import functools

import pytest
import torch
from torch import nn

from biofx.references import held_parameters, outside


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(Block(), Block())
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("hold", "found"),
    [
        (lambda model, block: block.layer, None),
        (lambda model, block: nn.Linear(2, 2), None),
        (lambda model, block: [model.encoder[1]], "encoder"),
        (lambda model, block: {"a": (model.encoder[1].layer,)}, "encoder"),
        (lambda model, block: [model.head], ""),
        (lambda model, block: model.head.weight, ""),
        (lambda model, block: model.head.forward, ""),
        (lambda model, block: functools.partial(torch.add, model.head.weight), ""),
    ],
    ids=["its own", "unknown", "neighbour", "nested", "far away", "parameter", "method", "partial"],
)
def test_the_smallest_module_around_what_is_referred_to(hold, found):
    model = Model()
    block = model.encoder[0]
    object.__setattr__(block, "held", hold(model, block))
    assert outside(model, "encoder.0") == found


def test_a_list_that_holds_itself():
    model = Model()
    held = [model.head]
    held.append(held)
    model.encoder[0].held = held
    assert outside(model, "encoder.0") == ""


def test_parameters_that_are_held_in_an_island():
    block = Block()
    block.held = [block.layer.weight]
    assert held_parameters(block) == {id(block.layer.weight)}


def test_what_recurrent_layers_hold_is_looked_up_by_name():
    assert held_parameters(nn.LSTM(2, 2)) == set()
