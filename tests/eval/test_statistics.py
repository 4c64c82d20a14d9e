"""The statistics equal what the field's reference computes, and keep their own laws."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litchi.eval.statistics import bootstrap, holm, mcnemar, paired_bootstrap, swap_test, wilson, wilson_grouped

stats = pytest.importorskip("scipy.stats", reason="the reference is SciPy")

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
hits = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)


@given(counts, st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(pair: tuple[int, int], confidence: float) -> None:
    found = wilson(*pair, confidence)
    expected = stats.binomtest(*pair).proportion_ci(confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_wilson_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 of 0"):
        wilson(0, 0)


@given(hits)
def test_groups_of_one_are_plain_wilson(pairs: list[tuple[int, int]]) -> None:
    right = np.array([a for a, _ in pairs], float)
    found = wilson_grouped(right, np.ones(len(right)))
    plain = wilson(right.sum(), len(right))
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))


@given(st.lists(st.integers(0, 1), min_size=2, max_size=60), st.integers(2, 6))
def test_repeating_items_in_a_group_adds_no_certainty(right: list[int], times: int) -> None:
    once = wilson_grouped(np.array(right, float), np.ones(len(right)))
    many = wilson_grouped(np.array(right, float) * times, np.full(len(right), float(times)))
    assert many.high - many.low >= (once.high - once.low) * 0.999


@given(hits)
def test_mcnemar_equals_the_sign_test(pairs: list[tuple[int, int]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(ours, theirs) == pytest.approx(expected)
    assert mcnemar(theirs, ours) == mcnemar(ours, theirs)


def test_bootstrap_of_a_ratio_equals_scipy() -> None:
    rng = np.random.default_rng(0)
    below = rng.integers(1, 12, 150).astype(float)
    above = rng.binomial(below.astype(int), 0.8).astype(float)

    def share(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.sum(axis=axis) / b.sum(axis=axis)

    expected = stats.bootstrap((above, below), share, paired=True, method="percentile", rng=1, n_resamples=5000)
    found = bootstrap(above, below, resamples=5000)
    assert found.value == pytest.approx(above.sum() / below.sum())
    # Two runs of 5000 resamples; the ends of the interval (about 0.035 wide) wander by about 1/100 of that.
    ends = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=2e-3)


def test_strata_weigh_the_same_whatever_their_size() -> None:
    above, strata = np.array([1.0] * 90 + [0.0] * 10), np.array([0] * 90 + [1] * 10)
    assert bootstrap(above, np.ones(100), strata).value == 0.5


def test_swap_test_agrees_with_scipy() -> None:
    rng = np.random.default_rng(3)
    ours, theirs, ones = rng.normal(0.3, 1, 60), rng.normal(0, 1, 60), np.ones(60)

    def difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.mean(axis=axis) - b.mean(axis=axis)

    expected = stats.permutation_test((ours, theirs), difference, permutation_type="samples", vectorized=True, rng=1)
    # Standard error of a p-value near 0.1 from 9999 swaps: 0.003.
    assert swap_test((ours, ones), (theirs, ones)) == pytest.approx(expected.pvalue, abs=0.012)


def test_a_score_does_not_differ_from_itself() -> None:
    values, ones = np.array([0.2, 0.9, 0.4]), np.ones(3)
    assert swap_test((values, ones), (values, ones)) == 1.0
    found = paired_bootstrap((values, ones), (values, ones))
    assert (found.low, found.value, found.high) == (0, 0, 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=60)
def test_holm_is_bonferroni_closed_under_intersection(p_values: list[float]) -> None:
    """Marcus, Peritz and Gabriel (1976): reject what every subset that holds it rejects."""
    many = range(len(p_values))
    subsets = [set(c) for size in range(1, len(p_values) + 1) for c in combinations(many, size)]
    for i, found in enumerate(holm(p_values)):
        worst = max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in subsets if i in s)
        assert found == pytest.approx(worst)


def test_the_paired_interval_equals_scipy_on_differences() -> None:
    rng = np.random.default_rng(4)
    ours, theirs, ones = rng.normal(0.6, 0.2, 120), rng.normal(0.5, 0.2, 120), np.ones(120)
    found = paired_bootstrap((ours, ones), (theirs, ones), resamples=5000)
    expected = stats.bootstrap((ours - theirs,), np.mean, method="percentile", rng=1, n_resamples=5000)
    ends = expected.confidence_interval
    # The interval is about 0.1 wide; its ends wander by about 1/50 of that between runs of 5000 resamples.
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high), abs=4e-3)
