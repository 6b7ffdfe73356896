"""What a step costs where nobody has a GPU to measure it: operators that are dispatched, and waits for the device.

A GPU computes while the host goes on, so what makes a step long there is what the host has to do: every operator is a
launch, and every number that is read on the host is a wait.
"""

import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import biofx
from biofx.model import synapses
from conftest import since

LAYERS = 40
WAITS = (  # all but the first as the number of entries that a mask selects has to be known
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten.index.Tensor",
    "aten.index_put_.default",
)
PYTHON = {  # Python functions that are called for each weight at most: while they run, a GPU waits
    "fuzzy-learning-rates": 26,
    "crystallize": 66,
    "exponentiated-gradient": 50,
    "l1-regularization": 44,
    "volume-dependent-learning-rates": 36,
    "dales-principle{balance=False}": 40,
    "rejuvenate": 120,
    "rejuvenate{every=100}": 30,
    "synaptic-scaling": 66,
    "continual-backprop": 130,
}
COSTS = {  # what a step adds at most: operators, operators for each weight, waits
    "fuzzy-learning-rates": (5, 0, 0),
    "crystallize": (25, 1, 0),
    "exponentiated-gradient": (20, 1, 0),
    "l1-regularization": (10, 0, 0),
    "split-synapses": (10, 7, 0),
    "volume-dependent-learning-rates": (20, 2, 0),
    "fuzzy-learning-rates,volume-dependent-learning-rates,crystallize": (40, 3, 0),
    "rejuvenate{every=100}": (10, 0, 0),
    "rejuvenate": (60, 6, 0),
    "rejuvenate{rule=threshold}": (40, 6, 0),
    "continual-backprop": (75, 5, 0),
    "continual-backprop{replacement_rate=1.0,maturity=0}": (80, 23, 0),
    "fuzzy-learning-rates{distribution=temporal,every=1}": (30, 0, 0),
    "fuzzy-learning-rates{distribution=weight_adaptive,every=1}": (50, 3, 0),
    "synaptic-scaling": (40, 3, 0),
    "dales-principle{balance=False}": (15, 1, 0),
    "dales-principle{balance=False},rejuvenate": (20, 60, 0),
    "mirror-units": (15, 1, 0),
}


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators_of_a_step(model, optimizer, x=None):
    x = torch.randn(4, 16) if x is None else x
    for counting in (False, False, True):
        mode = Operators() if counting else torch.enable_grad()
        with mode:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return mode.count


def layers():
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(LAYERS) for layer in (nn.Linear(16, 16), nn.ReLU())])


@pytest.fixture(scope="module")
def plain():
    model = layers()
    return operators_of_a_step(model, torch.optim.SGD(model.parameters(), lr=0.01, foreach=True))


@since((2, 13), "functions of several tensors consist of more operators")
@pytest.mark.parametrize("pipeline", COSTS)
def test_what_a_step_adds(pipeline, plain):
    bio = biofx.transform(layers(), pipeline, example_inputs=(torch.randn(4, 16),))
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.01, foreach=True)
    biofx.attach(bio, optimizer)
    count = operators_of_a_step(bio, optimizer)
    once, for_each, waits = COSTS[pipeline]
    added = sum(count.values()) - sum(plain.values())
    assert added <= once + for_each * LAYERS, count - plain
    assert sum(count[name] - plain[name] for name in WAITS) <= waits


def python_calls_of_a_step(pipeline, count_of_layers):
    model = nn.Sequential(*[layer for _ in range(count_of_layers) for layer in (nn.Linear(16, 16), nn.ReLU())])
    bio = biofx.transform(model, pipeline, example_inputs=(torch.randn(4, 16),))
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.01, foreach=True)
    biofx.attach(bio, optimizer)
    count = Counter()

    def note(frame, event, argument):
        count[event] += 1

    for profile in (None, None, note):
        optimizer.zero_grad()
        bio(torch.randn(4, 16)).square().mean().backward()
        sys.setprofile(profile)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
    return count["call"]


@pytest.mark.parametrize("pipeline", PYTHON)
def test_python_that_a_step_runs_for_each_weight(pipeline):
    few, many = (python_calls_of_a_step(pipeline, count) for count in (LAYERS // 2, LAYERS))
    assert (many - few) / (LAYERS - LAYERS // 2) <= PYTHON[pipeline]


def test_a_step_looks_up_no_weight_by_name(monkeypatch):
    bio = biofx.transform(layers(), "fuzzy-learning-rates,crystallize,rejuvenate,l1-regularization")
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.01)
    biofx.attach(bio, optimizer)
    found = []
    for looks_up in ("submodule", "child_of"):
        own = getattr(synapses, looks_up)
        monkeypatch.setattr(synapses, looks_up, lambda *args, own=own: (found.append(args), own(*args))[1])
    counts = []
    for _ in range(3):
        bio(torch.randn(4, 16)).square().mean().backward()
        found.clear()
        optimizer.step()
        counts.append(len(found))
    assert counts[0] > 0
    assert counts[1:] == [0, 0]
