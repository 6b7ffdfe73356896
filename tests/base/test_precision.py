"""Precision: what takes part in a run decides what is rounding."""

import pytest
import torch
from torch import nn

import biofx
from biofx.base.precision import amplification, coarsest_dtype
from models.small import Chaotic

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


class InDouble(nn.Module):
    """A model of float32 that returns float64."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 10)

    def first(self, x):
        return self.a(x)

    def forward(self, x):
        return self.b(self.first(x).relu()).double().log_softmax(-1)


class Autocast(InDouble):
    def first(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.a(x)

    def forward(self, x):
        return self.b(self.first(x).float().relu())


class HalfInDouble(InDouble):
    def __init__(self):
        super().__init__()
        self.a.half()

    def first(self, x):
        return self.a(x.half()).float()


class Double(InDouble):
    """A model of float64, with constants of float32, an unused buffer and whole numbers."""

    def __init__(self):
        super().__init__()
        self.double()
        self.register_buffer("unused", torch.ones(3, dtype=torch.float16))

    def forward(self, x):
        signs = torch.zeros(10)
        signs[1:] = 0.5
        return self.b(self.first(x.double()).relu()) * torch.tensor(0.5) + torch.arange(10.0) * signs + len(x)


class Attention(nn.Module):
    """Its fast path, without gradients, rounds otherwise than its operators."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        return self.layer(x[None]).double().softmax(-1)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [(InDouble, torch.float32), (Autocast, torch.bfloat16), (HalfInDouble, torch.float16)],
)
def test_the_coarsest_dtype_that_takes_part(model, dtype):
    assert coarsest_dtype(model(), X) is dtype


def test_constants_and_what_is_unused_take_no_part():
    assert coarsest_dtype(Double(), X.double()) is torch.float64


def test_whole_numbers_have_no_precision():
    assert coarsest_dtype(nn.Flatten(), torch.ones(2, 3, dtype=torch.int64)) is None


def test_what_is_stored_in_8_bits_is_not_computed_with():
    class Stored(nn.Module):
        def forward(self, x):
            return x.to(torch.float8_e4m3fn).float() + x

    assert coarsest_dtype(Stored(), X) is torch.float32


@pytest.mark.parametrize("pipeline", ["split-synapses{synapses=5}", "mirror-units", "cortex"])
@pytest.mark.parametrize("model", [InDouble, Autocast, HalfInDouble])
def test_rounding_inside_of_a_model_is_no_difference(model, pipeline):
    torch.manual_seed(0)
    biofx.transform(model(), pipeline, example_inputs=X)


def test_a_graph_may_round_otherwise_inside():
    torch.manual_seed(0)
    biofx.transform(Attention(), "split-synapses", frontend="export", example_inputs=X)


def test_an_exported_file_may_round_otherwise_inside(tmp_path):
    torch.manual_seed(0)
    biofx.export(biofx.transform(InDouble(), "mirror-units", example_inputs=X), tmp_path / "model.pt2", X)


@pytest.mark.parametrize(("steps", "advice"), [(20, ""), (300, "on which it runs for fewer steps")])
def test_a_model_that_amplifies_rounding_says_what_to_do(steps, advice):
    torch.manual_seed(0)
    model, h = Chaotic(), torch.randn(8, 200)
    weight = model.rec.weight.detach().clone()
    assert amplification(model, (h, steps), [model(h, steps)]).endswith(advice)
    assert bool(advice) is bool(amplification(model, (h, steps), [model(h, steps)]))
    assert torch.equal(model.rec.weight, weight)
