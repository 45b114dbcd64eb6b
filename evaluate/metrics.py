"""Turn scores into metrics: per probe, per case, and over cases with intervals. Pure functions; no model runs here.

A probe asks for what the edited model should answer (probes.py), so one rule serves all kinds. There are four
scorings in every run:

- probability: is the target strictly more probable than its competitor, by mean log-probability per token? The papers
  call this efficacy, paraphrase and neighborhood success. It needs both answers.
- teacher_forced: the share of the target's tokens that are the most probable ones after the prompt and the tokens
  before them. zsRE and EasyEdit report this as accuracy; it is not an exact match.
- generation: does the greedy continuation begin with the target?
- generation_containment: does it contain the target anywhere?

Where a run asks for them, there are further ones (docs/results.md): wild, wild_f1, wild_judged, bleu and rouge_l.

An answer may have several spellings. The first two score the target's own spelling alone, as KnowEdit's authors do; a
free answer holds if it gives any of them (outcomes.py).

metric_table.py declares every metric: its name, the kinds of probes that it averages, and its value for one probe.

Averages are taken over tokens, then over a case's probes of one kind, then over cases, with equal weights each time.
Probes of one test count as one: with the rule "any" its value is the best of them, with "all" the worst. A test with
conditions counts under a scoring only where the untouched model answers all conditions under it. Probes of a named
group are also averaged by themselves: the metric "portability/Reasoning" beside "portability".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np

from errata.editors.core.errors import ConfigError
from errata.evaluate.intervals import Interval, bootstrap, bootstrap_of_means
from errata.evaluate.metric_table import ADDED, LOWER, METRIC_OF_KIND, METRICS, SCORE, Metric, declared
from errata.evaluate.outcomes import (
    Outcome,
    prefers_target,
    success_by_scoring,
    token_accuracy,
    unchanged_by_scoring,
)
from errata.evaluate.probes import Case
from errata.evaluate.scoring import ProbeScore

__all__ = (
    "ADDED",
    "LOWER",
    "METRICS",
    "METRIC_OF_KIND",
    "SCORE",
    "SCORE_METRICS",
    "SCORINGS",
    "Metric",
    "Outcome",
    "Summary",
    "Values",
    "case_values",
    "declared",
    "harmonic_mean",
    "harmonic_means",
    "outcomes",
    "papers_score",
    "prefers_target",
    "score_columns",
    "success_by_scoring",
    "summarise",
    "token_accuracy",
    "unchanged_by_scoring",
)

SCORINGS = (
    "probability",
    "teacher_forced",
    "generation",
    "generation_containment",
    "wild",
    "wild_judged",
    "wild_f1",
    "bleu",
    "rouge_l",
    "set_f1",
)
Values = dict[str, dict[str, float]]  # scoring -> metric -> value of one case
Summary = dict[str, dict[str, dict[str, float | int]]]  # scoring -> metric -> {mean, low, high, n}


# --- one case -------------------------------------------------------------------------------------------------------


def outcomes(
    case: Case,
    scores: Sequence[ProbeScore],
    *,
    before: Sequence[ProbeScore] | None = None,
    texts: Mapping[str, str] | None = None,
    texts_before: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """Return a case's probes with what was measured on them.

    Args:
        case: The case.
        scores: Scores of the edited model, in the order of the probes.
        before: Scores of the untouched model.
        texts: Continuations of the edited model, by prompt.
        texts_before: Continuations of the untouched model.
    """
    texts, texts_before = texts or {}, texts_before or {}
    earlier = before if before is not None else [None] * len(scores)
    return [
        Outcome(probe, score, then, texts.get(probe.prompt), texts_before.get(probe.prompt))
        for probe, score, then in zip(case.probes, scores, earlier, strict=True)
    ]


def case_values(measured: Iterable[Outcome]) -> Values:
    """Return the means over a case's probes, by scoring and metric. Metrics without a probe or data are absent.

    A metric's probes of a named group also have a mean of their own, under "metric/group".
    """
    found = list(measured)
    everything, done = declared(), set()
    collected: dict[str, dict[str, list[float]]] = {}
    for outcome in found:
        for metric in everything:
            if outcome.probe.kind not in metric.kinds or (metric.name, outcome.probe.test) in done:
                continue
            if outcome.probe.test is not None:
                done.add((metric.name, outcome.probe.test))
            group = outcome.probe.group
            for scoring, value in _unit_value(metric, outcome, found).items():
                for name in (metric.name, *([] if group is None else [f"{metric.name}/{group}"])):
                    collected.setdefault(scoring, {}).setdefault(name, []).append(value)
    return {
        scoring: {metric: fmean(values) for metric, values in metrics.items()} for scoring, metrics in collected.items()
    }


def _value(metric: Metric, outcome: Outcome) -> Mapping[str, float]:
    """Return a metric's value for one probe, once it is shares by scoring.

    Raises:
        ConfigError: A metric of another package fails or returns something else.
    """
    if metric.name in ADDED.own or metric.name not in ADDED.others():
        return metric.value(outcome)
    try:
        found = metric.value(outcome)
    except Exception as error:  # whatever the code of another package raises
        raise ConfigError(f"{ADDED.described(metric.name)}, failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping) or not all(name in SCORINGS and 0 <= x <= 1 for name, x in found.items()):
        expected = f"a share from 0 to 1 per scoring ({', '.join(SCORINGS)})"
        raise ConfigError(f"{ADDED.described(metric.name)}, returned {found!r}; it must return {expected}")
    return found


def _unit_value(metric: Metric, outcome: Outcome, found: Sequence[Outcome]) -> Mapping[str, float]:
    """Return a metric's value for a probe, or for the test that it belongs to, by scoring."""
    test = outcome.probe.test
    if test is None:
        return _value(metric, outcome) if metric.of_test is None else metric.of_test([outcome])
    own = [each for each in found if each.probe.test == test and each.probe.kind in metric.kinds]
    if metric.of_test is not None:
        value = metric.of_test(own)
    else:
        value = _combined([_value(metric, each) for each in own], max if outcome.probe.rule == "any" else min)
    conditions = [each for each in found if each.probe.test == test and each.probe.kind == "condition"]
    return {scoring: share for scoring, share in value.items() if all(_held_before(c, scoring) for c in conditions)}


