"""Conditions: a graph takes all shapes for which it is correct; on others the Python runs, or they are refused."""

import pytest
from torch import nn

import biofx
from exported_models import assert_same_in_both_modes, export, export_for_graph, same, x
from models import any_python

BATCHES = {
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda n: (x(n, 5, 8),)),
    "two_inputs": (lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), lambda n: (x(n, 5, 8), x(n, 3, 8))),
    "mask": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        lambda n: {"src": x(n, 5, 8), "mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True},
    ),
    "without_gradients": (any_python.Gated, lambda n: (x(n, 4),)),
}


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_of_one_is_like_any_other(name, first):
    build, make = BATCHES[name]
    model = build()
    bio = export(model, make(first))
    for size in (1, 2, 3):
        assert_same_in_both_modes(bio, model, make(size))


class OneApart(nn.Linear):
    def forward(self, value):
        y = super().forward(value)
        return -y if value.shape[0] == 1 else y


@pytest.mark.parametrize(("first", "other"), [(1, 2), (2, 1)])
def test_a_batch_of_one_runs_the_python_or_is_refused(first, other):
    model = OneApart(4, 4)
    bio = export(model, x(first, 4))
    for size in (first, other):
        value = x(size, 4)
        assert same(bio(value), model(value))
    bio = export_for_graph(model, x(first, 4))
    with pytest.raises(biofx.ArgumentError, match=r"captured for value.shape\[0\] .= 1: value has shape"):
        bio(x(other, 4))


def test_equal_sizes_have_to_stay_equal():
    class Sum(nn.Linear):
        def forward(self, a, b):
            return super().forward(a + b)

    bio = export_for_graph(Sum(4, 4), (x(), x()))
    with pytest.raises(biofx.ArgumentError, match=r"forward was captured for .*a.shape\[0\] == b.shape\[0\]"):
        bio(x(3, 4), x(1, 4))


@pytest.mark.parametrize("mode", [True, False])
def test_conditions_are_those_of_the_mode(mode):
    """A batch norm needs more than one example in training only."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    bio = export_for_graph(model, x()).train(mode)
    if mode:
        with pytest.raises(biofx.ArgumentError, match=r"captured for input.shape\[0\]"):
            bio(x(1, 4))
    else:
        one = x(1, 4)
        assert same(bio(one), model.eval()(one))
