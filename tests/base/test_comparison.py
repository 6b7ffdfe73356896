"""Comparison of what two models compute."""

import pytest
import torch

from biofx.base.comparison import difference, is_rounded

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


def test_a_coarser_dtype_in_which_it_was_computed_decides():
    pair = [torch.tensor([x], dtype=torch.float64) for x in (1.0, 1.0 + 1e-5)]
    assert difference(pair[:1], pair[1:]) == "output 0 differs by 1e-05 (at most 1.49e-08 is rounding)"
    assert difference(pair[:1], pair[1:], torch.float32) is None
    assert difference(pair[:1], [pair[1] + 1], torch.float32).endswith("(at most 0.000345 is rounding)")
    half = [x.bfloat16() for x in (pair[0], pair[0] + 0.03125)]
    assert difference(half[:1], half[1:], torch.float32) is None


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ([1.0, -1e-6], [1.0 + 2**-22, -1e-6], True),
        ([1.0, -1e-6], [1.0, -1.00001e-6], False),  # each number counts, not the largest
        ([1.0], [-1.0], False),
        ([1.0], [NAN], False),
        ([INF], [INF], True),
        ([0.0], [1e-40], True),
        ([1], [1], True),
        ([1], [2], False),
        ([1.0], [1], False),
        ([1.0], [1.0, 1.0], False),
    ],
)
def test_whether_numbers_differ_in_their_last_digits(old, new, same):
    assert is_rounded(torch.tensor(old), torch.tensor(new)) is same
