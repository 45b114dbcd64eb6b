"""Spearman's rank correlation with a bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from errata.evaluate.intervals import Interval


def spearman(
    a: Sequence[float], b: Sequence[float], *, seed: int = 0, confidence: float = 0.95, resamples: int = 1_000
) -> Interval:
    """Return the correlation of the ranks of two lists, with its percentile bootstrap interval over pairs.

    Equal values share the mean of their ranks. The correlation is NaN where all values of a list are equal. Such draws
    are left out of the interval.

    Args:
        a, b: One value per case, in the same order.
        seed, confidence, resamples: As of `bootstrap`.

    Raises:
        ValueError: The lists differ in length, have fewer than two values, or one that is not finite.

    Source: Spearman 1904; ties as in Kendall and Gibbons 1990, section 3.
    """
    pairs = np.asarray([a, b], dtype=np.float64) if len(a) == len(b) else np.empty((2, 0))
    n = pairs.shape[1]
    if n < 2 or not np.isfinite(pairs).all():
        raise ValueError(
            f"expected two lists of the same length, at least two finite values, got {len(a)} and {len(b)}"
        )
    rng = np.random.default_rng(seed)
    drawn = [_correlation(pairs[:, rng.integers(0, n, n)]) for _ in range(resamples)]
    known = [value for value in drawn if not math.isnan(value)]
    ends = np.percentile(known, [50 * (1 - confidence), 50 * (1 + confidence)]) if known else (math.nan, math.nan)
    return Interval(_correlation(pairs), float(ends[0]), float(ends[1]), n)


def _correlation(pairs: np.ndarray) -> float:
    """Return the correlation of the ranks of both rows, (2, n)."""
    one, other = (_ranks(row) - (pairs.shape[1] + 1) / 2 for row in pairs)
    size = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / size if size else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value from 1 to n; equal values have the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]
