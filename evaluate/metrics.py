"""Turn scores into metrics: per probe, per case, and over cases with intervals. Pure functions; no model runs here.

A probe asks for what the edited model should answer (probes.py), so one rule serves all kinds. There are four scorings:

- probability: is the target strictly more probable than its competitor, by mean log-probability per token? The papers
  call this efficacy, paraphrase and neighborhood success. It needs both answers.
- teacher_forced: the share of the target's tokens that are the most probable ones after the prompt and the tokens
  before them. zsRE and EasyEdit report this as accuracy; it is not an exact match.
- generation: does the greedy continuation begin with the target?
- generation_containment: does it contain the target anywhere?

METRICS declares every metric: its name, how tables and pages call it and explain it, the kinds of probes that it
averages, and its value for one probe. Whatever is declared there is measured, and shown wherever metrics are shown.
Two of them, locality_unchanged and distracting_locality_unchanged, compare with the untouched model and not with a
target. They are right where the model never knew the neighborhood's answer. Unchanged means: under probability, the
same of the two answers is preferred; under teacher_forced, the share of the target's positions with the same most
probable token; under generation, the same continuation.

Averages are taken over tokens, then over a case's probes of one kind, then over cases, with equal weights each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType

import numpy as np

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError
from errata.editors.core.extensions import ExtensionPoint
from errata.evaluate import probes
from errata.evaluate.generation import match_answer
from errata.evaluate.intervals import Interval, bootstrap, bootstrap_of_means
from errata.evaluate.probes import Case, Probe, ProbeKind
from errata.evaluate.scoring import ProbeScore

SCORINGS = ("probability", "teacher_forced", "generation", "generation_containment")
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


# --- all metrics ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """A share from 0 to 1 that is averaged over probes, then over cases.

    Attributes:
        name: In results.json and as a column of tables.
        title: At the head of a column.
        meaning: One or two sentences, for the page of a report.
        kinds: Kinds of the probes that it is over.
        value: Returns its value for one probe under each scoring; a scoring without data is absent.
        is_shown: Whether tables and pages have it. Otherwise it is in results.json alone.
    """

    name: str
    title: str
    meaning: str
    kinds: tuple[str, ...]
    value: Callable[[Outcome], Mapping[str, float]] = success_by_scoring
    is_shown: bool = True


# In the order of the columns.
METRICS: tuple[Metric, ...] = (
    Metric(
        "reliability",
        "Reliability",
        "The edited prompt is answered with the new answer. The papers' efficacy.",
        ("rewrite",),
    ),
    Metric(
        "generalization",
        "Generalization",
        "Other wordings of the same question are answered so, too. The papers' paraphrase success.",
        ("paraphrase",),
    ),
    Metric(
        "locality",
        "Locality",
        "Questions about other subjects keep their true answers: in CounterFact those with the same true answer, "
        "in zsRE an unrelated one. The papers' specificity, or neighbourhood success.",
        ("neighborhood",),
    ),
    Metric(
        "distracting_locality",
        "Distracting locality",
        "The same, asked behind a sentence that states the edit, as in CounterFact+.",
        ("distracting_neighborhood",),
    ),
    Metric(
        "portability",
        "Portability",
        "What follows from the new answer is answered, one step of reasoning away.",
        ("portability",),
    ),
    Metric(
        "locality_unchanged",
        "Locality, unchanged",
        "Questions about other subjects keep the untouched model's answers, right or wrong.",
        ("neighborhood",),
        unchanged_by_scoring,
        is_shown=False,
    ),
    Metric(
        "distracting_locality_unchanged",
        "Distracting locality, unchanged",
        "The same, asked behind a sentence that states the edit.",
        ("distracting_neighborhood",),
        unchanged_by_scoring,
        is_shown=False,
    ),
)
SCORE = "score"  # the papers' harmonic mean, which no metric can be called
ADDED = ExtensionPoint(
    "errata.metrics",
    "metric",
    "a Metric",
    lambda loaded: isinstance(loaded, Metric),
    own=(*(metric.name for metric in METRICS), SCORE),
    named_by="name",
)


def declared() -> tuple[Metric, ...]:
    """Return every metric: those of this package, then those of other packages and of their kinds of probes.

    Raises:
        ConfigError: One cannot be imported, two have one name, or one is over an unknown kind of probe.
    """
    of_kinds = [metric for kind in probes.ADDED.load_others() for metric in _metrics_of(kind)]
    found = (*METRICS, *of_kinds, *ADDED.load_others())
    names = [metric.name for metric in found]
    for metric in found[len(METRICS) :]:
        if names.count(metric.name) > 1 or metric.name == SCORE:
            raise ConfigError(f"two metrics have the name {metric.name!r}; give that of your package another name")
        for kind in metric.kinds:
            if kind not in probes.kinds():
                hint = did_you_mean(kind, probes.kinds())
                raise ConfigError(f"the metric {metric.name!r} is over unknown probes of the kind {kind!r}{hint}")
    return found


def _metrics_of(kind: ProbeKind) -> Iterator[Metric]:
    if kind.metric is None:
        return
    title = kind.title or kind.metric.replace("_", " ").capitalize()
    yield Metric(kind.metric, title, kind.meaning, (kind.name,))
    if kind.is_about_others:
        same = f"{kind.metric}_unchanged"
        yield Metric(same, f"{title}, unchanged", kind.meaning, (kind.name,), unchanged_by_scoring, is_shown=False)


def _value(metric: Metric, outcome: Outcome) -> Mapping[str, float]:
    """Return a metric's value for one probe, once it is shares by scoring.

    Raises:
        ConfigError: A metric of another package fails or returns something else.
    """
    if metric.name not in ADDED.others():
        return metric.value(outcome)
    try:
        found = metric.value(outcome)
    except Exception as error:  # whatever the code of another package raises
        raise ConfigError(f"{ADDED.described(metric.name)}, failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping) or not all(name in SCORINGS and 0 <= x <= 1 for name, x in found.items()):
        expected = f"a share from 0 to 1 per scoring ({', '.join(SCORINGS)})"
        raise ConfigError(f"{ADDED.described(metric.name)}, returned {found!r}; it must return {expected}")
    return found


# The metric that says how often a kind of probe is answered as expected.
METRIC_OF_KIND: Mapping[str, str] = MappingProxyType(
    {kind: metric.name for metric in METRICS for kind in metric.kinds if metric.value is success_by_scoring}
)


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
    everything = declared()
    for outcome in measured:
        for metric in everything:
            if outcome.probe.kind in metric.kinds:
                for scoring, value in _value(metric, outcome).items():
                    collected.setdefault(scoring, {}).setdefault(metric.name, []).append(value)
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
