"""SplitSynapses: Γ synapses for each connection."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import biofx
from biofx import passes
from biofx.passes.split_synapses import dirichlet, split
from conftest import flat, gradients, in_turn
from models.small import CONVOLUTIONS, GROUPS, layer_and_input, mlp

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KINDS = [("linear", "dense"), *((kind, grouping) for kind in CONVOLUTIONS for grouping in GROUPS)]


@pytest.mark.parametrize(("kind", "dtype"), in_turn(KINDS, DTYPES))
def test_synapses_sum_to_the_old_weight(kind, dtype):
    kind, grouping = kind
    layer, _ = layer_and_input(kind, grouping, dtype=dtype)
    site = biofx.weight_sites(biofx.transform(layer, [passes.SplitSynapses(4)]))["weight"]
    assert site.raw.dtype is site.effective().dtype is dtype
    assert site.raw.shape == (4, *layer.weight.shape)
    torch.testing.assert_close(site.effective(), layer.weight)


@pytest.mark.parametrize(("kind", "compensate"), in_turn(KINDS, [True, False]))
def test_every_synapse_sees_the_gradient_of_its_connection(kind, compensate):
    kind, grouping = kind
    layer, x = layer_and_input(kind, grouping, dtype=torch.float64)
    bio = biofx.transform(layer, [passes.SplitSynapses(4, compensate=compensate), passes.FuzzyLearningRates(nu=0.3)])
    gain = biofx.weight_sites(bio)["weight"].gain / (4 if compensate else 1)
    expected, given = gradients(layer, x), gradients(bio, x)
    torch.testing.assert_close(given["weight"], gain * expected["weight"])
    torch.testing.assert_close(given["bias"], expected["bias"])


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("attached", [True, False])
def test_the_gradients_of_synapses_share_no_memory(compensate, attached):
    bio = biofx.transform(nn.Linear(3, 2), [passes.SplitSynapses(2, compensate=compensate)])
    raw = biofx.weight_sites(bio)["weight"].raw
    if attached:
        biofx.attach(bio, torch.optim.SGD(bio.parameters(), lr=0.1))
    (gradient,) = torch.autograd.grad(bio(torch.ones(1, 3)).sum(), [raw])
    gradient[0] = 0.0
    assert bool(gradient[1].all())
    gradient.mul_(2)  # as clip_grad_norm_ does


def test_one_synapse_and_neutral_gains_change_not_a_bit(zoo):
    model, x = zoo
    bio = biofx.transform(model, [passes.SplitSynapses(1), passes.FuzzyLearningRates(distribution="baseline")])
    for a, b in zip(gradients(model, x).items(), gradients(bio, x).items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1].reshape(a[1].shape))
    out, again = model(x), bio(x)
    assert all(torch.equal(a, b) for a, b in zip(*map(torch.utils._pytree.tree_leaves, (out, again)), strict=True))


@given(st.integers(2, 12), st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None, max_examples=30)
def test_shares_are_shares(synapses, rows, columns):
    shares = dirichlet(synapses, torch.Size([rows, columns]), torch.Generator().manual_seed(rows))
    assert shares.shape == (synapses, rows, columns)
    assert (shares >= 0).all()
    torch.testing.assert_close(shares.sum(0), torch.ones(rows, columns).double())


@pytest.mark.parametrize("synapses", [2, 4, 10])
def test_shares_have_the_moments_of_the_dirichlet_distribution(synapses):
    """Mean 1/Γ, variance (Γ−1)/(Γ²(Γ+1)), within five standard errors."""
    shares = dirichlet(synapses, torch.Size([50_000]), torch.Generator().manual_seed(0))
    variance = (synapses - 1) / (synapses**2 * (synapses + 1))
    error = 5 * (variance / shares.shape[1]) ** 0.5
    assert (shares.mean(1) - 1 / synapses).abs().max() < error
    torch.testing.assert_close(shares.var(1), torch.full((synapses,), variance).double(), rtol=0.05, atol=0)


def test_synapses_keep_the_sign_of_their_connection():
    weight = torch.randn(20, 20)
    synapses = split(weight, dirichlet(5, weight.shape, torch.Generator().manual_seed(0)))
    assert (synapses * weight.sign() >= 0).all()


def test_equal_shares():
    model = nn.Linear(3, 2)
    bio = biofx.transform(model, [passes.SplitSynapses(4, init="equal")])
    assert torch.equal(bio.get_parameter("weight"), (model.weight / 4).expand(4, -1, -1))


def test_a_connection_learns_as_fast_as_before():
    """With compensation, one step of gradient descent moves the sum of the synapses as it would the plain weight."""
    model, x = mlp(4, 5, 3).double(), torch.randn(6, 4, dtype=torch.float64)
    bio = biofx.transform(model, [passes.SplitSynapses(7)])
    for m in (model, bio):
        m(x).square().sum().backward()
        torch.optim.SGD(m.parameters(), lr=0.1).step()
    for name, site in biofx.weight_sites(bio).items():
        torch.testing.assert_close(site.effective(), model.get_parameter(name))


def oracle(layer, bio, x, synapses, activation):
    """Σ_γ f(operator(x; w_γ, b_γ)), one synapse after the other."""
    result = 0
    bias = bio.get_parameter("bias") if layer.bias is not None else [None] * synapses
    for weight, b in zip(bio.get_parameter("weight"), bias, strict=True):
        single = {"weight": weight} if b is None else {"weight": weight, "bias": b}
        result = result + activation(torch.func.functional_call(layer, single, (x,)))
    return result


@pytest.mark.parametrize(("kind", "bias"), in_turn(KINDS, [True, False]))
def test_per_synapse_activation(kind, bias):
    kind, grouping = kind
    layer, x = layer_and_input(kind, grouping, dtype=torch.float64, bias=bias)
    bio = biofx.transform(layer, [passes.SplitSynapses(3, activation="softplus"), passes.FuzzyLearningRates()])
    expected = oracle(layer, bio, x, 3, nn.functional.softplus)
    torch.testing.assert_close(bio(x), expected)
    if bias:
        torch.testing.assert_close(bio.get_parameter("bias"), (layer.bias / 3).expand(3, -1))
    raw = [bio.get_parameter(name) for name in (["weight", "bias"] if bias else ["weight"])]
    wanted = torch.autograd.grad(expected.square().sum(), raw)
    given = torch.autograd.grad(bio(x).square().sum(), raw)
    torch.testing.assert_close(given[0], wanted[0] * bio.weight_synapses.gain / 3)
    if bias:
        torch.testing.assert_close(given[1], wanted[1] / 3)


def test_per_synapse_activation_takes_any_leading_dimensions():
    layer = nn.Linear(4, 5)
    bio = biofx.transform(layer, [passes.SplitSynapses(3, activation="relu")])
    for x in (torch.randn(4), torch.randn(2, 3, 4)):
        torch.testing.assert_close(bio(x), oracle(layer, bio, x, 3, torch.relu))


def test_per_synapse_activation_of_a_reused_module():
    shared = nn.Linear(3, 3)
    bio = biofx.transform(nn.Sequential(shared, shared), [passes.SplitSynapses(2, activation="tanh")])
    x = torch.randn(5, 3)
    layer = bio.get_submodule("0")
    expected = oracle(shared, layer, oracle(shared, layer, x, 2, torch.tanh), 2, torch.tanh)
    torch.testing.assert_close(bio(x), expected)


def test_a_split_bias_is_no_synapse_in_the_summary():
    text = biofx.summary(biofx.transform(nn.Linear(4, 2), [passes.SplitSynapses(2, activation="tanh")]))
    assert "not synapses: bias" in text
    assert "left alone" not in text


class ComputedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return nn.functional.linear(x, self.fc.weight, 2 * self.fc.bias)


def test_a_bias_that_cannot_be_split_leaves_the_weight_alone():
    model = nn.Sequential(ComputedBias(), nn.Linear(3, 3))
    bio = biofx.transform(model, [passes.SplitSynapses(2, activation="tanh")])
    assert bio.get_parameter("0.fc.weight").dim() == 2
    assert "its operator's bias is computed, or shared with something else" in flat(biofx.summary(bio))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"synapses": 0}, "passes.SplitSynapses: synapses must be an integer ≥ 1, got 0"),
        ({"synapses": -2}, "synapses must be an integer ≥ 1, got -2"),
        ({"synapses": 2.5}, "synapses must be an integer ≥ 1, got 2.5"),
        ({"synapses": True}, "synapses must be an integer ≥ 1, got True"),
        ({"init": "uniform"}, "init must be one of dirichlet, equal, got 'uniform'"),
        ({"compensate": 1}, "compensate must be True or False, got 1"),
        ({"activation": "reluu"}, "activation must be None, a function, or a name in torch.nn.functional .*'reluu'"),
        ({"activation": 3}, "activation must be None, a function, or a name in torch.nn.functional"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(biofx.ArgumentError, match=message):
        passes.SplitSynapses(**options)
