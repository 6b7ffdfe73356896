"""Mirrored networks learn, are copied and saved, and meet other passes."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from conftest import flat, gradients, in_turn, loss
from mirrored import Tokens, assert_one_sign, double, doubled, mirror
from models.small import ConvNet, mlp

# --- learning --------------------------------------------------------------------------------------------------------

TOGETHER = {
    "alone": [],
    "split": [passes.SplitSynapses(3), passes.FuzzyLearningRates(nu=0.3)],
    "turnover": [passes.Rejuvenate(dre=4.0)],
    "homeostasis": [passes.SynapticScaling(on="weight", strength=0.1)],
    "all": [passes.SplitSynapses(2), passes.FuzzyLearningRates(), passes.Rejuvenate(), passes.SynapticScaling()],
}


@pytest.mark.parametrize(("others", "optimizer"), in_turn(TOGETHER, [torch.optim.SGD, torch.optim.AdamW]))
def test_the_principle_holds_while_it_learns(others, optimizer):
    model, x = ConvNet().eval(), torch.randn(8, 1, 8, 8)
    bio = biofx.transform(model, [*TOGETHER[others], passes.MirrorUnits()], example_inputs=x)
    torch.testing.assert_close(bio(x), model(x), rtol=1e-4, atol=1e-5)
    optimizer = optimizer(bio.parameters(), lr=0.05)
    with biofx.attach(bio, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            loss(bio.train()(x)).mul(1e-3).backward()
            optimizer.step()
            biofx.verify(bio)
    bio.eval()
    assert_one_sign(bio, x)
    for site in biofx.weight_sites(bio).values():
        if site.sign is not None:
            assert (site.raw * site.sign >= 0).all()  # stored as well
    assert not torch.allclose(bio.stem.weight[..., 0::2, :, :, :], bio.stem.weight[..., 1::2, :, :, :])  # twins part
    torch.testing.assert_close(biofx.fold(bio)(x), bio(x))


def test_a_mirrored_network_learns_as_well_as_the_plain_one():
    x = torch.randn(256, 8)
    y = torch.sin(x[:, :1] * 2) * x[:, 1:2]
    losses = []
    model = mlp(8, 32, 32, 32, 1)
    for candidate in (model, biofx.transform(model, [passes.MirrorUnits()])):
        optimizer = torch.optim.AdamW(candidate.parameters(), lr=3e-3)
        if candidate is not model:
            biofx.attach(candidate, optimizer)
        for _ in range(200):
            optimizer.zero_grad()
            result = F.mse_loss(candidate(x), y)
            result.backward()
            optimizer.step()
        losses.append(float(result))
    assert losses[1] < max(2 * losses[0], 0.02) < float(y.var()) / 4


def test_the_gradient_of_both_twins_is_that_of_the_unit():
    """The incoming weights of the twins feel what the unit felt, one its excitatory and one its inhibitory part."""
    model, x = mlp(3, 5, 4).double(), torch.randn(6, 3, dtype=torch.float64)
    bio = mirror(model, x)
    expected, given = gradients(model, x)["0.weight"], gradients(bio, x)["0.weight"]
    torch.testing.assert_close(given.view(5, 2, 3).sum(1), expected)


# --- around it -------------------------------------------------------------------------------------------------------


def test_copies_and_checkpoints():
    model, x = double("shufflenet")
    bio = mirror(model, *x)
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    other = mirror(model, *x)
    other.load_state_dict(bio.state_dict(), strict=True)
    for again in (copy.deepcopy(bio), torch.load(file, weights_only=False), other):
        biofx.verify(again)
        assert torch.equal(again(*x), bio(*x))


def test_it_draws_nothing_and_disturbs_nothing():
    model = double("efficientnet")[0].train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    results = [biofx.transform(model, [passes.MirrorUnits()], seed=seed).state_dict() for seed in (0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(results[0][n], v) for n, v in results[1].items() if not n.endswith(".seed"))
    assert model.training


def test_a_network_with_zeros_in_it_is_doubled_like_any_other():
    """What is doubled must not depend on values, such as γ = 0 behind the last weight of a residual branch."""
    model, x = double("resnet")
    expected = doubled(mirror(model, *x), model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert doubled(mirror(model, *x), model) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = Tokens().to(dtype), torch.randn(2, 4, 3, dtype=dtype)
    assert doubled(biofx.transform(model, [passes.MirrorUnits()], example_inputs=x), model) == {
        "embed.weight",
        "fc.weight",
    }


def test_the_folded_model_has_other_shapes_than_the_original():
    model = mlp(3, 4, 2)
    bio = mirror(model)
    assert {n: tuple(p.shape) for n, p in biofx.fold(bio).named_parameters()} == {
        "0.weight": (8, 3),
        "0.bias": (8,),
        "2.weight": (2, 8),
        "2.bias": (2,),
    }
    with pytest.raises(biofx.ArgumentError, match=r"0.weight is \(8, 3\) in the folded model and \(4, 3\) in this one"):
        biofx.fold(bio, into=model)


def test_two_passes_that_give_signs():
    with pytest.raises(biofx.PipelineError, match="sign constraint"):
        biofx.transform(mlp(3, 4, 2), "mirror-units,dales-principle")


def test_a_unit_with_both_signs_is_found():
    bio = mirror(mlp(3, 4, 2))
    bio.get_buffer("2.weight_synapses.units").zero_()
    with pytest.raises(biofx.VerificationError, match="1 of its presynaptic units are excitatory and inhibitory"):
        biofx.verify(bio)


def test_units_joined_with_a_parameter_are_left_alone():
    class Latents(nn.Module):
        def __init__(self):
            super().__init__()
            self.latents = nn.Parameter(torch.randn(5, 4))
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.c(self.latents + self.a(x) * self.b(self.latents).softmax(0))

    bio = biofx.transform(Latents(), [passes.MirrorUnits()], example_inputs=torch.randn(5, 4))
    assert "mirror-units: add joins its units with the parameter latents, not doubled" in flat(biofx.summary(bio))