def _combined(values: Sequence[Mapping[str, float]], pick: Callable[[Iterable[float]], float]) -> dict[str, float]:
    """Return what the shares of a test's probes are together: their maximum for any of them, their minimum for all."""
    scorings = dict.fromkeys(scoring for value in values for scoring in value)
    return {scoring: pick(value[scoring] for value in values if scoring in value) for scoring in scorings}


def _held_before(condition: Outcome, scoring: str) -> bool:
    """Return whether the untouched model answered a condition as expected, under a scoring."""
    if condition.before is None:
        return False
    then = Outcome(condition.probe, condition.before, None, condition.text_before)
    return success_by_scoring(then).get(scoring) == 1.0


# --- many cases -----------------------------------------------------------------------------------------------------


def summarise(cases: Sequence[Values], *, seed: int = 0, confidence: float = 0.95, resamples: int = 1_000) -> Summary:
    """Return means over cases with bootstrap intervals: summary[scoring][metric] = {mean, low, high, n}.

    A case without a metric does not count for it; n is the number of cases that do.
    """
    names = {(scoring, metric): None for values in cases for scoring in values for metric in values[scoring]}
    summary: Summary = {}
    for scoring, metric in names:
        values = [case[scoring][metric] for case in cases if metric in case.get(scoring, {})]
        interval = bootstrap(values, seed=seed, confidence=confidence, resamples=resamples)
        summary.setdefault(scoring, {})[metric] = interval.as_dict()
    return summary


def harmonic_mean(values: Sequence[float]) -> float:
    """Return n / (1/a + 1/b + ...); 0 if a value is 0."""
    if not values or min(values) < 0:
        raise ValueError(f"expected at least one value, none of them negative, got {list(values)}")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


SCORE_METRICS = ("reliability", "generalization", "locality", "distracting_locality")


def score_columns(cases: Sequence[Values], scoring: str) -> list[list[float]] | None:
    """Return the metrics of the papers' score for every case under a scoring.

    The result has one list per metric, with NaN for a case without it: reliability, generalization, locality, and
    distracting locality if it was measured. It is None if one of the first three was not measured.
    """
    columns = [[case.get(scoring, {}).get(metric, math.nan) for case in cases] for metric in SCORE_METRICS]
    measured = [not all(map(math.isnan, column)) for column in columns]
    if not all(measured[:3]):
        return None
    return [column for column, is_there in zip(columns, measured, strict=True) if is_there]


def harmonic_means(means: np.ndarray) -> np.ndarray:
    """Return `harmonic_mean` along the last axis: (..., k) to (...)."""
    with np.errstate(divide="ignore"):
        return means.shape[-1] / (1 / means).sum(axis=-1)


def papers_score(cases: Sequence[Values], scoring: str, *, seed: int = 0, confidence: float = 0.95) -> Interval | None:
    """Return the papers' score S with its interval: the harmonic mean of the metrics' means.

    That is efficacy, paraphrase and neighborhood success (Meng et al. 2022, ROME), and in CounterFact+ also the success
    on distracting neighborhood probes. The bootstrap draws whole cases. It is None if one of the first three was not
    measured.
    """
    columns = score_columns(cases, scoring)
    return None if columns is None else bootstrap_of_means(columns, harmonic_means, seed=seed, confidence=confidence)
