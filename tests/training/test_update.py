"""Updates: one step moves a weight by its gain times the distance that it would have moved without."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from conftest import in_turn
from training_runs import GAINS, IMAGES, LABELS, OPTIMIZERS, displacements, network, start, train


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_moves_a_weight_by_gain_times_the_plain_step(name):
    for plain, given, gain in displacements(OPTIMIZERS[name], 1):
        assert plain.abs().max() > 1e-6
        torch.testing.assert_close(given, gain * plain, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_over_fifty_steps_displacement_follows_gain(name):
    """Correlation of the displacement with gain × the plain displacement, over all weights."""
    sites = zip(*displacements(OPTIMIZERS[name], 50), strict=True)
    plain, given, gain = (torch.cat([x.flatten() for x in xs]) for xs in sites)
    correlation = torch.corrcoef(torch.stack([given, gain * plain]))[0, 1]
    assert correlation > 0.75


def test_a_fixed_gain_of_one_changes_nothing():
    for name in ("momentum", "adam"):
        neutral = [passes.FuzzyLearningRates(distribution="baseline")]
        for plain, given, _ in displacements(OPTIMIZERS[name], 10, neutral):
            torch.testing.assert_close(given, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad"])
def test_without_attach_an_adaptive_optimizer_cancels_gains(name):
    """What attach is for: without it, a gain that is larger by 1 moves a weight by less than 5% more."""
    plain = network()
    bio = biofx.transform(plain, GAINS)
    for model in (plain, bio):
        train(model, OPTIMIZERS[name](model.parameters()), 1)
    start, site = network()[0].weight.detach(), biofx.weight_sites(bio)["0.weight"]
    plain_step, step = plain[0].weight.detach() - start, site.raw.detach() - start
    moved = plain_step.abs() > 1e-4
    covariance = torch.cov(torch.stack([step[moved] / plain_step[moved], site.gain[moved]]))
    assert abs(covariance[0, 1] / covariance[1, 1]) < 0.05


def test_a_step_that_fails_leaves_the_weights_as_they_were():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise ValueError("out of memory")

    bio = biofx.transform(network(), [passes.SplitSynapses(3)])
    optimizer = Failing(bio.parameters(), lr=0.1)
    biofx.attach(bio, optimizer)
    F.cross_entropy(bio(IMAGES[:64]), LABELS[:64]).backward()
    weights = [site.raw for site in biofx.weight_sites(bio).values()]
    before = [(p.detach().clone(), p.grad.clone()) for p in weights]
    with pytest.raises(ValueError, match="out of memory"):
        optimizer.step()
    for p, (value, gradient) in zip(weights, before, strict=True):
        assert torch.equal(p, value)
        assert torch.equal(p.grad, gradient)
    biofx.detach(bio)
    assert "step" not in vars(optimizer)


# --- synapses of one connection ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["momentum", "adam", "rmsprop"])
def test_compensation_of_splitting_holds_for_every_optimizer(name):
    """One step moves a connection as far as it moves the plain weight, whatever Γ is."""
    plain = network()
    bio = biofx.transform(plain, [passes.SplitSynapses(4)])
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (plain, bio)]
    biofx.attach(bio, optimizers[1])
    before = copy.deepcopy(plain)
    for model, optimizer in zip((plain, bio), optimizers, strict=True):
        train(model, optimizer, 1)
    for weight_name, site in biofx.weight_sites(bio).items():
        start = before.get_parameter(weight_name)
        torch.testing.assert_close(
            site.effective() - start, plain.get_parameter(weight_name) - start, rtol=1e-4, atol=1e-7
        )


INEXACT = ("muon", "adafactor")  # Muon takes no weights with three axes; Adafactor looks at all rows together


@pytest.mark.parametrize(("name", "synapses"), in_turn([name for name in OPTIMIZERS if name not in INEXACT], [2, 3]))
def test_split_connections_move_as_plain_ones_for_fifty_steps(name, synapses):
    plain = network()
    bio, optimizer, _ = start([passes.SplitSynapses(synapses)], name, plain)
    train(plain, OPTIMIZERS[name](plain.parameters()), 50)
    train(bio, optimizer, 50)
    for weight_name, site in biofx.weight_sites(bio).items():
        torch.testing.assert_close(site.effective(), plain.get_parameter(weight_name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_bias_that_was_split_learns_as_fast_as_its_weight(name):
    moved = []
    for synapses in (1, 4):
        pipeline = [passes.SplitSynapses(synapses, activation="tanh", init="equal")]
        bio = biofx.transform(nn.Linear(64, 10, bias=True).double(), pipeline)
        with torch.no_grad():
            bio.get_parameter("weight").zero_()
            bio.get_parameter("bias").zero_()
        optimizer = OPTIMIZERS[name](bio.parameters())
        biofx.attach(bio, optimizer)
        train(bio, optimizer, 1)
        moved.append(bio.get_parameter("bias").detach().sum(0))
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-9)


SPLITS = {
    "alone": [passes.SplitSynapses(8)],
    "with rules": [passes.SplitSynapses(3), *GAINS, passes.L1Regularization()],
}


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("pipeline", SPLITS.values(), ids=SPLITS)
def test_gradients_and_their_norm_are_those_of_the_backward_pass(name, pipeline):
    plain = network()
    bio, optimizer, _ = start(pipeline, name, plain)
    for model in (plain, bio):
        F.cross_entropy(model(IMAGES[:64]), LABELS[:64]).backward()
    norms = [nn.utils.clip_grad_norm_(model.parameters(), 1e9) for model in (plain, bio)]
    torch.testing.assert_close(norms[1], norms[0])
    kept = [p.grad.clone() for p in bio.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, k) for p, k in zip(bio.parameters(), kept, strict=True))
