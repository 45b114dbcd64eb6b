"""How good a setting is: a score of its single edits that is smooth where the papers' score is a step.

The papers' score S is the harmonic mean of efficacy, paraphrase and neighbourhood success (Meng et al. 2022, ROME).
Each of these asks of a probe whether its answer is more probable than another one. Of eight facts, most settings have
the same shares. So a probe counts here with the probability of its answer against the other one,

    p / (p + p'),    p = exp(-nll of the answer per token), p' that of the other answer,

which is near 1 where the papers count 1, and near 0 where they count 0. Where there is no other answer, it is p. An
edit that disables its model, or that is refused, counts as 0 throughout. The smoothing is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from errata.benchmarks.runs import summary
from errata.evaluate.intervals import Interval, bootstrap_of_means
from errata.evaluate.metrics import METRIC_OF_KIND, SCORE_METRICS, harmonic_means
from errata.evaluate.scoring import ProbeScore

Values = Mapping[str, float]
"""{metric: mean over the probes of one fact, from 0 to 1}."""


def fact_values(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the smooth reliability, generalization and locality of a single edit, those that were asked."""
    values: dict[str, list[float]] = {}
    is_lost = record["status"] == "failed" or summary.is_disabling(record)
    for outcome in summary.outcomes(record):
        metric = METRIC_OF_KIND.get(outcome.probe.kind)
        value = _smooth(outcome.score)
        if metric in SCORE_METRICS and value is not None:
            values.setdefault(metric, []).append(0.0 if is_lost else value)
    return {metric: fmean(values[metric]) for metric in SCORE_METRICS if metric in values}


def _smooth(score: ProbeScore) -> float | None:
    """Return the probability of the answer against the other one; None for a probe that is answered by text alone."""
    if score.nll_target is None:
        return None
    if math.isnan(score.nll_target):
        return 0.0
    if score.nll_other is None:
        return math.exp(-score.nll_target)
    apart = score.nll_target - score.nll_other
    return 0.0 if math.isnan(apart) else 1 / (1 + math.exp(min(apart, 700.0)))


def score_of(facts: Sequence[Values], *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Return the harmonic mean of the metrics' means, with its bootstrap interval over facts."""
    return bootstrap_of_means(_columns(facts), harmonic_means, seed=seed, confidence=confidence)


def gain_of(facts: Sequence[Values], base: Sequence[Values], *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Return how much higher a setting's score is than that of another one on the same facts, with a paired interval.

    Args:
        facts: Of the setting, one entry per fact.
        base: Of the other one, of the same facts in the same order.
        seed, confidence: As of `bootstrap_of_means`.
    """
    mine, other = _columns(facts), _columns(base)

    def apart(means: np.ndarray) -> np.ndarray:
        return harmonic_means(means[..., : len(mine)]) - harmonic_means(means[..., len(mine) :])

    return bootstrap_of_means([*mine, *other], apart, seed=seed, confidence=confidence)


def metric_means(facts: Sequence[Values]) -> dict[str, float]:
    """Return the mean of each metric over the facts that have it."""
    return {
        metric: fmean(values)
        for metric in SCORE_METRICS
        if (values := [fact[metric] for fact in facts if metric in fact])
    }


def _columns(facts: Sequence[Values]) -> list[list[float]]:
    """Return one list per metric that some fact has, NaN for a fact without it."""
    there = [metric for metric in SCORE_METRICS if any(metric in fact for fact in facts)]
    return [[fact.get(metric, math.nan) for fact in facts] for metric in there]
