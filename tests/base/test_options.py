"""Checks of a pass's options."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import biofx
from biofx.base.options import check_activation


@dataclass
class Owner:
    activation: Any

    def __post_init__(self):
        check_activation(self, "activation")


@pytest.mark.parametrize("activation", [None, "relu", "tanh", "softplus", "silu", "log", torch.tanh, nn.Sigmoid()])
def test_activations(activation):
    assert Owner(activation).activation is activation


@pytest.mark.parametrize(
    "activation",
    [
        "nothing",
        "pi",
        "",
        "linear",  # needs more than one tensor
        "dropout",  # random
        "rand_like",
        "bernoulli",
        "Tensor",  # a class
        "t",  # another shape
        "sum",
        "glu",
        "isnan",  # another dtype
        "is_tensor",
        3,
    ],
)
def test_what_is_no_activation(activation):
    rng = torch.get_rng_state()
    with pytest.raises(biofx.ArgumentError, match="passes.Owner: activation must be None, a function, or a name"):
        Owner(activation)
    assert torch.equal(torch.get_rng_state(), rng)


def test_an_activation_is_tried_whatever_the_defaults_are():
    with torch.device("meta"), torch.inference_mode():
        Owner("relu")
        with pytest.raises(biofx.ArgumentError):
            Owner("dropout")
