"""Comparison of what two models compute."""

import pytest
import torch
from torch import nn

from biofx.compare import difference
from biofx.trial import run_in_eval_mode

INF, NAN = torch.inf, torch.nan


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ([], []),
        ([1.0, 2.0], [1.0, 2.0 + 1e-7]),
        ([1e6, 0.0], [1e6, 1.0]),  # rounding is relative to the largest value
        ([INF, -INF, NAN, 1.0], [INF, -INF, NAN, 1.0]),
        ([2**53 + 1], [2**53 + 1]),
        ([True, False], [True, False]),
        ([1 + 2j], [1 + 2j]),
    ],
)
def test_equal_to_rounding(expected, actual):
    assert difference([torch.tensor(expected)], [torch.tensor(actual)]) is None


@pytest.mark.parametrize(
    ("expected", "actual", "message"),
    [
        ([1.0, 2.0], [1.0, 2.5], r"output 0 differs by 0.5 (at most 0.000691 is rounding)"),
        ([INF, 4.0], [INF, 5.0], r"output 0 differs by 1 (at most 0.00138 is rounding)"),
        ([INF, 1.0], [-INF, 1.0], "output 0 differs by inf (at most 0.000345 is rounding)"),
        ([NAN], [1.0], "output 0 differs by inf (at most 0.000345 is rounding)"),
        ([1.0], [NAN], "output 0 differs by inf (at most 0.000345 is rounding)"),
        ([2**53 + 1, 2], [2**53 + 1, 5], "output 0 differs by 3"),
        ([True], [False], "output 0 differs by 1"),
        ([[1.0]], [1.0], "output 0 is float32 (1,) instead of float32 (1, 1)"),
        ([1], [1.0], "output 0 is float32 (1,) instead of int64 (1,)"),
    ],
)
def test_a_difference_says_how_large_it_is(expected, actual, message):
    assert difference([torch.tensor(expected)], [torch.tensor(actual)]) == message


def test_the_first_difference_is_named():
    a, b = torch.zeros(2), torch.ones(2)
    assert difference([a, a], [a]) == "there are 1 outputs instead of 2"
    assert difference([a, a], [a, b]).startswith("output 1 differs by 1")


def test_the_precision_of_the_dtype_decides_what_is_rounding():
    for dtype, same in ((torch.bfloat16, True), (torch.float32, False), (torch.float64, False)):
        pair = [torch.tensor([x], dtype=dtype) for x in (1.0, 1.03125)]
        assert (difference(pair[:1], pair[1:]) is None) is same


class Unclean(nn.Module):
    """Changes everything that it can lay hands on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inplace", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("filled", None)
        self.inner = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).eval()
        self.inner.register_buffer("tied", self.inplace)

    def forward(self, x, more):
        x.add_(more["shift"])
        self.inplace.add_(1)
        self.replaced = self.replaced + 1
        self.filled = x
        self.register_buffer("new", x)
        self.inner.train()
        assert self.inner.tied is self.inplace
        return {"logits": self.inner(x), "draw": torch.rand(2), "training": self.training, "count": self.inplace}


def test_running_a_model_has_no_side_effects():
    model = Unclean()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    modes = [module.training for module in model.modules()]
    x, shift, rng = torch.zeros(3, 2), torch.ones(()), torch.get_rng_state()
    logits, _, count = run_in_eval_mode(model, (x, {"shift": shift}))
    assert logits.shape == (3, 2)
    assert count.tolist() == [1, 1]
    after = dict(model.named_buffers(remove_duplicate=False))
    assert {name: id(b) for name, b in after.items()} == {name: id(b) for name, b in buffers.items()}
    assert all(torch.equal(after[name], values[name]) for name in values)
    assert (model.filled, hasattr(model, "new")) == (None, False)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(x, torch.zeros(3, 2))
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_model_that_fails_is_left_as_it_was():
    model = Unclean()
    with pytest.raises(KeyError):
        run_in_eval_mode(model, (torch.zeros(3, 2), {}))
    assert model.training
    assert not model.inplace.any()
