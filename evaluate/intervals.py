"""Confidence intervals: of a mean over cases, of a number computed from several means, and of a mean over few draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

# Resampled values held at a time: 16 MB, for any number of cases.
_VALUES_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A mean over `n` cases with the ends of its confidence interval."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def bootstrap(values: Sequence[float], *, seed: int = 0, confidence: float = 0.95, resamples: int = 1_000) -> Interval:
    """Return the mean of `values` with its percentile bootstrap interval.

    Cases are drawn with replacement, `resamples` times. The interval holds the middle `confidence` of their means.

    Args:
        values: One number per case.
        seed: Seed of the draws. Metrics over the same cases, in the same order, use the same draws.
        confidence: Share of the resampled means inside the interval, between 0 and 1.
        resamples: Number of draws.

    Returns:
        The Interval. If all values are equal, both ends are the mean. If a value is not finite, the ends are NaN.

    Raises:
        ValueError: there are no values.

    Reference: Efron and Tibshirani 1993, section 13.3.
    """
    data = np.asarray(values, dtype=np.float64)
    n = data.size
    if n == 0:
        raise ValueError("expected at least one value to average, got none")
    mean = float(data.mean())
    if not np.isfinite(data).all():
        return Interval(mean, math.nan, math.nan, n)
    if (data == data[0]).all():
        return Interval(float(data[0]), float(data[0]), float(data[0]), n)
    means = _resampled_means(data, resamples, np.random.default_rng(seed))
    low, high = np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])
    return Interval(mean, float(low), float(high), n)


def student(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the mean of a few values with Student's interval, which assumes that they are normal.

    Of five values or fewer a bootstrap draws the same ones again, and its intervals are too narrow.

    Args:
        values: Draws that do not depend on each other.
        confidence: As in `bootstrap`.

    Returns:
        The Interval. Of one value, and where a value is not finite, both ends are NaN.

    Raises:
        ValueError: there are no values.
    """
    from scipy.special import stdtrit

    data = np.asarray(values, dtype=np.float64)
    n = data.size
    if n == 0:
        raise ValueError("expected at least one value to average, got none")
    mean = float(data.mean())
    if n == 1 or not np.isfinite(data).all():
        return Interval(mean, math.nan, math.nan, n)
    half = float(stdtrit(n - 1, (1 + confidence) / 2) * data.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def bootstrap_of_means(
    columns: Sequence[Sequence[float]],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 1_000,
) -> Interval:
    """Return a number computed from several means over the same cases, with its percentile bootstrap interval.

    Args:
        columns: k lists of n values, NaN where a case has none. A case is drawn with all of its values.
        statistic: Maps means (..., k) to numbers (...).
        seed, confidence, resamples: As in `bootstrap`.

    Raises:
        ValueError: there are no cases, or a column holds only NaN.
    """
    data = np.asarray(columns, dtype=np.float64).T  # (n, k)
    present = ~np.isnan(data)
    if data.size == 0 or not present.any(axis=0).all():
        raise ValueError("expected at least one value in every column, got a column without any")
    n, k = data.shape
    rng = np.random.default_rng(seed)
    step = max(1, _VALUES_AT_ONCE // (n * k))
    sizes = [min(step, resamples - done) for done in range(0, resamples, step)]
    means = np.concatenate([_means(data, present, rng.integers(0, n, (size, n))) for size in sizes])
    drawn = statistic(means[~np.isnan(means).any(axis=1)])  # a draw may miss a sparse column
    low, high = np.percentile(drawn, [50 * (1 - confidence), 50 * (1 + confidence)])
    value = float(statistic(_means(data, present, np.arange(n)[None]))[0])
    return Interval(value, float(low), float(high), n)


def _means(data: np.ndarray, present: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return the means over the drawn cases that have a value, (draws, k); NaN if none has."""
    counts = present[drawn].sum(axis=1)
    sums = np.where(present, data, 0.0)[drawn].sum(axis=1)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _resampled_means(data: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    # As scipy.stats.bootstrap(method="percentile"), without the second that its import takes.
    step = max(1, _VALUES_AT_ONCE // data.size)
    sizes = [min(step, resamples - done) for done in range(0, resamples, step)]
    return np.concatenate([data[rng.integers(0, data.size, (size, data.size))].mean(axis=1) for size in sizes])
