"""VolumeDependentLearningRates: learning falls with size, with noise that is fixed within a step."""

import math

import pytest
import torch

import biofx
from biofx import passes
from biofx.passes.volume_dependent_learning_rates import volume_factor, volume_factors
from conftest import gradients
from models.small import mlp

X = torch.randn(5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def build(**options):
    plain = mlp(40, 50, 30).double()
    return plain, biofx.transform(plain, [passes.VolumeDependentLearningRates(**options)])


def factors(plain, bio, name="0.weight"):
    return gradients(bio, X)[name] / gradients(plain, X)[name]


def test_the_formula():
    w, z = torch.tensor([0.0, 1.0, -3.0]).double(), torch.tensor([0.0, 1.0, -6.0]).double()
    expected = [0.1, 0.1 * math.exp(-1) * 1.2, 0.1 * math.exp(-1.5) * abs(1 - 1.2)]
    torch.testing.assert_close(volume_factor(w, z, 0.1, 2.0, 0.2), torch.tensor(expected).double())
    torch.testing.assert_close(volume_factors([w], [z], 0.1, 2.0, 0.2), [torch.tensor(expected).double()])


def test_without_variability_it_is_a_function_of_the_weight():
    plain, bio = build(variability=0.0, base_lr=0.3, stability=1.5)
    w = plain.get_parameter("0.weight").detach().abs()
    given = factors(plain, bio)
    learns = torch.isfinite(given)  # the others belong to units that no image excites
    torch.testing.assert_close(given[learns], (0.3 * torch.exp(-1.5 * w / (w + 1)))[learns])


def test_the_noise_has_the_moments_asked_for():
    plain, bio = build(variability=0.2)
    w = plain.get_parameter("0.weight").detach().abs()
    relative = factors(plain, bio) / (0.1 * torch.exp(-2 * w / (w + 1)))
    relative = relative[torch.isfinite(relative)]
    assert abs(relative.mean() - 1) < 5 * 0.2 / math.sqrt(relative.numel())
    torch.testing.assert_close(relative.std(), torch.tensor(0.2).double(), rtol=0.1, atol=0)


def test_the_noise_is_new_at_every_step_and_the_same_within_one():
    plain, bio = build()
    first = factors(plain, bio)
    assert torch.equal(first.nan_to_num(), factors(plain, bio).nan_to_num())
    biofx.weight_sites(bio)["0.weight"].state("steps").add_(1)
    second = factors(plain, bio)
    assert not torch.isclose(first, second).any()


def test_sites_and_seeds_have_their_own_noise():
    plain, bio = build()
    other = biofx.transform(plain, [passes.VolumeDependentLearningRates()], seed=1)
    assert not torch.isclose(factors(plain, bio), factors(plain, other)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    bio = biofx.transform(mlp(4, 4).to(dtype), [passes.VolumeDependentLearningRates()])
    grad = gradients(bio, torch.randn(3, 4, dtype=dtype))["0.weight"]
    assert grad.dtype is dtype
    assert torch.isfinite(grad).all()


def test_per_sample_gradients_add_up():
    _, bio = build()
    parameters = dict(bio.named_parameters())

    def loss(p, x):
        return torch.func.functional_call(bio, p, (x[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X)
    expected = gradients(bio, X)
    torch.testing.assert_close(per_sample["0.weight_synapses.weight"].sum(0), expected["0.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_lr": 0}, "base_lr must be a number > 0, got 0"),
        ({"stability": -1}, "stability must be a number > 0, got -1"),
        ({"variability": -0.1}, "variability must be a number ≥ 0, got -0.1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(biofx.ArgumentError, match=message):
        passes.VolumeDependentLearningRates(**options)
