"""Twins: how an axis becomes wider when units are doubled, and how that is found out from a result."""

import pytest
import torch

from biofx.widening.twins import Twins, adjacent, alike, followed, named, named_twins, refitted, resized_axes


def names(*shape, start=1):
    return named(torch.Size(shape), start, torch.device("cpu"))


def doubled(*shape, axis):
    """The names of a tensor, and those of one whose units along an axis are doubled."""
    old, twins = names(*shape), adjacent(shape[axis]).on(axis)
    return old, named_twins(old, twins), twins


def test_twins_are_beside_each_other():
    twins = adjacent(3)
    assert twins.source.tolist() == [0, 0, 1, 1, 2, 2]
    assert twins.sign.tolist() == [1, -1, 1, -1, 1, -1]
    assert (twins.size, twins.is_uniform, twins.are_in_order()) == (3, True, True)
    assert twins.on(1).widen(torch.tensor([[1, 2, 3]])).tolist() == [[1, 1, 2, 2, 3, 3]]


def test_a_unit_may_have_several_positions():
    assert adjacent(2, each=2).source.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert adjacent(2, each=2).sign.tolist() == [1, 1, -1, -1, 1, 1, -1, -1]


def test_other_positions_of_a_feature_map_that_was_flattened():
    assert alike(refitted(adjacent(4, each=9), 4 * 25), adjacent(4, each=25))
    assert refitted(adjacent(4, each=9), 30) is None  # no whole number of positions
    assert refitted(Twins(0, torch.tensor([0, 1, 1]), torch.tensor([0.0, 1, -1])), 2) is None  # doubled in part


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
def test_an_operator_on_layout_is_followed_by_names(operator):
    old, new, _ = doubled(2, 3, 4, axis=0)
    if operator(old).shape[0] == 3:
        old, new, _ = doubled(2, 3, 4, axis=1)
    before, after = operator(old), operator(new)
    twins = followed(before, after)
    assert twins is not None
    assert torch.equal(twins.widen(before), after - after % 3)
    assert len(resized_axes(before, after)) == 1
    assert twins.axis == resized_axes(before, after)[0]


def test_channels_that_are_shuffled_lie_differently_in_each_view():
    old, new, _ = doubled(2, 4, axis=1)
    shuffled = [x.view(2, 2, -1).transpose(1, 2).flatten(1) for x in (old, new)]
    twins = followed(*shuffled)
    assert twins is not None
    assert torch.equal(twins.widen(shuffled[0]), shuffled[1] - shuffled[1] % 3)


def test_what_is_not_doubled_has_no_twin():
    beside = names(2, 3, start=100)
    old, new, _ = doubled(2, 2, axis=1)
    twins = followed(torch.cat([old, beside], 1), torch.cat([new, beside], 1))
    assert twins is not None
    assert twins.sign.tolist() == [1, -1, 1, -1, 0, 0, 0]
    assert twins.are_in_order()


@pytest.mark.parametrize(
    ("source", "sign"),
    [([0, 0, 1], [1, -1, 1]), ([1, 1, 0, 0], [1, -1, 1, -1]), ([0, 0, 1, 1], [1, 1, -1, -1])],
    ids=["a twin is missing", "out of order", "twice the same"],
)
def test_other_arrangements_are_not_in_order(source, sign):
    assert not Twins(0, torch.tensor(source), torch.tensor(sign, dtype=torch.float64)).are_in_order()


def test_values_that_are_computed_cannot_be_followed():
    old, new, _ = doubled(2, 3, axis=1)
    assert followed(old, new + 1) is None
    assert followed(old, torch.cat([new, new], 0)) is None  # two axes


def test_alike():
    assert alike(None, None)
    assert not alike(None, adjacent(2))
    assert alike(adjacent(2), adjacent(2).on(3))
    assert not alike(adjacent(2), adjacent(3))
