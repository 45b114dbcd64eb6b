"""Memorization and priming of a run, from its records: what results.json holds as `priming`.

A refused edit counts as the untouched model: its ratios are exactly 1. An edit after which a probability is NaN or 0
has no finite logarithm. Means and intervals leave it out, and `not_finite` counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from errata.benchmarks.runs import summary
from errata.evaluate import priming
from errata.evaluate.intervals import bootstrap
from errata.evaluate.priming import Priming, Ratios
from errata.evaluate.rank_correlation import spearman

Record = Mapping[str, Any]


def of_record(record: Record) -> Priming | None:
    """Return memorization and priming of a record's edit; None where the run did not measure them."""
    asked = [each for each in summary.outcomes(record) if each.probe.kind in priming.KINDS]
    if not asked:
        return None
    before = [None if each.before is None else each.before.nll_target for each in asked]
    return priming.of_losses([e.probe for e in asked], before, [e.score.nll_target for e in asked])


def values(record: Record) -> dict[str, float]:
    """Return log10 of S_mem and of S_prime of a record, infinite where it is not finite; nothing where not measured."""
    found = of_record(record)
    if found is None:
        return {}
    parts = {priming.MEMORIZATION: found.memorization, priming.PRIMING: found.priming}
    return {
        name: ratios.log10_s if math.isfinite(ratios.log10_s) else math.inf
        for name, ratios in parts.items()
        if ratios is not None
    }


def summarise(records: Sequence[Record], *, confidence: float, seed: int) -> dict[str, Any]:
    """Return the table of a run; nothing of runs that did not measure it.

    Entries are `memorization`, `priming` and the places of the prompts, each with `prompts`, `median_s` (the median
    over facts of S), and {mean, low, high, n} over facts of `log10_s`, `mean_log10`, `median_log10` and `delta_p`;
    `selectivity`, log10 S_mem - log10 S_prime; and `rarity`, Spearman's correlation of P_before at the edited prompt
    with S_prime.
    """
    found = [one for record in records if (one := of_record(record)) is not None]
    if not found:
        return {}
    parts: dict[str, list[Ratios]] = {priming.MEMORIZATION: [one.memorization for one in found]}
    parts[priming.PRIMING] = [one.priming for one in found if one.priming is not None]
    for place in priming.PLACES:
        parts[place] = [one.by_place[place] for one in found if place in one.by_place]
    interval = _Interval(confidence, seed)
    pairs = [(one.memorization.before[0], one.priming.log10_s) for one in found if one.priming is not None]
    known = [pair for pair in pairs if all(map(math.isfinite, pair))]
    rarity = spearman(*zip(*known, strict=True), confidence=confidence, seed=seed) if len(known) > 2 else None
    apart = [one.selectivity for one in found if one.selectivity is not None]
    return {
        **{name: _table(each, interval) for name, each in parts.items() if each},
        "selectivity": interval(apart),
        "rarity": None if rarity is None else rarity.as_dict(),
    }


class _Interval:
    """Means over facts with their bootstrap intervals; facts without a finite value are left out."""

    def __init__(self, confidence: float, seed: int) -> None:
        self.confidence, self.seed = confidence, seed

    def __call__(self, found: Sequence[float]) -> dict[str, Any] | None:
        finite = [value for value in found if math.isfinite(value)]
        return bootstrap(finite, seed=self.seed, confidence=self.confidence).as_dict() if finite else None


_STATISTICS: Mapping[str, Callable[[Ratios], float]] = {
    "log10_s": lambda one: one.log10_s,
    "mean_log10": lambda one: one.mean_log10,
    "median_log10": lambda one: one.median_log10,
    "delta_p": lambda one: one.delta_p,
}


def _table(each: Sequence[Ratios], interval: _Interval) -> dict[str, Any]:
    return {
        "prompts": sum(len(one.before) for one in each),
        "not_finite": sum(not one.is_finite for one in each),
        "median_s": median([one.s if one.is_finite else math.inf for one in each]),
        **{name: interval([statistic(one) for one in each]) for name, statistic in _STATISTICS.items()},
    }
