"""Finding islands: they are the smallest modules that cannot be traced, and few traces find them."""

import pytest
import torch
from torch import nn

import biofx
from island_networks import SPLIT, assert_close, both
from models.islands import ISLANDS, Branch


@pytest.mark.parametrize("kind", ISLANDS)
def test_islands_are_the_smallest_untraceable_modules(kind):
    _, bio = both(kind, "symbolic", SPLIT)
    assert list(bio.biofx.islands) == ISLANDS[kind][1]


def test_an_island_that_fails_because_of_its_child_is_the_child():
    class Keeps(nn.Module):
        """Needs what its child appended before it failed, so it fails together with it."""

        def __init__(self):
            super().__init__()
            self.child, self.fc = Branch(), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.child(x)) + len([1])

    bio = biofx.transform(nn.Sequential(Keeps()), SPLIT)
    assert list(bio.biofx.islands) == ["0.child"]


class AsksForType(nn.Module):
    """Takes one way for a tensor and another for anything else."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if isinstance(x, torch.Tensor) else x


def test_a_forward_that_tests_the_type_of_a_value_is_an_island():
    model, x = nn.Sequential(nn.Linear(4, 4), AsksForType()), torch.randn(2, 4)
    bio = biofx.transform(model, SPLIT)
    assert "its graph computes something else" in bio.biofx.islands["1"]
    assert_close(bio(x), model(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.ones(3, 4).view(x.shape[0], -1),
        lambda x: torch.full((2,), x.shape[0]),
        lambda x: torch.arange(x.shape[0]),
        lambda x: torch.ones(3).to(x.dtype),
        lambda x: torch.roll(x, (x.shape[0], 1), (0, 1)),
    ],
)
def test_functions_of_pytorch_may_look_at_types(call):
    class Calls(nn.Module):
        def forward(self, x):
            return call(x), isinstance(self, nn.Module)

    assert not biofx.capture.symbolic.capture(Calls()).biofx.islands


def test_many_islands_are_found_in_few_traces(monkeypatch):
    traces = 0
    original = biofx.capture.modes.trace

    def counted(*args, **kwargs):
        nonlocal traces
        traces += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(biofx.capture.modes, "trace", counted)
    bio = biofx.transform(nn.Sequential(*[Branch() for _ in range(20)]), SPLIT)
    assert len(bio.biofx.islands) == 20
    assert traces == 3  # one finds them; with and without gradients, two make the graph
