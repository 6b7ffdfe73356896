"""Weights that forward itself changes are left alone in islands, or the change is refused before it is lost."""

import copy
import re
import types

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.weights.facts import Need
from conftest import flat, loss
from island_networks import SPLIT
from models.islands import Branch


class Clamped(nn.Module):
    """Limits its weights at each call, as critics of Wasserstein GANs do; or only at those of training."""

    def __init__(self, always):
        super().__init__()
        self.inner, self.always = nn.Linear(2, 2), always

    def forward(self, x):
        if self.training or self.always:
            with torch.no_grad():
                self.inner.weight.clamp_(-0.1, 0.1)
        return self.inner(x)


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("recipe", ["split-synapses", "fuzzy-learning-rates", [passes.DalesPrinciple()]], ids=str)
def test_a_weight_that_forward_changes_in_place_is_left_alone(frontend, recipe, always):
    model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Clamped(always)), torch.randn(3, 2)
    bio = biofx.transform(model, recipe, frontend=frontend)
    assert list(biofx.weight_sites(bio)) == ["0.weight"]
    assert "2.inner.weight: forward changes it in place, by clamp_ in 2 (test_island_writes.py" in flat(
        biofx.summary(bio)
    )
    assert torch.equal(bio.get_parameter("2.inner.weight"), model[2].inner.weight)
    torch.testing.assert_close(bio(x), model(x))
    assert bio.get_parameter("2.inner.weight").abs().max() <= 0.1
    again = biofx.transform(bio, [passes.Rejuvenate()], frontend=frontend)
    assert list(biofx.weight_sites(again)) == ["0.weight"]


class Unguessable(nn.Sequential):
    def forward(self, options):
        return super().forward(options.value)


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_a_weight_that_is_stored_may_be_changed_by_forward(frontend):
    model = Unguessable(nn.Linear(2, 2), nn.ReLU(), Clamped(always=True))
    options = types.SimpleNamespace(value=torch.randn(3, 2))
    bio = biofx.transform(model, "fuzzy-learning-rates", frontend=frontend)
    torch.testing.assert_close(bio(options), model(options))
    assert bio.get_parameter("2.inner.weight").abs().max() <= 0.1


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
@pytest.mark.parametrize("recipe", ["split-synapses"])
def test_a_weight_changed_by_an_unseen_forward_is_refused_then(frontend, recipe):
    model = Unguessable(nn.Linear(2, 2), nn.ReLU(), Clamped(always=True))
    options = types.SimpleNamespace(value=torch.randn(3, 2))
    bio = biofx.transform(model, recipe, frontend=frontend)
    with pytest.raises(biofx.ArgumentError, match=r"would be lost.*exclude="):
        bio(options)
    bio = biofx.transform(model, recipe, frontend=frontend, exclude=["*inner.weight"])
    torch.testing.assert_close(bio(options), model(options))
    assert bio.get_parameter("2.inner.weight").abs().max() <= 0.1


class Momentum(nn.Module):
    """A layer that follows another one, as the key encoder of MoCo does."""

    def __init__(self, update):
        super().__init__()
        self.query, self.key, self.update = nn.Linear(3, 3), nn.Linear(3, 3), update
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        with torch.no_grad():
            for ours, theirs in zip(self.query.parameters(), self.key.parameters(), strict=True):
                self.update(ours, theirs)
        return self.head(self.query(x) * self.key(x).detach())


def assigned(ours, theirs):
    theirs.data = 0.9 * theirs.data + 0.1 * ours.data


def in_place(ours, theirs):
    theirs.data.mul_(0.9).add_(ours.data, alpha=0.1)


@pytest.mark.parametrize("update", [assigned, in_place])
def test_weights_that_forward_changes_are_left_alone(update, frontend):
    model, x = Momentum(update), torch.randn(2, 3)
    bio = biofx.transform(copy.deepcopy(model), SPLIT, frontend=frontend)
    assert [(site.name, site.unmet(Need.UNITS)) for site in biofx.weight_sites(bio).values()] == [("head.weight", None)]
    assert "query.weight: forward takes it from parameters(), which lists what is stored" in flat(biofx.summary(bio))
    assert re.search(r"key\.weight: forward (changes it in place|takes it from parameters)", biofx.summary(bio))
    for _ in range(3):
        torch.testing.assert_close(bio(x), model(x))
        loss(bio(x)).backward()
        loss(model(x)).backward()
        torch.testing.assert_close(bio.key.weight, model.key.weight)


