"""Where gains act: they hold for optimizers that keep copies of the weights or perturb them, or these are refused."""

import copy
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Halve(passes.Pass):
    """Halves positive weights after the first two steps."""

    name = "halve"
    slot = passes.Slot.HOOK
    moment = passes.Moment.SCALING

    def rewrite(self, site, edit):
        pass

    def at_step(self, weights):
        for weight in weights:
            if weight.step <= 2:
                weight.assign(torch.where(weight.value > 0, weight.value / 2, weight.value))


COPYING = [ScheduleFree, Lookahead, Master]


def rest(bio, optimizer_class, steps):
    """Make steps with a learning rate of 0, so that only rules change weights."""
    optimizer = optimizer_class(bio.parameters(), lr=0.0)
    with biofx.attach(bio, optimizer):
        for _ in range(steps):
            optimizer.zero_grad()
            bio(torch.randn(4, 30)).square().sum().backward()
            optimizer.step()


@pytest.mark.parametrize("others", [[], [passes.SplitSynapses(3)], [passes.FuzzyLearningRates()]], ids=str)
@pytest.mark.parametrize("optimizer_class", COPYING)
def test_what_a_rule_writes_stays_where_copies_are_kept(optimizer_class, others):
    bio = biofx.transform(nn.Linear(30, 20, bias=False), [*others, Halve()])
    (site,) = biofx.weight_sites(bio).values()
    before = site.raw.detach().clone()
    rest(bio, optimizer_class, steps=12)
    torch.testing.assert_close(site.raw.detach(), torch.where(before > 0, before / 4, before))


@pytest.mark.parametrize("others", [[], [passes.SplitSynapses(3)], [passes.DalesPrinciple()]], ids=str)
@pytest.mark.parametrize("optimizer_class", COPYING)
def test_new_synapses_stay_where_copies_are_kept(optimizer_class, others):
    model = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 20, bias=False))
    bio = biofx.transform(model, [*others, passes.Rejuvenate(dre=2.0, every=9)])
    site = biofx.weight_sites(bio)["2.weight"]
    before = site.raw.detach().clone()
    rest(bio, optimizer_class, steps=9)
    after = site.raw.detach().clone()
    rest(bio, optimizer_class, steps=8)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(site.raw.detach(), after)


class Returning(Master):
    """Keeps where the weights began, as vectors, and how far they have moved since."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            start, gone = state.setdefault("start", p.flatten().clone()), state.setdefault("gone", torch.zeros_like(p))
            gone.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            p.copy_(start.view_as(p) + gone)


def test_an_optimizer_that_undoes_what_rules_write_is_refused():
    """Gains act on its gradient; but its copy of the weights is not found, as it has another shape."""
    bio = biofx.transform(nn.Linear(30, 20), [passes.FuzzyLearningRates()])
    biofx.attach(bio, Returning(bio.parameters(), lr=0.1))
    bio = biofx.transform(nn.Linear(30, 20), [Halve()])
    with pytest.raises(biofx.LifecycleError, match="Returning keeps copies of the weights, which undo what halve does"):
        biofx.attach(bio, Returning(bio.parameters(), lr=0.1))


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
