"""Tied weights: a functional call that replaces one of them replaces all, as in the plain model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

import biofx

TOKENS = torch.tensor([[1, 2, 3]])


class Tied(nn.Sequential):
    """An embedding, and a head that reads tokens with the same weight."""

    def __init__(self):
        super().__init__(nn.Embedding(7, 4), nn.Linear(4, 7))
        self[1].weight = self[0].weight


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
@pytest.mark.parametrize("name", ["0.weight", "1.weight"])
@pytest.mark.parametrize("compiled", [False, True])
def test_all_follow_the_one_that_is_replaced(frontend, name, compiled):
    """The others kept their synapses, without a word."""
    model = Tied()
    bio = biofx.transform(model, "split-synapses", example_inputs=TOKENS, frontend=frontend)
    before, given = bio(TOKENS), {name: torch.randn(7, 4, requires_grad=True)}
    call = functional_call
    if compiled:
        call = torch.compile(functional_call, backend="eager")
    result, expected = call(bio, given, (TOKENS,)), functional_call(model, given, (TOKENS,))
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(y.square().sum(), given.values()) for y in (result, expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(bio(TOKENS), before)


def test_all_follow_in_a_model_around():
    model = Tied()
    bio, given = biofx.transform(model, "split-synapses", example_inputs=TOKENS), {"0.1.weight": torch.ones(7, 4)}
    result, expected = (functional_call(nn.Sequential(each), given, (TOKENS,)) for each in (bio, model))
    torch.testing.assert_close(result, expected)


def test_weights_that_are_tied_after_the_transform():
    model, given = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)), {"0.weight": torch.ones(7, 4)}
    bio = biofx.transform(model, "split-synapses", example_inputs=TOKENS)
    for each in (model, bio):
        each[1].weight = each[0].weight
    torch.testing.assert_close(functional_call(bio, given, (TOKENS,)), functional_call(model, given, (TOKENS,)))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_with_a_tied_weight_may_be_removed(compiled):
    """Its place was looked up in each call, which failed."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    model[1].weight = model[2].weight = model[0].weight
    bio, x = biofx.transform(model, "split-synapses"), torch.randn(2, 4)
    call = torch.compile(bio, backend="eager") if compiled else bio
    call(x)
    for each in (model, bio):
        del each[2]
    torch.testing.assert_close(call(x), model(x))
    given = {"0.weight": torch.ones(4, 4)}
    torch.testing.assert_close(functional_call(bio, given, (x,)), functional_call(model, given, (x,)))
