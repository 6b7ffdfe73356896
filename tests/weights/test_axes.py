"""Axes: a weight's entries by their presynaptic and postsynaptic units, checked against numbers written out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from biofx.weights.axes import GROUP, NEITHER, Axes, axes_of, axes_of_view

PRE, POST = (True, False), (False, True)
LINEAR = axes_of((2, 3), [(0, 2, POST), (1, 3, PRE)])
GROUPED = axes_of((4, 3), [(0, 2, GROUP), (0, 2, POST), (1, 3, PRE)])  # as of a convolution in 2 groups


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


@pytest.mark.parametrize(
    ("shape", "view", "roles", "expected"),
    [
        ((2, 3), lambda w: w, [POST, PRE], LINEAR),
        ((3, 2), lambda w: w.T, [POST, PRE], axes_of((3, 2), [(0, 3, PRE), (1, 2, POST)])),
        ((6,), lambda w: w.view(2, 3), [POST, PRE], axes_of((6,), [(0, 2, POST), (0, 3, PRE)])),
        ((4, 3), lambda w: w.view(2, 2, 3), [GROUP, POST, PRE], GROUPED),
        ((2, 2, 3), lambda w: w.view(4, 3), [POST, PRE], axes_of((2, 2, 3), [(0, 2, POST), (1, 2, POST), (2, 3, PRE)])),
        ((4, 3), lambda w: w[:2], [POST, PRE], axes_of((4, 3), [(0, 4, POST), (1, 3, PRE)])),  # a part stands for all
        ((5, 2, 3), lambda w: w[1], [POST, PRE], axes_of((5, 2, 3), [(0, 5, GROUP), (1, 2, POST), (2, 3, PRE)])),
        ((1, 3), lambda w: w, [POST, PRE], axes_of((1, 3), [(0, 1, POST), (1, 3, PRE)])),
        ((2, 3), lambda w: w.expand(7, 2, 3), [NEITHER, POST, PRE], LINEAR),
    ],
    ids=["itself", "transposed", "unflattened", "in groups", "flattened", "sliced", "selected", "one unit", "expanded"],
)
def test_the_axes_of_a_view_are_those_of_what_it_is_a_view_of(shape, view, roles, expected):
    found = axes_of_view(shape, view(torch.empty(shape)), roles)
    assert found is not None
    assert found.agree(expected)
    assert (found.units, found.presynaptic_units) == (expected.units, expected.presynaptic_units)


@pytest.mark.parametrize(
    ("shape", "view", "roles"),
    [
        ((3,), lambda w: w.expand(2, 3), [POST, PRE]),  # one synapse for several units
        ((4, 6), lambda w: w.view(3, 8), [POST, PRE]),  # rows that end in the middle of a row
        ((8,), lambda w: w.as_strided((3, 4), (1, 1)), [POST, PRE]),  # windows that overlap
    ],
    ids=["expanded", "cut across", "overlapping"],
)
def test_what_a_view_mixes_cannot_be_told(shape, view, roles):
    assert axes_of_view(shape, view(torch.empty(shape)), roles) is None
