"""Bootstrap confidence intervals of a mean over cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

# Resampled values held at a time: 16 MB, whatever the number of cases.
_VALUES_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A mean over `n` cases, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def bootstrap(values: Sequence[float], *, seed: int = 0, confidence: float = 0.95, resamples: int = 1_000) -> Interval:
    """The mean of `values` with its percentile bootstrap interval.

    Cases are drawn with replacement, `resamples` times; the interval holds the middle `confidence` of their means.

    Args:
        values: One number a case.
        seed: Of the drawing; values in the same order get the same draws, so metrics of one run are drawn alike.
        confidence: Between 0 and 1.
        resamples: How many.

    Returns:
        The Interval. One value, or values that are all alike, have nothing to resample: both ends are the mean. Where
        a value is not finite, so are the ends (NaN).

    Raises:
        ValueError: no values.

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


def _resampled_means(data: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    # The method of scipy.stats.bootstrap(method="percentile"), without the second that importing it takes.
    step = max(1, _VALUES_AT_ONCE // data.size)
    sizes = [min(step, resamples - done) for done in range(0, resamples, step)]
    return np.concatenate([data[rng.integers(0, data.size, (size, data.size))].mean(axis=1) for size in sizes])
