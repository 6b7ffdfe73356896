"""Noise: normal numbers that follow from a counter, whatever was drawn before."""

import math

import pytest
import torch

from biofx import noise

COUNT = 1 << 18


def tables(count, seed, step, site, start=0):
    return noise.from_tables(count, seed, step, "test", site, start=start)


def words(count, seed, step, site, start=0):
    return noise.from_words(count, torch.tensor(seed), torch.tensor(step), noise.words_of("test", site), start=start)


SOURCES = pytest.mark.parametrize("draw", [tables, words])


@SOURCES
def test_moments_and_tails(draw):
    z = torch.cat([draw(COUNT, 0, step, "a") for step in range(4)]).double()
    n = len(z)
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(z.pow(3).mean()) < 4 * math.sqrt(15 / n)
    assert abs(z.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    for quantile in (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0):
        expected = 0.5 * (1 + math.erf(quantile / math.sqrt(2)))
        given = (z < quantile).double().mean()
        assert abs(given - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert torch.isfinite(z).all()


@SOURCES
@pytest.mark.parametrize("lag", [1, 2, 3, 16, 64, 784, 1000, 4096, 65536])
def test_entries_are_independent(draw, lag):
    z = draw(COUNT, 0, 7, "a").double()
    assert abs((z[lag:] * z[:-lag]).mean()) < 4.5 / math.sqrt(COUNT - lag)


@SOURCES
def test_steps_sites_and_seeds_are_independent(draw):
    counters = [(0, step, "a") for step in range(12)] + [(0, 0, f"{i}.weight") for i in range(12)]
    counters += [(seed, 0, "a") for seed in range(1, 12)]
    z = torch.stack([draw(1 << 14, *counter) for counter in counters]).double()
    between = (z @ z.T / z.shape[1] - torch.eye(len(z))).triu(1)
    assert between.abs().max() < 5.5 / math.sqrt(z.shape[1])
    assert between.std() < 2 / math.sqrt(z.shape[1])


@SOURCES
@pytest.mark.parametrize("cut", [0, 1, 1000, noise.BLOCK - 5, noise.BLOCK, noise.BLOCK + 7])
def test_a_part_has_the_numbers_that_it_has_in_the_whole(draw, cut):
    whole = draw(noise.BLOCK + 100, 3, 5, "a")
    assert torch.equal(draw(64, 3, 5, "a", start=cut), whole[cut : cut + 64])
    assert torch.equal(draw(cut, 3, 5, "a"), whole[:cut])


def test_large_counters():
    z = words(1000, 2**40 + 1, 2**40 + 3, "a")
    assert torch.isfinite(z).all()
    assert z.std() > 0.9


def test_it_has_the_shape_and_dtype_asked_for():
    like = torch.empty(3, 5, dtype=torch.float64)
    z = noise.normal(like, torch.tensor(1), torch.tensor(2), "pass", "site")
    assert (z.shape, z.dtype) == (like.shape, like.dtype)
    assert torch.equal(z, noise.normal(like, torch.tensor(1), torch.tensor(2), "pass", "site"))


def test_words_are_the_same_when_compiled():
    arguments = 1000, torch.tensor(1), torch.tensor(2), noise.words_of("a")
    compiled = torch.compile(noise.from_words, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), noise.from_words(*arguments), rtol=1e-5, atol=1e-5)