class Replaced(nn.Module):
    """Makes a new parameter of its codebook in every forward, as a VQ-VAE with moving averages does."""

    def __init__(self, always):
        super().__init__()
        self.book, self.head, self.always = nn.Embedding(3, 3), nn.Linear(3, 2), always

    def forward(self, x):
        if self.training or self.always:
            mean = x.detach().mean(0)
            self.book.weight = nn.Parameter(0.9 * self.book.weight.detach() + 0.1 * mean)
        return self.head(x @ self.book.weight)


@pytest.mark.parametrize("always", [True, False])
def test_a_parameter_that_forward_replaces_is_left_alone(always, frontend):
    model, x = Replaced(always), torch.randn(4, 3)
    recipe = "split-synapses,fuzzy-learning-rates{nu=1e-9}"
    bio = biofx.transform(copy.deepcopy(model), recipe, frontend=frontend, example_inputs=(x,))
    assert "book.weight: forward replaces it, or its data" in flat(biofx.summary(bio))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (bio, model)]
    biofx.attach(bio, optimizers[0])
    for _ in range(3):
        torch.testing.assert_close(bio(x), model(x))
        for each, optimizer in zip((bio, model), optimizers, strict=True):
            loss(each(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(bio.book.weight, model.book.weight)
    torch.testing.assert_close(biofx.fold(bio).state_dict(), model.state_dict())


def test_a_parameter_that_is_kept_in_an_attribute_is_left_alone():
    model = nn.Sequential(Branch(), nn.Linear(4, 4))
    model[0].kept = [model[0].a.weight]
    bio = biofx.transform(model, SPLIT)
    sites = biofx.weight_sites(bio)
    assert {name: site.synapses for name, site in sites.items()} == {"0.a.weight": 1, "0.b.weight": 2, "1.weight": 2}
    assert "the attribute 0.kept holds it as well" in flat(biofx.summary(bio))
    assert bio[0].kept[0] is bio[0].a.weight


class Agent(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

    def learn(self, x):
        self.optimizer.zero_grad()
        loss(self(x)).backward()
        self.optimizer.step()


@pytest.mark.parametrize("inplace", [False, True])
def test_weights_that_an_optimizer_of_the_model_holds(inplace, frontend):
    model = Agent()
    with pytest.raises(biofx.ArgumentError, match=r"0\.weight: the optimizer in the attribute optimizer holds it"):
        biofx.transform(model, SPLIT, frontend=frontend, inplace=inplace)
    model.optimizer = None
    bio, x = biofx.transform(model, SPLIT, frontend=frontend, inplace=inplace), torch.randn(5, 3)
    bio.optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    before = [each.clone() for each in biofx.fold(bio).parameters()]
    bio.learn(x)
    assert not any(map(torch.equal, biofx.fold(bio).parameters(), before))


def test_an_optimizer_of_a_part_holds_only_its_weights():
    actor, critic = Agent(), nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    bio, x = biofx.transform(nn.Sequential(actor, critic), SPLIT), torch.randn(5, 3)
    synapses = {name: site.synapses for name, site in biofx.weight_sites(bio).items()}
    assert synapses == {"0.0.weight": 1, "0.2.weight": 1, "1.0.weight": 2, "1.2.weight": 2}
    before = [each.clone() for each in bio[0].parameters()]
    bio[0].learn(x)
    assert not any(map(torch.equal, bio[0].parameters(), before))


class LearnsInside(nn.Module):
    """Trains a layer in forward, where gradients are enabled, by an optimizer that it makes there."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            optimizer = torch.optim.SGD(self.inner.parameters(), 0.1)
            (self.inner(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return self.head(self.inner(x).detach())


@pytest.mark.parametrize("frontend", ["symbolic", "module"])
def test_weights_that_learn_in_forward_are_left_alone(frontend):
    bio = biofx.transform(LearnsInside(), SPLIT, example_inputs=torch.randn(3, 4), frontend=frontend)
    assert list(biofx.weight_sites(bio)) == ["head.weight"]
    assert "inner.weight: forward changes it" in flat(str(biofx.summary(bio)))
