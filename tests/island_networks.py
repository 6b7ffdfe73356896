"""Shared by the tests of islands: a network around each kind of island, and the transformed network."""

import functools

import torch

import biofx
from biofx import passes
from conftest import tensors
from models.islands import ISLANDS, Around

SPLIT = (passes.SplitSynapses(2, init="equal", compensate=False),)
SLOW = (passes.SplitSynapses(2), passes.FuzzyLearningRates())
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2


def network(kind):
    return Around(ISLANDS[kind][0]()).double().eval()


@functools.cache
def both(kind, frontend, passes_):
    """A network and what a transform made of it, for tests that change neither."""
    torch.manual_seed(0)
    model = network(kind)
    return model, biofx.transform(model, [*passes_], frontend=frontend)


def assert_close(a, b):
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y)
