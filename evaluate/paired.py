"""Compare two methods on the same cases: the difference of their means, its interval, and a paired significance test.

    result = difference(values_of_a, values_of_b)
    result.mean, result.low, result.high    # b - a, with its interval
    result.p, result.test

Interval and test are paired: each case is compared with itself, so that easy and hard cases cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from errata.evaluate.intervals import Interval, bootstrap

Test = Literal["mcnemar", "permutation", "signed_rank"]

# If m cases differ and m is at most this, all 2^m patterns of signs are tried; else _RESAMPLES random patterns.
_EXACT_UP_TO = 13
_RESAMPLES = 10_000
# Signs held at a time: 16 MB, for any number of cases.
_VALUES_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Difference:
    """The mean of b - a over `n` cases with its interval, and the p-value of a paired test for no difference.

    Attributes:
        mean, low, high: Over the cases in which both values are finite; NaN if there are none.
        n: Number of cases in which both have a value.
        wins: Cases in which b is higher.
        losses: Cases in which a is higher.
        p: Two-sided p-value.
        test: "mcnemar" (exact) if every value is 0 or 1, "signed_rank" if a value is not finite, else "permutation" of
            signs.
        is_significant: Whether the interval excludes zero and p is below 1 - confidence. The bootstrap alone would
            overrate a handful of cases that differ. If a value is not finite, p alone decides: no interval holds it.
    """

    mean: float
    low: float
    high: float
    n: int
    wins: int
    losses: int
    p: float
    test: Test
    is_significant: bool


def difference(
    a: Sequence[float], b: Sequence[float], *, seed: int = 0, confidence: float = 0.95, resamples: int = 1_000
) -> Difference:
    """Return how much higher b is than a.

    The interval is a percentile bootstrap over cases. The null hypothesis of the test is that a and b could be swapped
    in every case. For values 0 and 1 that is McNemar's exact test: among the cases in which exactly one of the two is
    right, a fair coin decides which. For other values, the signs of the differences are flipped, in all ways if few
    cases differ, else in 10,000 random ways. If a value is infinite there is no mean, but there are ranks: the signs of
    the ranks of the differences are flipped, and an infinite difference has the highest rank.

    Args:
        a, b: One number per case, in the same order. A case in which one of them is None or NaN is left out.
        seed, confidence, resamples: As in `intervals.bootstrap`.

    Returns:
        The Difference. Without any case, mean and interval are NaN, and p is 1.

    Raises:
        ValueError: a and b differ in number.

    References: McNemar 1947 and, exact, Liddell 1983; Good 2005, chapter 3 (signs); Wilcoxon 1945 (ranks); Efron and
    Tibshirani 1993, 13.3.
    """
    if len(a) != len(b):
        raise ValueError(f"expected one value of a and one of b per case, got {len(a)} and {len(b)}")
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    known = ~(np.isnan(first) | np.isnan(second))
    first, second = first[known], second[known]
    finite = np.isfinite(first) & np.isfinite(second)
    apart = second[finite] - first[finite]
    options = {"seed": seed, "confidence": confidence, "resamples": resamples}
    interval = bootstrap(apart.tolist(), **options) if apart.size else Interval(math.nan, math.nan, math.nan, 0)
    wins, losses = int((second > first).sum()), int((second < first).sum())
    is_significant = interval.low > 0 or interval.high < 0
    if first.size and not finite.all():
        test, p, is_significant = "signed_rank", sign_flip_p_value(signed_ranks(first, second), seed=seed), True
    elif np.isin(np.concatenate([first, second]), (0.0, 1.0)).all():
        test, p = "mcnemar", mcnemar(wins, losses)
    else:
        test, p = "permutation", sign_flip_p_value(apart, seed=seed)
    is_significant = is_significant and p < 1 - confidence
    return Difference(interval.mean, interval.low, interval.high, first.size, wins, losses, p, test, is_significant)


def mcnemar(wins: int, losses: int) -> float:
    """Return the two-sided p-value for wins and losses from a fair coin (McNemar's exact test); 1 without any."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def signed_ranks(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the ranks of |b - a| with the signs of b - a, without the cases with equal values (also infinite ones)."""
    from scipy.stats import rankdata

    differ = a != b
    apart = b[differ] - a[differ]
    return np.sign(apart) * rankdata(np.abs(apart))


def sign_flip_p_value(differences: np.ndarray, *, seed: int = 0) -> float:
    """Return the two-sided p-value for a mean difference of zero: the share of sign flips with a mean as far from it.

    Random flips include the observed signs, so that p is never 0 (Phipson and Smyth 2010).
    """
    some = differences[differences != 0]  # flipping a zero changes nothing
    if some.size == 0:
        return 1.0
    least = abs(some.sum()) * (1 - 1e-9)  # sums in another order differ in their last digits
    if some.size <= _EXACT_UP_TO:
        patterns = (np.arange(2**some.size)[:, None] >> np.arange(some.size)) & 1
        return float((np.abs((2 * patterns - 1) @ some) >= least).mean())
    rng = np.random.default_rng(seed)
    step = max(1, _VALUES_AT_ONCE // some.size)
    sizes = [min(step, _RESAMPLES - done) for done in range(0, _RESAMPLES, step)]
    sums = np.concatenate([(2 * rng.integers(0, 2, (size, some.size)) - 1) @ some for size in sizes])
    return float((1 + (np.abs(sums) >= least).sum()) / (1 + _RESAMPLES))


def holm_adjusted(ps: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests (Holm 1979): the smallest of m times m, the next times m - 1, ..."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, ps[i] * (len(ps) - rank)))
        adjusted[i] = highest
    return adjusted
