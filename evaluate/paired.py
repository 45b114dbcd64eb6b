"""Two methods on the same cases: how far apart their means are, and whether that could be chance.

    found = difference(values_of_a, values_of_b)
    found.mean, found.low, found.high       # b - a, with its interval
    found.p, found.test

Both are paired, a case with itself, so that what makes one case harder than another cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from errata.evaluate.intervals import Interval, bootstrap

Test = Literal["mcnemar", "permutation", "signed_rank"]

# With at most this number of differing cases, all 2^m patterns of signs are tried; with more, RESAMPLES random ones.
_EXACT_UP_TO = 13
_RESAMPLES = 10_000
# Signs held at a time: 16 MB, whatever the number of cases.
_VALUES_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Difference:
    """Mean of b - a over `n` cases with its interval, and the p-value of a paired test that there is none.

    Attributes:
        mean, low, high: Over the cases in which both values are finite; NaN where there is none.
        wins: Cases in which b is higher.
        losses: Cases in which a is higher.
        test: "mcnemar" where every value is 0 or 1 (exact), "signed_rank" where one is not finite, "permutation" of
            signs otherwise.
        is_significant: Whether the interval leaves zero out and p is below 1 - confidence. Of a handful of cases that
            differ the bootstrap alone would make too much. Where a value is not finite, p alone: no interval holds it.
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
    """How much higher b is than a.

    The interval is that of a percentile bootstrap over cases. The test's null hypothesis is that a and b could be
    exchanged in every case. Of values 0 and 1 that gives McNemar's exact test: the cases in which just one of the two
    is right are as many one way as the other, up to a fair coin. Of others, the signs of the differences are flipped,
    all ways where few cases differ, else 10,000 random ways. Where a value is infinite there is no mean to compare, but
    there are ranks: the signs of the ranks of the differences are flipped; an infinite one ranks highest.

    Args:
        a, b: One number per case, in the same order; none is NaN.
        seed, confidence, resamples: As in `intervals.bootstrap`.

    Raises:
        ValueError: no values, or not as many of one as of the other.

    References: McNemar 1947 and, exact, Liddell 1983; Good 2005, chapter 3 (signs); Wilcoxon 1945 (ranks); Efron and
    Tibshirani 1993, 13.3.
    """
    if len(a) != len(b):
        raise ValueError(f"expected a value of each for every case, got {len(a)} and {len(b)}")
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
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
    return Difference(interval.mean, interval.low, interval.high, len(a), wins, losses, p, test, is_significant)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided p-value that cases won and lost come from a fair coin; 1 without any."""
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def signed_ranks(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The ranks of the sizes of b - a, with its signs; without the cases in which both are the same, also infinite."""
    from scipy.stats import rankdata

    differ = a != b
    apart = b[differ] - a[differ]
    return np.sign(apart) * rankdata(np.abs(apart))


def sign_flip_p_value(differences: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p-value that the differences' mean is zero: the share of flips whose mean is as far from it.

    Random flips count the one that was seen among them, so that p is never 0 (Phipson and Smyth 2010).
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
    """p-values for looking at all of them at once (Holm 1979): the smallest times their number, and so on."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, highest = [0.0] * len(ps), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, ps[i] * (len(ps) - place)))
        adjusted[i] = highest
    return adjusted
