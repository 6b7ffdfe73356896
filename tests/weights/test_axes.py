"""Axes: a weight's entries by their presynaptic and postsynaptic units, checked against numbers written out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

from biofx.analysis.understanding import understand
from biofx.weights.axes import GROUP, NEITHER, POST, PRE, Axes, Factor
from models.weights import Layer


def axes_of(shape, factors):
    return Axes(tuple(shape), tuple(Factor(axis, size, *role) for axis, size, role in factors))


LINEAR = axes_of((2, 3), [(0, 2, POST), (1, 3, PRE)])
GROUPED = axes_of((4, 3), [(0, 2, GROUP), (0, 2, POST), (1, 3, PRE)])  # as of a convolution in 2 groups

KERNEL = [(2, 3, NEITHER), (3, 3, NEITHER)]


def depthwise(x, weight, transposed=False):
    return (torch.conv_transpose2d if transposed else torch.conv2d)(x, weight, groups=len(weight))


@st.composite
def any_axes(draw):
    """A weight of up to three axes, each of up to two factors."""
    factors = [
        (axis, draw(st.integers(1, 3)), draw(st.sampled_from([PRE, POST, GROUP, NEITHER])))
        for axis in range(draw(st.integers(1, 3)))
        for _ in range(draw(st.integers(1, 2)))
    ]
    shape = [math.prod(size for a, size, _ in factors if a == axis) for axis in range(factors[-1][0] + 1)]
    return axes_of(shape, factors)


def numbered(axes):
    return torch.arange(math.prod(axes.shape)).view(axes.shape)


def test_rows_of_a_matrix_are_incoming_and_columns_outgoing():
    weight = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert LINEAR.incoming(weight).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert LINEAR.outgoing(weight).tolist() == [[1, 4], [2, 5], [3, 6]]
    assert LINEAR.spread(torch.tensor([7, 8])).tolist() == [[7], [8]]
    assert LINEAR.spread_presynaptic(torch.tensor([7, 8, 9])).tolist() == [[7, 8, 9]]


def test_groups_have_presynaptic_units_of_their_own():
    weight = numbered(GROUPED)
    assert (GROUPED.units, GROUPED.presynaptic_units) == (4, 6)
    assert GROUPED.outgoing(weight).tolist() == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]
    assert GROUPED.spread_presynaptic(torch.arange(6)).tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    assert str(GROUPED) == "presynaptic axis 1, postsynaptic axis 0, axis 0 in 2 groups"


@given(any_axes())
def test_gathering_is_undone(axes):
    weight = numbered(axes)
    assert torch.equal(axes.from_incoming(axes.incoming(weight)), weight)
    assert torch.equal(axes.from_outgoing(axes.outgoing(weight)), weight)


@given(any_axes())
def test_what_is_spread_is_gathered_in_the_rows_of_its_unit(axes):
    for count, spread, gather in [
        (axes.units, axes.spread, axes.incoming),
        (axes.presynaptic_units, axes.spread_presynaptic, axes.outgoing),
    ]:
        rows = gather(spread(torch.arange(count)).expand(axes.shape))
        assert torch.equal(rows, torch.arange(count)[:, None].expand_as(rows))


@given(any_axes())
def test_one_more_factor_of_one_step_is_the_same_weight(axes):
    again = Axes(axes.shape, (*axes.factors, type(axes.factors[0])(len(axes.shape) - 1, 1, presynaptic=True)))
    assert axes.agree(again)
    assert again.agree(axes)


def test_other_units_do_not_agree():
    assert not LINEAR.agree(axes_of((2, 3), [(0, 2, PRE), (1, 3, POST)]))
    assert not GROUPED.agree(axes_of((4, 3), [(0, 4, POST), (1, 3, PRE)]))


def test_another_number_of_presynaptic_units():
    wider = GROUPED.with_presynaptic(12)
    assert (wider.shape, wider.presynaptic_units, wider.units) == ((4, 6), 12, 4)


def axes_in_use(shape, function, inputs):
    """The axes of a parameter by the operator that reads it."""
    (read,) = understand(Layer(shape, function), (torch.randn(inputs),)).forms.reads
    return read.axes()


@pytest.mark.parametrize(
    ("shape", "function", "inputs", "expected"),
    [
        ((2, 3), linear, (5, 3), LINEAR),
        ((3, 2), lambda x, w: linear(x, w.T), (5, 3), axes_of((3, 2), [(0, 3, PRE), (1, 2, POST)])),
        ((6,), lambda x, w: linear(x, w.view(2, 3)), (5, 3), axes_of((6,), [(0, 2, POST), (0, 3, PRE)])),
        ((4, 3), lambda x, w: x @ w.view(2, 2, 3).mT, (2, 5, 3), GROUPED),
        (
            (2, 2, 3),
            lambda x, w: linear(x, w.view(4, 3)),
            (5, 3),
            axes_of((2, 2, 3), [(0, 2, POST), (1, 2, POST), (2, 3, PRE)]),
        ),
        ((4, 3), lambda x, w: linear(x, w[:2]), (5, 3), axes_of((4, 3), [(0, 4, POST), (1, 3, PRE)])),  # a part is all
        (
            (5, 2, 3),
            lambda x, w: linear(x, w[1]),
            (5, 3),
            axes_of((5, 2, 3), [(0, 5, GROUP), (1, 2, POST), (2, 3, PRE)]),
        ),
        ((1, 3), linear, (5, 3), axes_of((1, 3), [(0, 1, POST), (1, 3, PRE)])),
        ((2, 3), lambda x, w: torch.bmm(x, w.T.expand(7, 3, 2)), (7, 5, 3), LINEAR),
        ((4, 1, 3, 3), depthwise, (5, 4, 8, 8), axes_of((4, 1, 3, 3), [(0, 4, GROUP), (1, 1, PRE), *KERNEL])),
    ],
    ids=[
        "itself", "transposed", "unflattened", "in groups", "flattened", "sliced", "selected", "one unit", "expanded",
        "depthwise",
    ],
)  # fmt: skip
def test_the_axes_of_a_view_are_those_of_what_it_is_a_view_of(shape, function, inputs, expected):
    found = axes_in_use(shape, function, inputs)
    assert found is not None
    assert found.agree(expected)
    assert (found.units, found.presynaptic_units) == (expected.units, expected.presynaptic_units)
    assert (found.presynaptic, found.postsynaptic) == (expected.presynaptic, expected.postsynaptic)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_unit_of_each_group_can_become_several(transposed):
    axes = axes_in_use((4, 1, 3, 3), lambda x, w: depthwise(x, w, transposed), (5, 4, 8, 8))
    assert axes.with_presynaptic(8).presynaptic_units == 8


@pytest.mark.parametrize(
    ("shape", "function", "inputs"),
    [
        ((3,), lambda x, w: linear(x, w.expand(2, 3)), (5, 3)),  # one synapse for several units
        ((4, 6), lambda x, w: linear(x, w.view(3, 8)), (5, 8)),  # rows that end in the middle of a row
        ((8,), lambda x, w: linear(x, w.as_strided((3, 4), (1, 1))), (5, 4)),  # windows that overlap
    ],
    ids=["expanded", "cut across", "overlapping"],
)
def test_what_a_view_mixes_cannot_be_told(shape, function, inputs):
    assert axes_in_use(shape, function, inputs) is None
