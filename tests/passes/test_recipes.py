"""Recipes: pipelines with a name, and that they train."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import biofx
from biofx import passes
from models.small import mlp


def test_the_papers_recipe():
    first, second, third = biofx.rewrite.registry.parse("hofmann2025")
    assert first == passes.GroupUnits(size=2)
    assert second == passes.FuzzyLearningRates(nu=0.09, distribution="uniform")
    assert third == passes.Rejuvenate(dre=14.0, rule="threshold", every=1)


def test_cortex_has_every_rule_of_synapses_without_effect():
    names = {p.name for p in biofx.rewrite.registry.parse("cortex")}
    of_signs = {"dales-principle", "mirror-units", "inhibitory-interneurons"}
    of_units = {"group-units", "continual-backprop"}
    assert names == set(passes.registered_passes()) - of_signs - of_units - {"exponentiated-gradient"}


def accuracy_after(model, optimizer, images, labels, epochs=20):
    order = torch.Generator().manual_seed(0)
    train, test = torch.arange(len(labels)).split([1300, len(labels) - 1300])
    for _ in range(epochs):
        for rows in train[torch.randperm(1300, generator=order)].split(50):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(images[rows]), labels[rows]).backward()
            optimizer.step()
    return float((model.eval()(images[test]).argmax(1) == labels[test]).float().mean())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_cortex_trains_on_digits_as_well_as_the_plain_network(optimizer):
    data = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    options = {"lr": 3e-3} if optimizer is torch.optim.AdamW else {"lr": 0.1, "momentum": 0.9}
    plain = mlp(64, 64, 10)
    bio = biofx.transform(plain, "cortex")
    held = optimizer(bio.parameters(), **options)
    biofx.attach(bio, held)
    reached = accuracy_after(bio, held, images, labels)
    biofx.verify(bio)
    expected = accuracy_after(plain, optimizer(plain.parameters(), **options), images, labels)
    assert expected > 0.88
    assert reached > 0.97 * expected
    replaced = [int(site.state("replaced")) for site in biofx.weight_sites(bio).values()]
    assert min(replaced) > 0
