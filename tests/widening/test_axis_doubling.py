"""Axis doubling: positions that are repeated when units are doubled, and how labels in a result show them."""

import pytest
import torch

from biofx.widening.axis_doubling import (
    AxisDoubling,
    adjacent_twins,
    doubled_labels,
    doubling_from_labels,
    is_same_doubling,
    labels,
    resized_axes,
)


def labelled(*shape, start=1):
    return labels(torch.Size(shape), start, torch.device("cpu"))


def doubled(*shape, axis):
    """The labels of a tensor, those after its units along an axis are doubled, and the doubling."""
    old, doubling = labelled(*shape), adjacent_twins(shape[axis]).on(axis)
    return old, doubled_labels(old, doubling), doubling


def test_twins_are_adjacent():
    doubling = adjacent_twins(3)
    assert doubling.source.tolist() == [0, 0, 1, 1, 2, 2]
    assert doubling.sign.tolist() == [1, -1, 1, -1, 1, -1]
    assert (doubling.size, doubling.is_uniform, doubling.is_in_order()) == (3, True, True)
    assert doubling.on(1).apply(torch.tensor([[1, 2, 3]])).tolist() == [[1, 1, 2, 2, 3, 3]]


def test_a_flattened_unit_has_several_positions():
    old, new, _ = doubled(2, 2, 2, axis=1)
    doubling = doubling_from_labels(old.flatten(1), new.flatten(1))
    assert doubling is not None
    assert doubling.source.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert doubling.sign.tolist() == [1, 1, -1, -1, 1, 1, -1, -1]


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: x,
        lambda x: x.permute(2, 0, 1),
        lambda x: x.flatten(1),
        lambda x: x.flip(0),
        lambda x: x[:, 1:],
        lambda x: torch.nn.functional.pad(x, (1, 1)),
        lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1),
    ],
    ids=["same", "permuted", "flattened", "flipped", "sliced", "padded", "expanded"],
)
def test_labels_follow_an_operator_on_layout(operator):
    old, new, _ = doubled(2, 3, 4, axis=0)
    if operator(old).shape[0] == 3:
        old, new, _ = doubled(2, 3, 4, axis=1)
    before, after = operator(old), operator(new)
    doubling = doubling_from_labels(before, after)
    assert doubling is not None
    assert torch.equal(doubling.apply(before), after - after % 3)
    assert len(resized_axes(before, after)) == 1
    assert doubling.axis == resized_axes(before, after)[0]


def test_channels_that_are_shuffled_lie_differently_in_each_view():
    old, new, _ = doubled(2, 4, axis=1)
    shuffled = [x.view(2, 2, -1).transpose(1, 2).flatten(1) for x in (old, new)]
    doubling = doubling_from_labels(*shuffled)
    assert doubling is not None
    assert torch.equal(doubling.apply(shuffled[0]), shuffled[1] - shuffled[1] % 3)


def test_what_is_not_doubled_has_no_twin():
    other = labelled(2, 3, start=100)
    old, new, _ = doubled(2, 2, axis=1)
    doubling = doubling_from_labels(torch.cat([old, other], 1), torch.cat([new, other], 1))
    assert doubling is not None
    assert doubling.sign.tolist() == [1, -1, 1, -1, 0, 0, 0]
    assert doubling.is_in_order()


@pytest.mark.parametrize(
    ("source", "sign"),
    [([0, 0, 1], [1, -1, 1]), ([1, 1, 0, 0], [1, -1, 1, -1]), ([0, 0, 1, 1], [1, 1, -1, -1])],
    ids=["a twin is missing", "out of order", "twice the same"],
)
def test_other_arrangements_are_not_in_order(source, sign):
    assert not AxisDoubling(0, torch.tensor(source), torch.tensor(sign, dtype=torch.float64)).is_in_order()


def test_values_that_are_computed_cannot_be_doubling_from_labels():
    old, new, _ = doubled(2, 3, axis=1)
    assert doubling_from_labels(old, new + 1) is None
    assert doubling_from_labels(old, torch.cat([new, new], 0)) is None  # two axes


def test_doublings_are_the_same_on_whichever_axes():
    assert is_same_doubling(None, None)
    assert not is_same_doubling(None, adjacent_twins(2))
    assert is_same_doubling(adjacent_twins(2), adjacent_twins(2).on(3))
    assert not is_same_doubling(adjacent_twins(2), adjacent_twins(3))
