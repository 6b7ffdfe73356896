"""Scale: work grows with the number of layers, and not with its square.

Work is counted in lines of biofx and of torch.fx that run, which is the same on each machine: for each of them, as many
more layers are as many more times.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from conftest import since

LAYERS = 5
X = torch.randn(2, 4)
COUNTED = tuple(os.path.join(os.path.dirname(str(package.__file__)), "") for package in (biofx, torch.fx))


class Residual(nn.Module):
    """Each layer reads the sum of all before it, scaled by a parameter."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + torch.relu(layer(norm(x)))
        return x


def chain(layers: int) -> nn.Module:
    pairs = ((nn.Linear(4, 4), nn.ReLU()) for _ in range(layers))
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


PIPELINES = {
    nn.Sequential: "fuzzy-learning-rates,dales-principle,synaptic-scaling,continual-backprop",
    Residual: "fuzzy-learning-rates,dales-principle,synaptic-scaling",  # a unit of its stream is a sum over all layers
}


def lines(function: Callable[[], Any]) -> Counter[tuple[str, int]]:
    """How often each line runs, by file and number."""
    count: Counter[tuple[str, int]] = Counter()

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        count[frame.f_code.co_filename, frame.f_lineno] += event == "line"
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(COUNTED) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


OPERATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "units": lambda model: str(biofx.units(model, X)),
    "transform": lambda model: biofx.transform(model, PIPELINES[type(model)], example_inputs=X),
    "fold": lambda bio: biofx.fold(bio),
}


@since((2, 13), "PyTorch asks a Sequential for its length again and again")
@pytest.mark.parametrize("build", [chain, Residual])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_work_grows_with_the_number_of_layers(operation, build):
    def work(layers: int) -> Counter[tuple[str, int]]:
        model = build(layers)
        given = OPERATIONS["transform"](model) if operation == "fold" else model
        OPERATIONS[operation](given)  # fills caches, which other tests may have filled in part
        return lines(lambda: OPERATIONS[operation](given))

    work(2)  # what is done once for each process
    few, more, most = (work(n * LAYERS) for n in (1, 2, 3))
    growing = {place: (few[place], more[place], count) for place, count in most.items()}
    assert not {place: (a, b, c) for place, (a, b, c) in growing.items() if c - b > b - a + LAYERS}
