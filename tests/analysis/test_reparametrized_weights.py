"""Weights that are computed from what is learned: masks, norms, orthogonal weights, parametrizations of one's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

import biofx
from biofx import passes
from biofx.weights.facts import Need
from conftest import flat
from models.weights import MODELS
from pipelines import DIVERSE, EVERYTHING

# --- weights that are computed from what is learned ------------------------------------------------------------------

ROOTS = {
    "pruned": lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="cayley"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
@pytest.mark.parametrize("name", ROOTS)
def test_the_root_itself_can_be_reparametrized(name, frontend, inplace):
    if (name, frontend) == ("old spectral norm", "symbolic"):
        pytest.skip("its hook cannot be traced")
    model, x = ROOTS[name]().eval(), torch.randn(2, 4)
    expected = model(x)
    bio = biofx.transform(model, DIVERSE, frontend=frontend, inplace=inplace, example_inputs=x)
    torch.testing.assert_close(bio(x), expected)
    bio(x).sum().backward()
    with torch.no_grad():
        for p in bio.parameters():
            p.sub_(p.grad if p.grad is not None else 0)
    assert not torch.allclose(bio(x), expected)  # it reads what is learned, not what once was computed
    torch.testing.assert_close(biofx.fold(bio)(x), bio(x))


def test_masks_stay_and_signs_are_those_behind_them():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), prune.l1_unstructured(nn.Linear(8, 3), "weight", 0.5))
    bio = biofx.transform(model, [passes.DalesPrinciple(excitatory=0.5), *DIVERSE])
    site = biofx.weight_sites(bio)["2.weight_orig"]
    assert (site.presynaptic_axis, site.postsynaptic_axis) == (1, 0)
    assert site.sign is not None
    mask = model[2].weight_mask
    x = torch.randn(5, 8).abs()
    effect = torch.autograd.functional.jacobian(lambda h: F.linear(h, site.effective() * mask), x[0])
    assert ((effect > 0).any(0) & (effect < 0).any(0)).sum() == 0
    assert torch.equal((effect == 0) | (mask == 1), torch.ones_like(mask, dtype=torch.bool))
    assert torch.equal(biofx.fold(bio).get_submodule("2").weight_mask, mask)


ORTHOGONAL = "cat in {} computes the weight that its operator reads from it"


@pytest.mark.parametrize("frontend", ["symbolic", "module", "export"])
def test_an_orthogonal_weight_stays_orthogonal_and_has_no_axes(frontend):
    build, inputs, weights = MODELS["orthogonal"]
    model, (x,) = build(), inputs()
    bio = biofx.transform(model, [*EVERYTHING, passes.GroupUnits(2)], frontend=frontend, example_inputs=x)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        bio(x).square().sum().backward()
        optimizer.step()
    summary, sites = flat(biofx.summary(bio)), biofx.weight_sites(bio)
    assert set(sites) == weights
    for index in (2, 4):
        site = sites[f"{index}.parametrizations.weight.original"]
        reason = ORTHOGONAL.format(f"{index}.parametrizations.weight.0")
        assert (site.operator, site.axes, site.unmet(Need.AXES)) == ("linear", None, reason)
        axis_free = ["crystallize", "l1-regularization", "rejuvenate", "split-synapses"]
        assert sorted(site.passes) == [*axis_free, "volume-dependent-learning-rates"]
        assert f"dales-principle: {reason}" in summary
        assert (f"group-units: {reason}" in summary) is (frontend != "module")
    assert "forward takes whole numbers from it, by int in 6.parametrizations.weight.0" in summary
    model.load_state_dict(biofx.fold(bio).state_dict(), strict=True)
    for layer in (model[2], model[4], model[6]):
        w = layer.weight if len(layer.weight) <= 4 else layer.weight.T
        torch.testing.assert_close(w @ w.T, torch.eye(4))


def test_units_are_followed_out_of_an_orthogonal_weight_only():
    build, inputs, _ = MODELS["orthogonal"]
    found = biofx.units(build(), example_inputs=inputs())
    assert set(found.readings) == {"0.weight", "8.weight"}
    network = nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3))
    found = biofx.units(network, example_inputs=inputs())
    assert found.describe(found.readings["2.weight"].numbers) == "4: 0.parametrizations.weight.original"


def test_parametrizations_of_one_s_own_are_traced():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight.triu() + weight.triu(1).mT

    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    parametrize.register_parametrization(model[1], "weight", Symmetric())
    bio = biofx.transform(model, DIVERSE, example_inputs=(x,))
    doubled, symmetric = biofx.weight_sites(bio).values()
    assert (doubled.presynaptic_axis, doubled.postsynaptic_axis, doubled.unmet(Need.UNITS)) == (1, 0, None)
    assert symmetric.axes is None  # each entry is used both ways
    assert (
        symmetric.unmet(Need.AXES)
        == "add in 1.parametrizations.weight.0 computes the weight that its operator reads from it"
    )
    torch.testing.assert_close(bio(x), model(x))
    model.load_state_dict(biofx.fold(bio).state_dict(), strict=True)
    torch.testing.assert_close(model(x), bio(x))


def test_a_tensor_subclass_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    bio = biofx.transform(model, DIVERSE, inplace=True)
    assert "0.weight: it is a TwoTensor, and biofx rewrites plain tensors only" in flat(biofx.summary(bio))
