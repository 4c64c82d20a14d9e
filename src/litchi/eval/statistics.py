"""How sure a score is, and whether two scores differ: intervals, paired tests, and the correction for many tests.

Legend: G groups (items that share a picture or a rollout stand or fall together), R resamples, S strata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 2000
"""Enough that the ends of a 95 % interval move by less than a tenth of its width between seeds."""

SWAPS = 10_000
"""Random swaps of a permutation test; the smallest p-value it can report is about 1e-4."""


Sums = tuple[Float[np.ndarray, "G"], Float[np.ndarray, "G"]]
"""What each group adds above and below the line of a ratio."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with the ends of its confidence interval and the name of the method that gave them."""

    value: float
    low: float
    high: float
    method: str


def wilson(hits: float, trials: float, confidence: float = 0.95) -> Interval:
    """The score interval of a proportion; it stays inside [0, 1] and is honest at 0 and at 1.

    `trials` may be an effective number, not whole. Raises ValueError for no trials.
    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if trials <= 0 or not 0 <= hits <= trials:
        raise ValueError(f"wilson needs 0 <= hits <= trials and trials > 0, not {hits} of {trials}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = hits / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * sqrt(share * (1 - share) / trials + spread / (4 * trials))
    low = 0.0 if hits == 0 else max(0.0, middle - half)
    high = 1.0 if hits == trials else min(1.0, middle + half)
    return Interval(share, low, high, "Wilson")


def wilson_grouped(hits: Float[np.ndarray, "G"], trials: Float[np.ndarray, "G"], confidence: float = 0.95) -> Interval:
    """Wilson's interval at the effective number of trials, when trials come in groups that share what makes them hard.

    The design effect is the variance of a ratio of group sums over that of independent trials, held between 1 and the
    mean group size; where every trial came out alike it cannot be measured and the mean group size is taken.
    Source: C. Franco et al., "Comparative study of confidence intervals for proportions in complex sample surveys",
    Journal of Survey Statistics and Methodology 7 (2019); W. G. Cochran, "Sampling Techniques" (1977), section 11.8.
    """
    groups, total = len(trials), float(trials.sum())
    share, largest = float(hits.sum()) / total, max(1.0, total / groups)
    plain = share * (1 - share) / total
    effect = largest
    if plain > 0 and groups > 1:
        residual = hits - share * trials
        effect = min(max(float((residual**2).sum()) * groups / (groups - 1) / total**2 / plain, 1.0), largest)
    effective = total / effect
    found = wilson(share * effective, effective, confidence)
    return Interval(share, found.low, found.high, "Wilson" if effect == 1 else "Wilson, grouped")


def bootstrap(
    above: Float[np.ndarray, "G"],
    below: Float[np.ndarray, "G"],
    strata: Int[np.ndarray, "G"] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The percentile interval of sum(above) / sum(below), groups drawn with replacement, averaged over strata.

    A mean is `below` = 1; micro-F1 is `above` = 2 x overlap, `below` = said + true. Each stratum is resampled apart.
    Source: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3; strata: section 8.4.
    """
    strata = np.zeros(len(above), int) if strata is None else strata
    rng = np.random.default_rng(seed)
    values, draws = [], []
    for stratum in np.unique(strata):
        a, b = above[strata == stratum], below[strata == stratum]
        counts = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=resamples)
        values.append(ratio(a.sum(), b.sum()))
        draws.append(ratio(counts @ a, counts @ b))
    ends = np.quantile(np.mean(draws, axis=0), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(np.mean(values)), float(ends[0]), float(ends[1]), "bootstrap")


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The exact two-sided p-value that two sets of hits on the same items have the same rate; only disagreements count.

    Source: Q. McNemar, Psychometrika 12 (1947); the exact form is a sign test on the discordant pairs.
    """
    wins = sum(a > b for a, b in zip(ours, theirs, strict=True))
    losses = sum(a < b for a, b in zip(ours, theirs, strict=True))
    tail = sum(comb(wins + losses, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** (wins + losses))


def swap_test(
    ours: Sums,
    theirs: Sums,
    strata: Int[np.ndarray, "G"] | None = None,
    swaps: int = SWAPS,
    seed: int = 0,
) -> float:
    """The two-sided p-value that the labels "ours" and "theirs" are exchangeable within each group.

    The observed labelling counts as one swap, so that p is never 0.
    Source: approximate randomisation; E. W. Noreen, "Computer-intensive Methods for Testing Hypotheses" (1989).
    """
    strata = np.zeros(len(ours[0]), int) if strata is None else strata
    rng = np.random.default_rng(seed)
    observed, drawn = 0.0, np.zeros(swaps)
    for stratum in np.unique(strata):
        (a1, b1), (a2, b2) = ((side[0][strata == stratum], side[1][strata == stratum]) for side in (ours, theirs))
        observed += float(ratio(a1.sum(), b1.sum()) - ratio(a2.sum(), b2.sum()))
        flip = rng.integers(0, 2, (swaps, len(a1)))
        up, down = flip @ (a2 - a1), flip @ (b2 - b1)
        drawn += ratio(a1.sum() + up, b1.sum() + down) - ratio(a2.sum() - up, b2.sum() - down)
    return float((1 + np.sum(np.abs(drawn) >= abs(observed) - 1e-12)) / (1 + swaps))


def paired_bootstrap(
    ours: Sums, theirs: Sums, strata: Int[np.ndarray, "G"] | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The 95 % percentile interval of the difference ours - theirs; each resample draws the same groups for both.

    Source: Efron and Tibshirani, as in `bootstrap`; P. Koehn, "Statistical significance tests for machine translation
    evaluation", EMNLP 2004.
    """
    strata = np.zeros(len(ours[0]), int) if strata is None else strata
    rng = np.random.default_rng(seed)
    values, draws = [], []
    for stratum in np.unique(strata):
        (a1, b1), (a2, b2) = ((side[0][strata == stratum], side[1][strata == stratum]) for side in (ours, theirs))
        counts = rng.multinomial(len(a1), np.full(len(a1), 1 / len(a1)), size=resamples)
        values.append(ratio(a1.sum(), b1.sum()) - ratio(a2.sum(), b2.sum()))
        draws.append(ratio(counts @ a1, counts @ b1) - ratio(counts @ a2, counts @ b2))
    low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
    return Interval(float(np.mean(values)), float(low), float(high), "paired bootstrap")


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: call proven what stays below the level, whatever the dependence.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6 (1979).
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def ratio(above, below):
    """above / below, and 0 where there was nothing to get right."""
    return np.divide(above, below, out=np.zeros(np.shape(above)), where=np.asarray(below) != 0)
