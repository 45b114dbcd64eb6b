"""From scores to numbers: per probe, per case, and over cases with intervals. Pure functions, nothing is run here.

A probe counts as the edited model should answer it (see probes.py), so one rule serves all kinds. The protocols:

- probability: the target is strictly more likely than its competitor, by mean log-probability a token. What the papers
  call efficacy, paraphrase and neighborhood success. Needs both answers.
- teacher_forced: the share of the target's tokens that are the likeliest behind the prompt and the tokens before them.
  What zsRE and EasyEdit report as accuracy; it is no exact match.
- generation: the greedy continuation begins with the target. generation_containment: it holds the target anywhere.

The metrics are METRIC_OF_KIND's, and two that compare with the untouched model instead of a target, which is right
where the model never knew the neighborhood's answer: locality_unchanged and distracting_locality_unchanged. Unchanged
means, under probability, the same of the two answers preferred; under teacher_forced, the share of the target's places
where the likeliest token is the same; under generation, the same continuation.

Averages are taken over tokens, then over a case's probes of one kind, then over cases, each with equal weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType

import numpy as np

from errata.evaluate.generation import match_answer
from errata.evaluate.intervals import Interval, bootstrap, bootstrap_of_means
from errata.evaluate.probes import METRIC_OF_KIND, Case, Probe
from errata.evaluate.scoring import ProbeScore

SCORINGS = ("probability", "teacher_forced", "generation", "generation_containment")
UNCHANGED_OF_KIND: Mapping[str, str] = MappingProxyType(
    {"neighborhood": "locality_unchanged", "distracting_neighborhood": "distracting_locality_unchanged"}
)

Values = dict[str, dict[str, float]]  # protocol -> metric -> value of one case
Summary = dict[str, dict[str, dict[str, float | int]]]  # protocol -> metric -> {mean, low, high, n}


@dataclass(frozen=True)
class Outcome:
    """All that is known about one probe: its score, its greedy continuation, and both from the untouched model."""

    probe: Probe
    score: ProbeScore
    before: ProbeScore | None = None
    text: str | None = None
    text_before: str | None = None


# --- one probe ------------------------------------------------------------------------------------------------------


def prefers_target(score: ProbeScore) -> bool | None:
    """Whether the target is strictly more likely than the other answer; None without both. False for NaN."""
    if score.nll_target is None or score.nll_other is None:
        return None
    return score.nll_target < score.nll_other


def token_accuracy(correct: Sequence[bool]) -> float | None:
    """The share of an answer's tokens that are the likeliest; None for no answer."""
    return fmean(correct) if correct else None


def success_by_scoring(outcome: Outcome) -> dict[str, float]:
    """By protocol: how far the probe is answered as it should be, from 0 to 1. Protocols without data are absent."""
    match = None
    if outcome.text is not None and outcome.probe.target is not None:
        match = match_answer(outcome.text, outcome.probe.target)
    return _present(
        probability=prefers_target(outcome.score),
        teacher_forced=token_accuracy(outcome.score.target_correct),
        generation=match and match.exact,
        generation_containment=match and match.contained,
    )


def unchanged_by_scoring(outcome: Outcome) -> dict[str, float]:
    """By protocol: how far the answer is the untouched model's, from 0 to 1. Protocols without data are absent."""
    same_text = None if None in (outcome.text, outcome.text_before) else outcome.text == outcome.text_before
    if outcome.before is None:
        return _present(generation=same_text)
    now, then = prefers_target(outcome.score), prefers_target(outcome.before)
    choices = list(zip(outcome.score.target_choice, outcome.before.target_choice, strict=True))
    return _present(
        probability=None if now is None else now == then,
        teacher_forced=fmean(a == b for a, b in choices) if choices else None,
        generation=same_text,
    )


def _present(**values: float | None) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None}


# --- one case -------------------------------------------------------------------------------------------------------


def outcomes(
    case: Case,
    scores: Sequence[ProbeScore],
    *,
    before: Sequence[ProbeScore] | None = None,
    texts: Mapping[str, str] | None = None,
    texts_before: Mapping[str, str] | None = None,
) -> list[Outcome]:
    """A case's probes with what was measured on them: scores in the order of the probes, continuations by prompt."""
    texts, texts_before = texts or {}, texts_before or {}
    earlier = before if before is not None else [None] * len(scores)
    return [
        Outcome(probe, score, then, texts.get(probe.prompt), texts_before.get(probe.prompt))
        for probe, score, then in zip(case.probes, scores, earlier, strict=True)
    ]


def case_values(measured: Iterable[Outcome]) -> Values:
    """By protocol and metric: the mean over a case's probes. What the case has no probe or no data for is absent."""
    found: dict[str, dict[str, list[float]]] = {}
    for outcome in measured:
        kind = outcome.probe.kind
        for names, values in ((METRIC_OF_KIND, success_by_scoring), (UNCHANGED_OF_KIND, unchanged_by_scoring)):
            if kind in names:
                for protocol, value in values(outcome).items():
                    found.setdefault(protocol, {}).setdefault(names[kind], []).append(value)
    return {
        protocol: {metric: fmean(values) for metric, values in metrics.items()} for protocol, metrics in found.items()
    }


# --- many cases -----------------------------------------------------------------------------------------------------


def summarise(cases: Sequence[Values], *, seed: int = 0, confidence: float = 0.95, resamples: int = 1_000) -> Summary:
    """Means over cases with bootstrap intervals: summary[protocol][metric] = {mean, low, high, n}.

    A case without a metric does not count towards it; n says how many do.
    """
    names = {(protocol, metric): None for values in cases for protocol in values for metric in values[protocol]}
    summary: Summary = {}
    for protocol, metric in names:
        values = [case[protocol][metric] for case in cases if metric in case.get(protocol, {})]
        interval = bootstrap(values, seed=seed, confidence=confidence, resamples=resamples)
        summary.setdefault(protocol, {})[metric] = interval.as_dict()
    return summary


def harmonic_mean(values: Sequence[float]) -> float:
    """n / (1/a + 1/b + ...); 0 where one of them is 0."""
    if not values or min(values) < 0:
        raise ValueError(f"expected values from 0 up, at least one, got {list(values)}")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


SCORE_METRICS = ("reliability", "generalization", "locality", "distracting_locality")


def score_columns(cases: Sequence[Values], protocol: str) -> list[list[float]] | None:
    """The score's metrics of every case under a protocol, a list a metric, NaN where a case has none: reliability,
    generalization, locality, and distracting locality where it was asked. None where one of the first three is not."""
    columns = [[case.get(protocol, {}).get(metric, math.nan) for case in cases] for metric in SCORE_METRICS]
    measured = [not all(map(math.isnan, column)) for column in columns]
    if not all(measured[:3]):
        return None
    return [column for column, is_there in zip(columns, measured, strict=True) if is_there]


def harmonic_means(means: np.ndarray) -> np.ndarray:
    """`harmonic_mean` along the last axis: (..., k) to (...)."""
    with np.errstate(divide="ignore"):
        return means.shape[-1] / (1 / means).sum(axis=-1)


def papers_score(cases: Sequence[Values], protocol: str, *, seed: int = 0, confidence: float = 0.95) -> Interval | None:
    """The papers' score, the harmonic mean of the metrics' means, with its interval: cases are drawn whole."""
    columns = score_columns(cases, protocol)
    return None if columns is None else bootstrap_of_means(columns, harmonic_means, seed=seed, confidence=confidence)
