"""Sizes: the numbers in modules and in arguments of calls that count units."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from biofx.widening.axis_doubling import adjacent_twins
from biofx.widening.sizes import doubled_sizes, own_tensors, scaled_arguments, unit_axis


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (4, [8]),
        (0, []),
        (True, []),
        ("same", []),
        ((2, 3), [(4, 3), (2, 6), (4, 6)]),
        ([2, "x"], [[4, "x"], [4, "x"]]),
        (slice(2, None, 3), [slice(4, None, 3), slice(4, None, 3)]),
        ({"dim": 1, "sizes": (2,)}, [{"dim": 2, "sizes": (2,)}] + [{"dim": 1, "sizes": (4,)}] * 2),
    ],
    ids=str,
)
def test_arguments_with_one_integer_scaled_or_all(argument, expected):
    assert list(scaled_arguments(argument, Fraction(2))) == expected


def test_only_whole_numbers():
    assert list(scaled_arguments((2, 3), Fraction(3, 2))) == [(3, 3), (3, 3)]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm2d(4), {"num_features": 8}),
        (nn.GroupNorm(2, 4), {"num_channels": 8}),
        (nn.LayerNorm((4, 3)), {"normalized_shape": (8, 3)}),
        (nn.PReLU(4), {"num_parameters": 8}),
        (nn.BatchNorm2d(3), {}),
        (nn.ReLU(), {}),
    ],
    ids=str,
)
def test_modules_with_a_parameter_for_each_unit_become_wider(module, expected):
    assert doubled_sizes(module, adjacent_twins(4)) == expected


def test_the_axis_of_units_is_the_last_that_fits_or_the_first():
    assert unit_axis(torch.empty(4, 3, 4), adjacent_twins(4)) == 2
    assert unit_axis(torch.empty(4, 3, 4), adjacent_twins(4), 0) == 0
    assert unit_axis(torch.empty(3), adjacent_twins(4)) is None


def test_what_a_module_holds_itself():
    module = nn.Sequential(nn.BatchNorm1d(2))
    assert own_tensors(module) == {}
    assert list(own_tensors(module[0])) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(own_tensors(nn.Linear(2, 2, bias=False))) == ["weight"]
