"""Where gains act: they hold for optimizers that keep copies of the weights or perturb them, or these are refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from copying_optimizers import Lookahead, Master, ScheduleFree
from training_runs import GAINS, IMAGES, LABELS, network, train


@pytest.mark.parametrize("steps", [1, 50, 200])
@pytest.mark.parametrize("optimizer_class", [ScheduleFree, Lookahead, Master, torch.optim.SGD])
def test_gains_hold_where_the_optimizer_keeps_a_copy(optimizer_class, steps):
    """The slope of displacement on gain, for weights that are all pulled alike."""
    torch.manual_seed(0)
    bio = biofx.transform(nn.Linear(50, 50, bias=False).double(), [passes.FuzzyLearningRates(nu=0.3)])
    optimizer = optimizer_class(bio.parameters(), lr=0.01)
    biofx.attach(bio, optimizer)
    raw, gain = bio.get_parameter("weight"), biofx.weight_sites(bio)["weight"].gain
    start_ = raw.detach().clone()
    for _ in range(steps):
        raw.grad = 1 + 0.1 * torch.randn_like(raw)
        optimizer.step()
    moved = (raw.detach() - start_).flatten()
    moved, gain = moved / moved.mean() - 1, gain.flatten() / gain.mean() - 1
    slope = (moved * gain).sum() / gain.square().sum()
    assert abs(slope - 1) < 0.05


class LookaheadAdam(Lookahead):
    """Undoes gains on its update, and normalises those on the gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad = p.grad.sign()
        super().step()


def test_an_optimizer_that_undoes_gains_is_refused():
    bio = biofx.transform(network(), GAINS)
    code = bio.code
    with pytest.raises(biofx.LifecycleError, match="LookaheadAdam undoes gains, as it keeps copies of the weights"):
        biofx.attach(bio, LookaheadAdam(bio.parameters(), lr=0.01))
    assert bio.code == code
    attachment = biofx.attach(bio, torch.optim.Adam(bio.parameters()))
    with pytest.raises(biofx.LifecycleError, match="LookaheadAdam undoes gains"):
        biofx.attach(bio, LookaheadAdam(bio.parameters(), lr=0.01))
    assert attachment.weights == ("0.weight", "2.weight")


class NoDefaults(Master):
    """Its constructor takes something that is not in its defaults."""

    def __init__(self, params, rate, extra):
        super().__init__(params, rate)


def test_a_copy_of_the_weights_is_found_without_a_trial():
    bio = biofx.transform(network(), GAINS)
    optimizer = NoDefaults(bio.parameters(), 0.01, extra=None)
    biofx.attach(bio, optimizer)
    with pytest.raises(biofx.LifecycleError, match=r"keeps a copy of the weights \('master' in its state\)"):
        train(bio, optimizer, 1)


class Perturbing(torch.optim.SGD):
    """Moves the weights before it calls the closure, and back, as sharpness-aware minimisation does."""

    def step(self, closure):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(0.01)
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(0.01)
        super().step()
        return loss


def test_gains_act_on_the_step_of_perturbing_optimizers():
    plain = network()
    bio = biofx.transform(plain, GAINS)
    optimizers = [Perturbing(m.parameters(), lr=0.1) for m in (plain, bio)]
    biofx.attach(bio, optimizers[1])
    before = copy.deepcopy(plain)
    for model, optimizer in zip((plain, bio), optimizers, strict=True):

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(IMAGES[:64]), LABELS[:64])
            loss.backward()
            return loss

        optimizer.step(closure)
    for name, site in biofx.weight_sites(bio).items():
        start_, end = before.get_parameter(name), plain.get_parameter(name)
        torch.testing.assert_close(site.raw - start_, site.gain * (end - start_), rtol=1e-6, atol=1e-12)
