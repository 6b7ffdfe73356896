"""Noise: random numbers that follow from a counter, whatever was drawn before."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from biofx.base import noise
from biofx.base.noise import Counter, Rows
from biofx.base.shards import Cut, Shard

COUNT = 1 << 18


def counter(seed, step, site, start=0):
    return Counter(torch.tensor(seed), torch.tensor(step), ("test", site), start)


def tables(count, seed, step, site, start=0):
    return noise.normal([torch.empty(count)], [counter(seed, step, site, start)])[0]


def words(count, seed, step, site, start=0):
    return noise.normal_from_words([torch.empty(count)], [counter(seed, step, site, start)])


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


UNIFORM = pytest.mark.parametrize(
    "draw",
    [
        lambda like, counter: noise.uniform([like], [counter])[0],
        lambda like, counter: noise.uniform_from_words([like], [counter]),
    ],
    ids=["tables", "words"],
)


@UNIFORM
def test_uniform_numbers(draw):
    u = torch.cat([draw(torch.empty(COUNT), counter(0, step, "a")) for step in range(4)]).double()
    n = len(u)
    assert 0 <= u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * math.sqrt(2 * 63)
    for lag in (1, 2, 64, 1000):
        assert abs(((u - 0.5)[lag:] * (u - 0.5)[:-lag]).mean() * 12) < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("draw", [noise.normal, noise.uniform])
def test_many_tensors_have_the_numbers_of_each(draw):
    likes = [torch.empty(7, 9), torch.empty(20), torch.empty(0), torch.empty(3, 1, 2).double()]
    counters = [counter(0, 5, name, start) for start, name in enumerate("abcd")]
    together = draw(likes, counters)
    for like, own, drawn in zip(likes, counters, together, strict=True):
        assert (drawn.shape, drawn.dtype) == (like.shape, like.dtype)
        assert torch.equal(draw([like], [own])[0], drawn)


@pytest.mark.parametrize("draw", [noise.normal_from_words, noise.uniform_from_words])
def test_many_tensors_have_the_words_of_each(draw):
    likes = [torch.empty(7, 9), torch.empty(20), torch.empty(3, 1, 2)]
    counters = [counter(seed, 5, name, 3 * seed) for seed, name in enumerate("abc")]
    alone = [draw([like], [own]) for like, own in zip(likes, counters, strict=True)]
    assert torch.equal(draw(likes, counters), torch.cat(alone))


def test_large_counters():
    z = words(1000, 2**40 + 1, 2**40 + 3, "a")
    assert torch.isfinite(z).all()
    assert z.std() > 0.9


def test_words_are_the_same_when_compiled():
    arguments = [torch.empty(1000), torch.empty(300)], [counter(1, 2, "a"), counter(1, 2, "b", 5)]
    compiled, plain = (noise.normal_from_words(*arguments, compiled=c) for c in (True, False))
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


PAIRS = pytest.mark.parametrize(
    "draw",
    [
        lambda like, counter: [x[0] for x in noise.pairs([like], [counter])],
        lambda like, counter: noise.pairs_from_words([like], [counter]),
    ],
    ids=["tables", "words"],
)


@PAIRS
def test_pairs_are_normal_and_independent(draw):
    a, b = draw(torch.empty(COUNT), counter(0, 3, "a"))
    for x in (a, b):
        assert stats.kstest((x[::8] * 2**0.5).numpy(), stats.norm.cdf).pvalue > 1e-3
    assert abs((a * b).mean()) < 4.5 * 0.5 / math.sqrt(COUNT)
    assert abs((a.square() * b.square()).mean() - 0.25) < 4.5 * 0.75 / math.sqrt(COUNT)


@PAIRS
def test_sums_of_squares_are_exponential_and_ignore_signs(draw):
    a, b = draw(torch.empty(COUNT), counter(0, 4, "a"))
    for sign in (-1, 1):
        chosen = b.sign() == sign
        sums = (a.square() + b.square())[chosen]
        assert stats.kstest(sums[::4].numpy(), stats.expon.cdf).pvalue > 1e-3
        for tail in (4.0, 6.0, 8.0):
            expected = math.exp(-tail)
            error = 4.5 * math.sqrt(expected / len(sums))
            assert abs((sums > tail).double().mean() - expected) < error


@PAIRS
@pytest.mark.parametrize("cut", [0, 1000, noise.BLOCK - 5, noise.BLOCK + 7])
def test_a_part_has_the_pairs_that_it_has_in_the_whole(draw, cut):
    whole = draw(torch.empty(noise.BLOCK + 100), counter(3, 5, "a"))
    part = draw(torch.empty(8, 8), counter(3, 5, "a", start=cut))
    assert all(torch.equal(x.flatten(), y[cut : cut + 64]) for x, y in zip(part, whole, strict=True))


@pytest.mark.parametrize(("start", "length"), [(0, 3), (3, 4), (6, 1), (7, 0)])
def test_a_shard_has_the_numbers_that_it_has_in_the_whole(start, length):
    """A part along the second axis, whose entries do not lie side by side in the whole, and a part of that."""
    outer, whole, inner = 5, 7, 30011
    own = Rows(start * inner, length * inner, whole * inner)
    kinds = {
        "tables": lambda like, c: noise.normal([like], [c])[0],
        "uniform": lambda like, c: noise.uniform([like], [c])[0],
        "words": lambda like, c: noise.normal_from_words([like], [c]).view(like.shape),
        "levels": lambda like, c: next(noise.levels([like], [c])).view(like.shape),
    }
    for draw in kinds.values():
        expected = draw(torch.empty(outer, whole, inner), counter(3, 5, "a"))[:, start : start + length]
        part, place = torch.empty(outer, length, inner), replace(counter(3, 5, "a"), rows=(own,))
        assert torch.equal(draw(part, place), expected)
        assert torch.equal(draw(part[2:], place.at(2 * length * inner)), expected[2:])


@pytest.mark.parametrize(
    "cuts", [(Cut(1, 2, 3),), (Cut(0, 1, 3), Cut(1, 2, 3)), (Cut(1, 2, 5), Cut(2, 1, 2)), (Cut(0, 2, 2),)]
)
def test_a_block_has_the_numbers_that_it_has_in_the_whole(cuts):
    whole = noise.normal([torch.empty(4, 7, 5)], [counter(3, 5, "a")])[0]
    shard = Shard(whole.shape, cuts)
    part = shard.part(whole)
    assert part.numel() < whole.numel()
    assert torch.equal(noise.normal([torch.empty(part.shape)], [shard.counter(counter(3, 5, "a"))])[0], part)
    assert torch.equal(
        noise.normal_from_words([part], [shard.counter(counter(3, 5, "a"))]).view(part.shape),
        shard.part(noise.normal_from_words([whole], [counter(3, 5, "a")]).view(whole.shape)),
    )
