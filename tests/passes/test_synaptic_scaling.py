"""SynapticScaling: homeostasis through gradients or weights."""

import math

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.passes.synaptic_scaling import gradient_factor, weight_factor
from conftest import gradients
from models.small import CONVOLUTIONS, GROUPS, layer_and_input

KINDS = [("linear", "dense"), *((kind, grouping) for kind in CONVOLUTIONS for grouping in GROUPS)]


def test_the_factors():
    activity, target = torch.tensor([0.0, 0.25, 1.0, 4.0, 1e6]).double(), torch.tensor(1.0).double()
    torch.testing.assert_close(gradient_factor(activity, target, 0.5), torch.tensor([2.0, 2.0, 1.0, 0.5, 0.5]).double())
    torch.testing.assert_close(weight_factor(activity, target, 0.1), torch.tensor([1.1, 1.075, 1.0, 0.7, 0.5]).double())
    assert gradient_factor(torch.zeros(1), torch.tensor(0.0), 0.5) == 1


def attached(layer, lr=0.0, **options):
    bio = biofx.transform(layer, [passes.SynapticScaling(**options)])
    optimizer = torch.optim.SGD(bio.parameters(), lr=lr)
    biofx.attach(bio, optimizer)
    return bio, optimizer


def step(bio, optimizer, *batches):
    optimizer.zero_grad()
    for batch in batches:
        bio(batch).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("kind", "grouping"), KINDS)
def test_activity_is_measured_for_every_unit_of_every_operator(kind, grouping):
    layer, x = layer_and_input(kind, grouping, dtype=torch.float64)
    bio, optimizer = attached(layer, memory=0.0)
    step(bio, optimizer, x)
    output = layer(x).abs().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(bio.weight_synapses.activity, output.mean(0))


@pytest.mark.parametrize(("kind", "grouping"), KINDS)
def test_weights_are_scaled_by_their_postsynaptic_unit(kind, grouping):
    """Scaling the weights of a unit scales its output: the layer without bias shows whose weights they are."""
    layer, x = layer_and_input(kind, grouping, dtype=torch.float64, bias=False)
    bio, optimizer = attached(layer, on="weight", target=1.0, strength=0.1)
    before = layer(x)
    step(bio, optimizer, x)
    factor = 1 + 0.1 * (1 - bio.weight_synapses.activity)
    torch.testing.assert_close(bio(x), (before.movedim(1, -1) * factor).movedim(-1, 1))


@pytest.mark.parametrize(("kind", "grouping"), KINDS)
def test_gradients_are_scaled_by_their_postsynaptic_unit(kind, grouping):
    layer, x = layer_and_input(kind, grouping, dtype=torch.float64, bias=False)
    bio, optimizer = attached(layer, target=0.1, strength=0.1)
    step(bio, optimizer, x)
    factor = (0.1 / bio.weight_synapses.activity).pow(0.1).clamp(0.5, 2)
    assert factor.std() > 0
    biofx.detach(bio)  # the hooks act in the backward pass again
    expected = gradients(layer, x)["weight"]
    torch.testing.assert_close(gradients(bio, x)["weight"], expected * biofx.weight_sites(bio)["weight"].spread(factor))


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 5, 6), (2, 3, 4, 6)])
def test_any_leading_dimensions(shape):
    layer = nn.Linear(6, 4).double()
    bio, optimizer = attached(layer, memory=0.0)
    x = torch.randn(shape, dtype=torch.float64)
    step(bio, optimizer, x)
    torch.testing.assert_close(bio.weight_synapses.activity, layer(x).abs().reshape(-1, 4).mean(0))


def test_the_running_mean_and_accumulation():
    layer = nn.Linear(6, 4).double()
    bio, optimizer = attached(layer, memory=0.75)
    batches = torch.randn(6, 8, 6, dtype=torch.float64)
    step(bio, optimizer, batches[0], batches[1])
    first = layer(batches[:2]).abs().mean((0, 1))
    torch.testing.assert_close(bio.weight_synapses.activity, first)
    step(bio, optimizer, batches[2])
    torch.testing.assert_close(bio.weight_synapses.activity, 0.75 * first + 0.25 * layer(batches[2]).abs().mean(0))


def test_units_approach_the_target():
    bio, optimizer = attached(nn.Linear(20, 10), on="weight", target=2.0, strength=0.05)
    x = torch.randn(64, 20)
    for _ in range(200):
        step(bio, optimizer, x)
    torch.testing.assert_close(bio.weight_synapses.activity, torch.full((10,), 2.0).double(), rtol=0.1, atol=0)


def test_the_default_target_is_the_mean_of_the_population():
    layer = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [3.0]]))
    bio, optimizer = attached(layer, on="weight", strength=0.1)
    step(bio, optimizer, torch.ones(1, 1))
    torch.testing.assert_close(bio.weight.detach(), torch.tensor([[1.1], [2.7]]))


def test_nothing_happens_before_anything_was_seen():
    bio, optimizer = attached(nn.Linear(3, 2).eval(), on="weight", target=5.0)
    before = bio.weight.detach().clone()
    step(bio, optimizer, torch.ones(1, 3))
    assert torch.equal(bio.weight, before)


def test_the_observer_sees_units_also_behind_a_per_synapse_activation():
    pipeline = [passes.SplitSynapses(3, activation="relu"), passes.SynapticScaling(memory=0.0)]
    bio = biofx.transform(nn.Conv2d(2, 4, 3, groups=2), pipeline)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.0)
    biofx.attach(bio, optimizer)
    x = torch.randn(3, 2, 6, 6)
    step(bio, optimizer, x)
    torch.testing.assert_close(bio.weight_synapses.activity, bio(x).abs().mean((0, 2, 3)).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0}, "target must be a number > 0, got 0"),
        ({"strength": -1}, "strength must be a number > 0, got -1"),
        ({"on": "bias"}, "on must be one of gradient, weight, got 'bias'"),
        ({"memory": 1}, "memory must be a number ≥ 0 and < 1, got 1"),
        ({"target": math.nan}, "target must be a number > 0, got nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(biofx.ArgumentError, match=message):
        passes.SynapticScaling(**options)
