"""A weight at a step: rules see the weights of synapses, whatever is stored for them."""

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.plastic_weight import PlasticWeight

CONSTRAINTS = ["project", "abs", "softplus"]


@pytest.fixture(params=CONSTRAINTS)
def weight(request):
    """The second weight of a network under Dale's principle, before the first step of an optimizer."""
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 6)).double()
    bio = biofx.transform(model, [passes.DalesPrinciple(constraint=request.param, balance=False)])
    bio(torch.randn(3, 4, dtype=torch.float64)).square().sum().backward()
    site = biofx.weight_sites(bio)["2.weight"]
    optimizer = torch.optim.SGD(bio.parameters())
    return PlasticWeight(site, site.raw, site.raw.grad, optimizer, 1, "dales-principle")


def test_the_value_is_what_the_operator_receives(weight):
    torch.testing.assert_close(weight.value, weight.site.effective().detach())


def test_without_a_constraint_the_value_is_what_is_stored():
    site = biofx.weight_sites(biofx.transform(nn.Linear(3, 2), [passes.L1Regularization()]))["weight"]
    plain = PlasticWeight(site, site.raw, torch.zeros(2, 3), None, 1)
    assert torch.equal(plain.value, site.raw)
    assert torch.equal(plain.slope, site.raw.sign())


@torch.no_grad()
def test_an_assigned_value_is_what_the_operator_receives(weight):
    wanted = weight.value * torch.rand(6, 10)
    weight.assign(wanted)
    torch.testing.assert_close(weight.site.effective(), wanted)


@torch.no_grad()
def test_so_is_a_replaced_one(weight):
    mask = torch.rand(6, 10) < 0.5
    new = torch.rand(int(mask.sum()), dtype=torch.float64) * weight.site.sign.expand(6, 10)[mask]
    others = weight.value[~mask]
    weight.replace(mask, new)
    torch.testing.assert_close(weight.site.effective()[mask], new)
    assert torch.equal(weight.value[~mask], others)


def test_the_slope_is_the_derivative_of_the_magnitude_of_what_is_stored(weight):
    weight.raw.grad = None
    weight.site.effective().abs().sum().backward()
    torch.testing.assert_close(weight.slope, weight.raw.grad)
