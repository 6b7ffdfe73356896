"""ExponentiatedGradient: synapses grow and shrink by factors, so that none changes its sign."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from biofx.passes.exponentiated_gradient import exponentiated, multiply_
from biofx.training.compiling import over_blocks
from conftest import flat
from copying_optimizers import Master
from models.small import ConvNet, mlp

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)).double()
Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(2)).double()
WEIGHTS = ("0.weight", "2.weight")
PAPER = passes.ExponentiatedGradient(scale=1.0)

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
}


def network():
    torch.manual_seed(0)
    return mlp(6, 8, 3).double()


def train(model, optimizer, steps=1, factor=1.0):
    for _ in range(steps):
        optimizer.zero_grad()
        (factor * F.mse_loss(model(X), Y)).backward()
        optimizer.step()


def trained(pipeline, optimizer_of, steps=1, model=None, **options):
    bio = biofx.transform(network() if model is None else model, pipeline)
    optimizer = optimizer_of(bio.parameters())
    biofx.attach(bio, optimizer, **options)
    train(bio, optimizer, steps)
    return bio


def plainly(optimizer_of, steps=1):
    model = network()
    train(model, optimizer_of(model.parameters()), steps)
    return model


def weights(model):
    """Effective weights, by name."""
    if isinstance(model, torch.fx.GraphModule):
        return {name: site.effective().detach() for name, site in biofx.weight_sites(model).items()}
    return {name: model.get_parameter(name).detach() for name in WEIGHTS}


def exponents(before, after):
    """By what power of e each synapse changed, times its sign."""
    return {name: (after[name] / before[name]).log() * before[name].sign() for name in before}


# --- the rule ----------------------------------------------------------------------------------------------------


def test_it_is_the_rule_of_the_paper_with_sgd():
    model, rate = network(), 0.05
    bio = trained([PAPER], lambda p: torch.optim.SGD(p, lr=rate), 20)
    for _ in range(20):
        model.zero_grad()
        F.mse_loss(model(X), Y).backward()
        for name, p in model.named_parameters():
            with torch.no_grad():
                p.copy_(p * torch.exp(-rate * p.sign() * p.grad) if name in WEIGHTS else p - rate * p.grad)
    torch.testing.assert_close(
        dict(bio.named_parameters()),
        {  # also the biases
            name.replace("weight", "weight_synapses.weight"): p for name, p in model.named_parameters()
        },
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scale", [1.0, 0.3, None])
def test_the_exponent_is_the_update_of_any_optimizer(name, scale):
    start, plain = weights(network()), weights(plainly(OPTIMIZERS[name]))
    bio = trained([passes.ExponentiatedGradient(scale)], OPTIMIZERS[name])
    found = exponents(start, weights(bio))
    for weight, before in start.items():
        sigma = before.square().mean().sqrt() if scale is None else scale
        assert (found[weight].abs() < 1).all()
        torch.testing.assert_close(found[weight], (plain[weight] - before) / sigma)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_gains_act_on_the_exponent(name):
    gains = passes.FuzzyLearningRates(nu=0.4, distribution="lognormal")
    start = weights(network())
    plain = exponents(start, weights(trained([PAPER], OPTIMIZERS[name])))
    bio = trained([PAPER, gains], OPTIMIZERS[name])
    for weight, found in exponents(start, weights(bio)).items():
        torch.testing.assert_close(found, plain[weight] * biofx.weight_sites(bio)[weight].gain)


def test_regularization_becomes_a_constant_factor():
    bio = biofx.transform(network(), [PAPER, passes.L1Regularization(0.2)])
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    train(bio, optimizer, 5, factor=0.0)
    for name, before in weights(network()).items():
        torch.testing.assert_close(weights(bio)[name], before * torch.tensor(-5 * 0.1 * 0.2).double().exp())


def test_a_step_changes_a_synapse_by_a_factor_of_e_at_most():
    olds = [torch.tensor([1.0, -1.0, 1e-30, 0.0])]
    news = [torch.tensor([1e30, 1e30, 0.5, 1e30])]
    over_blocks(exponentiated, multiply_, news, olds, [torch.tensor(1e-3)], compiled=False)
    e = torch.tensor(1.0).exp()
    torch.testing.assert_close(news, [torch.tensor([e, -1 / e, 1e-30 * e, 0.0])])


def test_many_weights_of_any_size_and_layout_at_once():
    shapes = [(3,), (700, 400), (2, 3, 5, 5), (1, 1), (40, 3, 3, 3)]
    olds, changes = ([torch.randn(shape).double() for shape in shapes] for _ in range(2))
    olds[2] = olds[2].to(memory_format=torch.channels_last)
    news = [old + change for old, change in zip(olds, changes, strict=True)]
    scales = [torch.tensor(2.0 + index).double() for index in range(len(shapes))]
    expected = [
        old * (old.sign() * change / scale).clamp(-1, 1).exp()
        for old, change, scale in zip(olds, changes, scales, strict=True)
    ]
    over_blocks(exponentiated, multiply_, news, olds, scales, compiled=False)
    torch.testing.assert_close(news, expected)


# --- scale -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [[], [passes.SplitSynapses(3)], [passes.SplitSynapses(3, compensate=False)]])
def test_the_scale_is_that_of_connections(split):
    bio = biofx.transform(network(), [*split, passes.ExponentiatedGradient()])
    for name, weight in weights(network()).items():
        torch.testing.assert_close(bio.get_buffer(f"{name}_synapses.scale"), weight.square().mean().sqrt())


def test_a_given_scale_is_as_precise_as_the_weight():
    bio = biofx.transform(nn.Linear(3, 2).double(), [passes.ExponentiatedGradient(scale=0.3)])
    assert float(bio.weight_synapses.scale) == 0.3


def test_the_scale_leaves_absent_synapses_out():
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 3.0], [-4.0, 0.0]]))
    bio = biofx.transform(layer, "exponentiated-gradient")
    torch.testing.assert_close(bio.weight_synapses.scale, torch.tensor(12.5).sqrt())


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adam"])  # weight decay depends on the synapse
def test_a_split_connection_moves_as_the_whole_one(name, compensate):
    one, split = (
        trained(pipeline, OPTIMIZERS[name], 20)
        for pipeline in ([PAPER], [passes.SplitSynapses(3, compensate=compensate), PAPER])
    )
    for weight, expected in weights(one).items():
        torch.testing.assert_close(weights(split)[weight], expected)


# --- signs and zeros ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, lr=0.5), lambda p: torch.optim.AdamW(p, lr=0.05)])
def test_every_synapse_keeps_its_sign(optimizer):
    before = weights(network())
    assert any((weights(plainly(optimizer, 30))[name] * before[name] < 0).any() for name in WEIGHTS)
    after = weights(trained("exponentiated-gradient", optimizer, 30))
    for name in WEIGHTS:
        assert torch.equal(after[name].sign(), before[name].sign())
        assert (after[name] != before[name]).all()


@pytest.mark.parametrize("constraint", ["project", "abs"])
def test_under_dales_principle_no_synapse_is_silenced(constraint):
    dale = passes.DalesPrinciple(constraint=constraint, balance=False)
    bio = trained([dale, passes.ExponentiatedGradient()], lambda p: torch.optim.AdamW(p, lr=0.05), 30)
    biofx.verify(bio)
    assert (weights(bio)["2.weight"] != 0).all()


def test_a_weight_that_stores_no_magnitudes_is_left_alone():
    bio = biofx.transform(network(), "dales-principle{constraint=softplus},exponentiated-gradient")
    assert 'its constraint "softplus" does not store magnitudes' in flat(biofx.summary(bio))
    assert biofx.weight_sites(bio)["0.weight"].passes == ("exponentiated-gradient",)  # reads inputs, so it is free


def test_zeros_stay_and_are_told():
    model = network()
    with torch.no_grad():
        model[0].weight[:, 2:] = 0
    bio = trained("exponentiated-gradient", OPTIMIZERS["adamw"], 3, model)
    assert torch.equal(weights(bio)["0.weight"] == 0, model[0].weight == 0)
    assert "32 of its 48 synapses are 0, and stay so" in flat(biofx.summary(bio))


def test_a_weight_of_zeros_is_left_alone():
    model = network()
    nn.init.zeros_(model[2].weight)
    bio = trained("exponentiated-gradient", OPTIMIZERS["adamw"], 3, model)
    assert (weights(bio)["2.weight"] != 0).all()
    assert "all its synapses are 0, and this rule leaves them so" in flat(biofx.summary(bio))


# --- the lifecycle -----------------------------------------------------------------------------------------------


def test_it_acts_around_a_closure():
    bio = biofx.transform(network(), [PAPER])
    optimizer = OPTIMIZERS["momentum"](bio.parameters())
    biofx.attach(bio, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(bio(X), Y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    torch.testing.assert_close(weights(bio), weights(trained([PAPER], OPTIMIZERS["momentum"], 3)), rtol=0, atol=0)


def test_a_checkpoint_keeps_the_scale():
    bio = biofx.transform(network(), "split-synapses,exponentiated-gradient,fuzzy-learning-rates")
    optimizer = OPTIMIZERS["adamw"](bio.parameters())
    biofx.attach(bio, optimizer)
    train(bio, optimizer, 5)
    other = biofx.transform(mlp(6, 8, 3).double(), "split-synapses,exponentiated-gradient,fuzzy-learning-rates")
    other.load_state_dict(bio.state_dict())
    again = OPTIMIZERS["adamw"](other.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    biofx.attach(other, again)
    for model, held in ((bio, optimizer), (other, again)):
        train(model, held, 5)
    torch.testing.assert_close(other.state_dict(), bio.state_dict(), rtol=0, atol=0)


def test_an_optimizer_that_would_undo_it_is_refused():
    bio = biofx.transform(network(), [PAPER])
    with pytest.raises(
        biofx.LifecycleError, match=r"Master keeps copies .* undo what exponentiated-gradient does to 0\.weight"
    ):
        biofx.attach(bio, Master(bio.parameters(), lr=0.1))
    biofx.attach(bio, OPTIMIZERS["sgd"](bio.parameters()))


def test_it_does_nothing_without_attach_and_says_so():
    bio = biofx.transform(network(), [PAPER])
    with pytest.warns(UserWarning, match=r"without its rules \(exponentiated-gradient\)"):
        train(bio, OPTIMIZERS["adamw"](bio.parameters()))
    torch.testing.assert_close(weights(bio), weights(plainly(OPTIMIZERS["adamw"])))


def test_half_precision():
    bio = biofx.transform(ConvNet().to(torch.bfloat16), "split-synapses,exponentiated-gradient")
    optimizer = torch.optim.SGD(bio.parameters(), lr=1.0)
    biofx.attach(bio, optimizer)
    signs = [site.raw.detach().sign() for site in biofx.weight_sites(bio).values()]
    bio(torch.randn(4, 1, 8, 8, dtype=torch.bfloat16)).float().square().sum().backward()
    optimizer.step()
    assert all(torch.equal(s.raw.sign(), sign) for s, sign in zip(biofx.weight_sites(bio).values(), signs, strict=True))


def test_verify_finds_a_scale_that_is_none():
    bio = biofx.transform(network(), [PAPER])
    bio.get_buffer("0.weight_synapses.scale").zero_()
    with pytest.raises(biofx.VerificationError, match=r"0\.weight: its scale is not a positive number"):
        biofx.verify(bio)


@pytest.mark.parametrize("scale", [0, -1.0, "rms", float("inf")])
def test_bad_options(scale):
    with pytest.raises(biofx.ArgumentError, match="ExponentiatedGradient: scale must be a number > 0, got"):
        passes.ExponentiatedGradient(scale)
