"""Gains: drawn from a counter, and stored in 8 bits."""

import math

import pytest
import torch
from scipy import stats

from biofx.base import gains, noise
from biofx.base.gains import LARGEST, QUANTILES, coded, decoded

CHANCES = (torch.arange(noise.LEVELS, dtype=torch.float64) + 0.5) / noise.LEVELS
EXACT = {
    "uniform": lambda nu: stats.uniform(1 - nu, 2 * nu),
    "normal": lambda nu: stats.norm(1, nu),
    "lognormal": lambda nu: stats.lognorm(s=math.sqrt(math.log1p(nu**2)), scale=1 / math.sqrt(1 + nu**2)),
    "gamma": lambda nu: stats.gamma(nu**-2, scale=nu**2),
    "beta": lambda nu: stats.beta(1 / nu, 1 / nu, loc=1 - nu, scale=2 * nu),
}
SPREADS = [1e-4, 0.05, 0.16, 0.4, 0.9, 2.0]


def counter(site="a", start=0):
    return noise.Counter(torch.tensor(0), torch.tensor(0), ("test", site), start)


def drawn(count, distribution="uniform", nu=0.16, dtype=torch.float64, minimum=0.0, maximum=1e9, **place):
    like = torch.empty(count, dtype=dtype)
    return gains.drawn([like], [counter(**place)], distribution, nu, minimum, maximum)[0]


@pytest.mark.parametrize("nu", SPREADS)
@pytest.mark.parametrize("name", EXACT)
def test_quantiles_are_those_of_scipy(name, nu):
    found = EXACT[name](nu).cdf(QUANTILES[name](CHANCES, nu).numpy())
    assert abs(torch.from_numpy(found) - CHANCES).max() < 1e-7


@pytest.mark.parametrize("nu", [0.05, 0.16, 0.4])
@pytest.mark.parametrize("name", EXACT)
def test_tables_have_the_moments_of_the_distribution(name, nu):
    table = QUANTILES[name](CHANCES, nu)
    assert float(table.mean()) == pytest.approx(1, abs=2e-5)
    assert float(table.std()) == pytest.approx(EXACT[name](nu).std(), rel=5e-4)


@pytest.mark.parametrize("name", EXACT)
def test_draws_are_as_close_to_the_distribution_as_exact_ones(name):
    count = 1 << 20
    distance = stats.kstest(drawn(count, name).numpy(), EXACT[name](0.16).cdf).statistic
    assert distance < 1.63 / math.sqrt(count)  # what 1% of exact draws exceed


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 27, 784, 1000, 4096, 65536])
def test_gains_of_entries_are_independent(lag):
    z = (drawn(1 << 20, "normal") - 1) / 0.16
    assert abs((z[lag:] * z[:-lag]).mean()) < 4.5 / math.sqrt(len(z) - lag)


def test_gains_of_weights_are_independent():
    z = torch.stack([(drawn(1 << 14, "normal", site=f"{i}.weight") - 1) / 0.16 for i in range(24)])
    between = (z @ z.T / z.shape[1]).triu(1)
    assert between.abs().max() < 5.5 / math.sqrt(z.shape[1])


def test_levels_are_equally_probable():
    (levels,) = noise.levels([torch.empty(1 << 22)], [counter()])
    counts = torch.bincount(levels, minlength=noise.LEVELS)
    assert len(counts) == noise.LEVELS
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("start", [0, 1, 1001, (1 << 20) - 3, (1 << 40) + 5])
def test_a_part_has_the_gains_that_it_has_in_the_whole(start, monkeypatch):
    whole = drawn(5000, start=start)
    parts = [drawn(1, start=start), drawn(1000, start=start + 1), drawn(3999, start=start + 1001)]
    assert torch.equal(torch.cat(parts), whole)
    monkeypatch.setattr(gains, "CPU", 333)
    assert torch.equal(drawn(5000, start=start), whole)


def test_levels_are_the_same_on_every_device():
    """Elsewhere than on a CPU, words of all tensors are computed side by side, from counters that stay there."""
    counters, sizes = [counter(start=4), counter("b"), counter("c", 2**33)], [501, 7, 12]
    likes = [torch.empty(2 * size) for size in sizes]
    halves = [noise.Counter(c.seed, c.steps, c.purpose, c.start // 2) for c in counters]
    words = noise._first_words(*noise._keys(sizes, halves)).split(sizes)
    for own, levels in zip(words, noise.levels(likes, counters), strict=True):
        assert torch.equal(own.view(torch.int16) & (noise.LEVELS - 1), levels.to(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_gains_of_a_dtype_are_the_exact_ones_rounded(dtype):
    options = {"distribution": "lognormal", "minimum": 0.8, "maximum": 1.3}
    assert torch.equal(drawn(999, dtype=dtype, **options), coded(drawn(999, **options), dtype))


def test_shapes_and_small_tensors():
    likes = [torch.empty(3, 5), torch.empty(0, 4), torch.empty(()), torch.empty(2, 3, 4, 4).mT]
    counters = [counter(str(i)) for i in range(4)]
    found = gains.drawn(likes, counters, "uniform", 0.1, 0.5, 2.0)
    assert [x.shape for x in found] == [x.shape for x in likes]
    assert all(x.is_contiguous() for x in found)
    (alone,) = gains.drawn(likes[:1], counters[:1], "uniform", 0.1, 0.5, 2.0)
    assert torch.equal(alone, found[0])


def test_every_level_of_a_byte_survives_reading_and_storing():
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(coded(decoded(codes), torch.uint8), codes)
    assert torch.equal(decoded(codes[[0, 128, 255]]), torch.tensor([0, 1, LARGEST]))


def test_a_gain_is_rounded_to_the_nearest_level():
    gain = torch.linspace(0, 3.9, 10_001, dtype=torch.float64)
    off = (decoded(coded(gain, torch.uint8)) - gain).abs()
    assert (off <= gain.sqrt() / 128 + 1 / 256**2).all()
    assert off[(gain - 1).abs() < 0.2].max() < 0.009
