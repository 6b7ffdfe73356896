"""Networks under Dale's principle learn digits as well as without it; a deep one that just gets signs does not."""

from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import biofx
from biofx import passes
from models.small import mlp

SEEDS = range(2)
BATCH = 64
LEARNING_RATE = 2e-3


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm, and a shortcut around them."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Residual(nn.Module):
    """A residual network for images (N, 1, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), ResidualBlock(32, 32, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


NETWORKS = {  # each with the epochs that it gets
    "3 layers": (lambda: nn.Sequential(nn.Flatten(), *mlp(64, 128, 128, 10)), 15),
    "8 layers": (lambda: nn.Sequential(nn.Flatten(), *mlp(64, *[128] * 7, 10)), 30),
    "residual": (Residual, 10),
}


@cache
def digits():
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)[order]
    labels = torch.tensor(data.target)[order]
    return images[:1300], labels[:1300], images[1300:], labels[1300:]


def trained(network, pass_, seed):
    """A network with a seed of its own, trained with AdamW."""
    images = digits()[0]
    build, epochs = NETWORKS[network]
    torch.manual_seed(seed)
    model = build()
    if pass_ is not None:
        model = biofx.transform(model, [pass_], example_inputs=images[:2], seed=seed)
    learn(model, epochs, attach=pass_ is not None)
    return model


def learn(model, epochs, *, attach):
    images, labels, *_ = digits()
    optimizer = torch.optim.AdamW(model.parameters())
    if attach:
        biofx.attach(model, optimizer)
    steps = epochs * -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model):
    *_, images, labels = digits()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def mean_accuracy(network, pass_, seeds=SEEDS):
    models = [trained(network, pass_, seed) for seed in seeds]
    if pass_ is not None:
        for model in models:
            biofx.verify(model)
    return sum(map(accuracy, models)) / len(models)


@cache
def unconstrained(network):
    return mean_accuracy(network, None)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("pass_", "seeds"),  # a mirrored network begins as the plain one, whatever the seed
    [(passes.DalesPrinciple(), SEEDS), (passes.MirrorUnits(), SEEDS[:1])],
    ids=["balanced", "mirrored"],
)
def test_it_learns_as_well_as_without_signs(network, pass_, seeds):
    assert unconstrained(network) > 0.9
    assert mean_accuracy(network, pass_, seeds) >= 0.97 * unconstrained(network)


def test_eight_layers_that_just_get_signs_stay_near_chance():
    assert mean_accuracy("8 layers", passes.DalesPrinciple(balance=False)) < 0.35


def test_a_trained_network_recovers_from_the_closest_signs():
    """Most of what it knew is lost with the signs, and is back after a fraction of the training."""
    model = trained("3 layers", None, seed=0)
    bio = biofx.transform(model, [passes.DalesPrinciple(assign="closest")])
    assert accuracy(bio.eval()) < 0.9 * accuracy(model)
    learn(bio, 10, attach=True)
    biofx.verify(bio)
    assert accuracy(bio) >= 0.97 * accuracy(model)
