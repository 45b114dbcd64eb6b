"""Turn scores into metrics: per probe, per case, and over cases with intervals. Pure functions; no model runs here.

A probe asks for what the edited model should answer (probes.py), so one rule serves all kinds. There are four scorings:

- probability: is the target strictly more probable than its competitor, by mean log-probability per token? The papers
  call this efficacy, paraphrase and neighborhood success. It needs both answers.
- teacher_forced: the share of the target's tokens that are the most probable ones after the prompt and the tokens
  before them. zsRE and EasyEdit report this as accuracy; it is not an exact match.
- generation: does the greedy continuation begin with the target?
- generation_containment: does it contain the target anywhere?

METRIC_OF_KIND names the metric of each kind of probe. Two more metrics, locality_unchanged and
distracting_locality_unchanged, compare with the untouched model and not with a target. They are right where the model
never knew the neighborhood's answer. Unchanged means: under probability, the same of the two answers is preferred;
under teacher_forced, the share of the target's positions with the same most probable token; under generation, the same
continuation.

Averages are taken over tokens, then over a case's probes of one kind, then over cases, with equal weights each time.
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

Values = dict[str, dict[str, float]]  # scoring -> metric -> value of one case
Summary = dict[str, dict[str, dict[str, float | int]]]  # scoring -> metric -> {mean, low, high, n}


@dataclass(frozen=True)
class Outcome:
    """What was measured on one probe: its score, its greedy continuation, and both from the untouched model."""

    probe: Probe
    score: ProbeScore
    before: ProbeScore | None = None
    text: str | None = None
    text_before: str | None = None


# --- one probe ------------------------------------------------------------------------------------------------------


def prefers_target(score: ProbeScore) -> bool | None:
    """Return whether the target is strictly more probable than the other answer; None without both, False for NaN."""
    if score.nll_target is None or score.nll_other is None:
        return None
    return score.nll_target < score.nll_other


def token_accuracy(correct: Sequence[bool]) -> float | None:
    """Return the share of an answer's tokens that are the most probable ones; None for no answer."""
    return fmean(correct) if correct else None


def success_by_scoring(outcome: Outcome) -> dict[str, float]:
    """Return per scoring how far the probe is answered as expected, from 0 to 1. Scorings without data are absent."""
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
    """Return per scoring how far the untouched model's answer stays, from 0 to 1. Scorings without data are absent."""
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
    """Return the means over a case's probes, by scoring and metric. Metrics without a probe or data are absent."""
    collected: dict[str, dict[str, list[float]]] = {}
    for outcome in measured:
        kind = outcome.probe.kind
        for names, values in ((METRIC_OF_KIND, success_by_scoring), (UNCHANGED_OF_KIND, unchanged_by_scoring)):
            if kind in names:
                for scoring, value in values(outcome).items():
                    collected.setdefault(scoring, {}).setdefault(names[kind], []).append(value)
    return {
        scoring: {metric: fmean(values) for metric, values in metrics.items()} for scoring, metrics in collected.items()
    }


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
