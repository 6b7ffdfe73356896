"""Models on another device than the CPU, and models whose layers are on several."""

import copy

import pytest
import torch
from torch import nn

import biofx
from biofx import passes
from biofx.base import gains, noise
from conftest import in_turn
from second_device import CPU, SECOND, SecondDevice

PIPELINES = [
    *sorted(passes.registered_passes()),
    *passes.recipes(),
    "dales-principle{constraint=softplus}",
    "dales-principle{balance=False}",
    "dales-principle{assign=closest}",
    "split-synapses,dales-principle",
    "split-synapses{activation=tanh}",
    "synaptic-scaling{on=weight}",
    "rejuvenate{rule=threshold,dre=2.0}",
    *(f"fuzzy-learning-rates{{distribution={name},every=1}}" for name in ("activity", "temporal", "weight_adaptive")),
    "fuzzy-learning-rates{dtype=unstored}",
    "fuzzy-learning-rates{dtype=uint8,distribution=weight_adaptive,every=1},crystallize",
]


class Network(nn.Module):
    """Two layers read the same units; all but the first and one of these may be on another device."""

    def __init__(self):
        super().__init__()
        self.first, self.here = nn.Linear(4, 8), nn.Linear(8, 3)
        self.there = nn.ModuleList([nn.Linear(8, 6), nn.BatchNorm1d(6), nn.GRU(6, 4), nn.Linear(4, 3)])

    def forward(self, x):
        h = self.first(x).relu()
        linear, norm, rnn, last = self.there
        there = norm(linear(h.to(linear.weight.device))).relu()
        return self.here(h) + last(rnn(there[None])[0][0]).to(x.device)


@pytest.fixture
def second_device():
    for cached in (noise._on_device, gains._table):
        cached.cache_clear()  # what another test put on the device is not known to be there
    with SecondDevice() as mode:
        yield mode


def test_the_second_device_is_another_one(second_device):
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    second_device.put(layer)
    assert layer.weight.device == layer(x.to(SECOND)).device == SECOND
    assert layer(x.to(SECOND)).cpu().device == x.device == CPU
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        layer(x)


class OutputFirst(nn.Module):
    """Its first parameter is not where its input goes."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(8, 2), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())

    def forward(self, x):
        return self.head(self.body(x).to("cpu"))


@pytest.mark.parametrize("pipeline", ["dales-principle", "mirror-units"])
def test_inputs_are_guessed_for_the_device_that_reads_them(pipeline, second_device):
    model, x = OutputFirst(), torch.randn(3, 4)
    expected = biofx.transform(model, pipeline, example_inputs=x).state_dict()
    second_device.put(model.body)
    state = biofx.transform(model, pipeline, example_inputs=x.to(SECOND)).state_dict()
    for name, value in state.items():
        torch.testing.assert_close(value.cpu(), expected[name])


@pytest.mark.parametrize(
    ("pipeline", "setting"), in_turn(PIPELINES, [("one", torch.optim.SGD), ("two", torch.optim.AdamW)]), ids=str
)
def test_every_pass_on_other_devices(pipeline, setting, second_device):
    (devices, optimizer_class), model, x = setting, Network(), torch.randn(5, 4)
    second_device.put(model if devices == "one" else model.there)
    x = x.to(model.first.weight.device)
    bio = biofx.transform(model, pipeline, example_inputs=x)
    for name, tensor in [*bio.named_parameters(), *bio.named_buffers()]:
        assert tensor.device == (SECOND if devices == "one" or name.startswith("there") else CPU), name
    biofx.summary(bio)
    biofx.units(bio)
    assert biofx.l1(bio).isfinite()
    trained = copy.deepcopy(bio)
    optimizer = optimizer_class(trained.parameters(), 0.01)
    biofx.attach(trained, optimizer)
    history = biofx.record(trained, optimizer, every=1)
    for _ in range(2):
        trained(x).square().sum().backward()
        optimizer.step()
    biofx.verify(trained)
    assert len(history.rows) == 3 * len(history.weights)
    torch.testing.assert_close(biofx.fold(trained).eval()(x), trained.eval()(x))
