"""Fixtures and helpers that all tests share."""

import gc
import itertools
import os
import sys
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import biofx
from biofx.base.tables import Report
from biofx.model.synapses import stored_parameters
from biofx.rewrite import registry
from models.islands import ISLANDS
from models.small import ZOO

torch.set_num_threads(1)
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # to start a pool takes longer than these kernels
gc.freeze()  # what is imported lives as long as the process
gc.set_threshold(20_000, 20, 20)  # a graph is many small objects, and by default collections take a tenth of the time


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _passes_of_a_test_stay_in_it(monkeypatch):
    monkeypatch.setattr(registry, "_PASSES", dict(registry._PASSES))
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))


@pytest.fixture(params=sorted(ZOO))
def zoo(request):
    """Every small network, in evaluation mode, with a batch for it."""
    build, shape = ZOO[request.param]
    return build().eval(), torch.randn(shape)


@pytest.fixture(params=ISLANDS)
def kind(request):
    """Every kind of network with an island; see `island_networks.network`."""
    return request.param


@pytest.fixture(params=["symbolic", "module"])
def frontend(request):
    """The two front ends that keep a model's Python."""
    return request.param


UNNOTICED = pytest.mark.xfail(
    sys.version_info[:3] == (3, 13, 0) and torch.__version__ < (2, 13),
    reason="compiled for Python 3.13.0, no model notices attributes that change, not even `training`",
)


def since(version: tuple[int, int], reason: str) -> pytest.MarkDecorator:
    """A mark for what works from a version of PyTorch on."""
    return pytest.mark.skipif(
        torch.__version__ < version, reason=f"before PyTorch {'.'.join(map(str, version))}, {reason}"
    )


def in_turn(kinds: Iterable[Any], options: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Each kind with one of the options: every value of both, where a product of the two would add nothing."""
    return list(zip(kinds, itertools.cycle(options), strict=False))


def tensors(outputs):
    """The tensors in whatever a model returns."""
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]


def flat(text: str) -> str:
    """A text without its line breaks, which depend on its width."""
    return " ".join(text.split())


def times_listed(summary: Report, parameter: str) -> int:
    """How often a summary lists a parameter: in a row of its own, as left alone, or as not a synapse."""
    told = summary.to_dict()
    names = [*(row["weight"] for row in told["rows"]), *told["left_alone"], *told["not_synapses"]]
    return names.count(parameter)


def loss(outputs):
    """A scalar in which every output takes part."""
    return sum(x.double().square().sum() for x in tensors(outputs))


def gradients(model: nn.Module, *inputs) -> dict[str, torch.Tensor]:
    """Gradients of `loss` by parameter name; the model's `.grad` is left empty."""
    model.zero_grad()
    loss(model(*inputs)).backward()
    result = {name: p.grad.clone() for name, p in stored_parameters(model) if p.grad is not None}
    model.zero_grad()
    return result


def same(a, b):
    """Whether two models returned the same tensors, to the bit."""
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def assert_same_in_both_modes(bio, model, x):
    """Assert that two models compute the same in training and in evaluation mode, to the bit."""
    for mode in (True, False):
        model.train(mode)
        bio.train(mode)
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        assert same(bio(x), expected)


def only(bio):
    """The weight of a model that has one."""
    (site,) = biofx.weight_sites(bio).values()
    return site
