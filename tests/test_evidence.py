"""The statistics of the experiments, against numbers worked out by hand and against scipy."""

import math

import numpy
import pytest
from scipy import stats

import evidence


def test_holm_against_numbers_by_hand():
    # Sorted: 0.005 × 4, 0.01 × 3, 0.03 × 2, 0.04 × 1, none smaller than the one before
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert evidence.holm(p_values) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})


def test_holm_never_exceeds_one():
    assert evidence.holm({"a": 0.5, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_holm_keeps_the_order_of_the_names():
    assert list(evidence.holm({"b": 0.2, "a": 0.1})) == ["b", "a"]


def test_holm_leaves_a_single_test_alone():
    assert evidence.holm({"a": 0.02}) == {"a": 0.02}


@pytest.fixture
def scores():
    generator = numpy.random.default_rng(0)
    plain = generator.normal(90, 2, 12)
    return {"plain": plain, "better": plain + generator.normal(1, 1, 12), "other": generator.normal(90, 2, 12)}


def test_compare_is_a_paired_t_test(scores):
    result = evidence.compare(scores, "plain")
    assert list(result) == ["better", "other"]
    for name, comparison in result.items():
        expected = stats.ttest_rel(scores[name], scores["plain"])
        interval = expected.confidence_interval(0.95)
        assert comparison.p == pytest.approx(expected.pvalue)
        assert comparison.difference.mean == pytest.approx((scores[name] - scores["plain"]).mean())
        assert (comparison.difference.low, comparison.difference.high) == pytest.approx(tuple(interval))


def test_compare_corrects_all_conditions_together(scores):
    result = evidence.compare(scores, "plain")
    expected = evidence.holm({name: comparison.p for name, comparison in result.items()})
    assert {name: comparison.corrected for name, comparison in result.items()} == expected


@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (0.5, 0.0)])
def test_differences_that_are_all_the_same(shift, p):
    comparison = evidence.compare({"plain": [1.0, 2.0, 4.0], "shifted": [1 + shift, 2 + shift, 4 + shift]}, "plain")
    assert comparison["shifted"].p == p


def test_estimate_against_numbers_by_hand():
    # The standard error is 1/√3, and Student's quantile for two degrees of freedom 4.3027
    estimate = evidence.Estimate.of([1, 2, 3])
    assert estimate.mean == 2
    assert estimate.high - 2 == pytest.approx(2 - estimate.low) == pytest.approx(4.302653 / math.sqrt(3))


def test_an_interval_holds_the_mean_in_95_of_100():
    generator = numpy.random.default_rng(0)
    estimates = [evidence.Estimate.of(generator.normal(3, 2, 5)) for _ in range(1000)]
    assert numpy.mean([e.low < 3 < e.high for e in estimates]) == pytest.approx(0.95, abs=0.02)


def test_estimate_as_text():
    assert evidence.Estimate(97.123, 96.8, 97.45).text("{:.1f}") == "97.1 ± 0.3"


def test_signed_ranks_against_numbers_by_hand():
    # All six have one sign, which 2 of 2⁶ assignments of signs have
    assert evidence.signed_rank_p([1, 2, 3, 4, 5, 6]) == pytest.approx(2 / 64)


def test_signed_ranks_see_no_sizes():
    assert evidence.signed_rank_p([-1, 2, 3, 4, 5]) == evidence.signed_rank_p([-1, 2, 3, 4, 5000])


def test_signed_ranks_without_differences():
    assert evidence.signed_rank_p([0, 0, 0]) == 1
