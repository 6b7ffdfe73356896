"""L1Regularization: a pull towards zero, once for each step."""

import pytest
import torch
from torch.nn import functional as F

import biofx
from biofx import passes
from models.small import mlp
from training_runs import IMAGES, network

X, Y = torch.randn(8, 4).double(), torch.randn(8, 2).double()


def train(model, optimizer, parts=1, extra=lambda: 0.0, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
            ((F.mse_loss(model(x), y) + extra()) / parts).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("parts", [1, 4])
def test_it_is_the_gradient_of_the_penalty(optimizer, parts):
    plain = mlp(4, 6, 2).double()
    bio = biofx.transform(plain, [passes.L1Regularization(0.01)])
    held = optimizer(bio.parameters(), lr=0.01)
    biofx.attach(bio, held)
    train(bio, held, parts)
    weights = [plain[0].weight, plain[2].weight]
    train(plain, optimizer(plain.parameters(), lr=0.01), parts, lambda: 0.01 * sum(w.abs().sum() for w in weights))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(bio.get_parameter(name), parameter)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_gains_act_on_it_as_on_the_rest(optimizer):
    gains = passes.FuzzyLearningRates(nu=0.4)
    plain = mlp(4, 6, 2).double()
    moved = []
    for pipeline in ([gains, passes.L1Regularization(0.5)], [passes.L1Regularization(0.5)]):
        bio = biofx.transform(plain, pipeline)
        held = optimizer(bio.parameters(), lr=0.01)
        biofx.attach(bio, held)
        train(bio, held, steps=1)
        moved.append(bio.get_parameter("0.weight").detach() - plain[0].weight.detach())
    gain = biofx.transform(plain, [gains]).get_buffer("0.weight_synapses.gain")
    torch.testing.assert_close(moved[0], gain * moved[1])


def test_weights_become_smaller():
    sums = []
    for strength in (0.0, 0.1):
        torch.manual_seed(0)
        bio = biofx.transform(mlp(4, 6, 2).double(), [passes.L1Regularization(strength)])
        held = torch.optim.SGD(bio.parameters(), lr=0.1)
        biofx.attach(bio, held)
        sums.append(float(biofx.l1(train(bio, held, steps=50))))
    assert sums[1] < 0.7 * sums[0]


def test_regularization_pulls_towards_zero_under_maximize():
    for optimizer_class in (torch.optim.SGD, torch.optim.Adam):
        bio = biofx.transform(network(), [passes.L1Regularization(0.1)])
        optimizer = optimizer_class(bio.parameters(), lr=0.001, maximize=True)
        biofx.attach(bio, optimizer)
        before = float(biofx.l1(bio))
        for _ in range(5):
            optimizer.zero_grad()
            (0 * bio(IMAGES[:8])).sum().backward()
            optimizer.step()
        assert float(biofx.l1(bio)) < before


def test_bad_options():
    with pytest.raises(biofx.ArgumentError, match="strength must be a number ≥ 0, got -1"):
        passes.L1Regularization(-1)
