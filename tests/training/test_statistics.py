"""Statistics: sums over the entries of weights, whatever their number, precision and memory format."""

from types import SimpleNamespace

import pytest
import torch

from biofx.passes.rejuvenate import RULES
from biofx.training.blocks import CPU
from biofx.training.statistics import magnitudes, magnitudes_along, mean_magnitudes

LARGE = 2**24 + 2**22  # ones, of which float32 counts 2²⁴ if it adds one after the other


def weight(values: torch.Tensor) -> SimpleNamespace:
    """What a statistic asks of a weight that one process holds."""
    return SimpleNamespace(raw=values, value=values, size=values.numel(), shard=SimpleNamespace(groups=()))


def test_no_entry_of_a_large_weight_is_lost():
    ones = torch.ones(LARGE // 2**10, 2**10)
    assert magnitudes([ones])[0] == LARGE
    assert mean_magnitudes([weight(-ones)])[0] == 1
    torch.testing.assert_close(RULES["exponential"].statistics([weight(-ones)])[0], torch.tensor([-1.0, 1, 1]) * LARGE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_statistic_of_blocks_is_that_of_the_whole(rule, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (CPU // 100, 250), (7,), (2, CPU)]
    weights = [weight(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    weights.append(weight(torch.randn(16, 4, 3, 3, generator=generator).to(dtype, memory_format=torch.channels_last)))
    for each, found in zip(weights, RULES[rule].statistics(weights), strict=True):
        x = each.value.double()
        expected = torch.stack([x.sum(), x.abs().sum(), x.square().sum()]) if found.dim() else x.abs().max()
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-2)
    means = torch.stack(mean_magnitudes(weights)).double()
    torch.testing.assert_close(means, torch.stack([x.value.double().abs().mean() for x in weights]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_magnitudes_along_axes_are_in_single_precision_at_least(dtype):
    values = torch.randn(300, 5, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = values.double().abs().sum((0, 2))
    torch.testing.assert_close(magnitudes_along(values, (0, 2)).double(), expected, rtol=1e-5, atol=0)
