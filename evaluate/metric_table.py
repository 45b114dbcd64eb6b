"""Every metric: its name, how tables and pages call it and explain it, the kinds of probes it averages, and its value.

Whatever is declared in METRICS is measured, and shown wherever metrics are shown. Two of them, locality_unchanged and
distracting_locality_unchanged, compare with the untouched model and not with a target. They are right where the model
never knew the neighborhood's answer. Unchanged means: under probability, the same of the two answers is preferred;
under teacher_forced, the share of the target's positions with the same most probable token; under generation, the same
continuation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError
from errata.editors.core.extensions import ExtensionPoint
from errata.evaluate import conflicts, probes
from errata.evaluate.outcomes import Outcome, success_by_scoring, unchanged_by_scoring
from errata.evaluate.probes import ProbeKind


@dataclass(frozen=True)
class Metric:
    """A number per probe, or per test of several probes, that is averaged over these, then over cases.

    Attributes:
        name: In results.json and as a column of tables.
        title: At the head of a column.
        meaning: One or two sentences, for the page of a report.
        kinds: Kinds of the probes that it is over.
        value: Returns its value for one probe under each scoring, a share from 0 to 1; a scoring without data is
            absent.
        of_test: Returns its value for all probes of a test together, in place of `value` and the test's rule.
        is_shown: Whether tables and pages have it. Otherwise it is in results.json alone.
    """

    name: str
    title: str
    meaning: str
    kinds: tuple[str, ...]
    value: Callable[[Outcome], Mapping[str, float]] = success_by_scoring
    is_shown: bool = True
    of_test: Callable[[Sequence[Outcome]], Mapping[str, float]] | None = None


def _essence_drift(outcome: Outcome) -> dict[str, float]:
    """Return by how many nats per token a text became less probable."""
    now, then = outcome.score.nll_target, outcome.before.nll_target if outcome.before is not None else None
    if now is None or then is None or not math.isfinite(now - then):
        return {}
    return {"probability": now - then}


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
        "hops",
        "All hops",
        "All facts of the chain that follows from the edits are answered. MQuAKE's instance-wise accuracy.",
        ("hop",),
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
    Metric(
        "unrelated_unchanged",
        "Unrelated, unchanged",
        "Questions about something else, whose right answer the benchmark does not state, are answered as before.",
        ("unrelated",),
        unchanged_by_scoring,
    ),
    Metric(
        "robustness",
        "Robustness",
        "The model stays with its answer when it is doubted, turn after turn: it says yes to the edit's answer, or "
        "that it is sure.",
        ("doubted",),
    ),
    Metric(
        "first_success",
        "First edit's success",
        "Right behind the first of two edits in turn, its answer is more probable than the one it replaces.",
        ("superseded",),
        of_test=conflicts.first_success,
    ),
    Metric(
        "second_success",
        "Second edit's success",
        "The second of two edits in turn, made by itself on the untouched model: its answer is more probable than the "
        "one it replaces.",
        ("later_edit",),
        of_test=conflicts.second_success,
    ),
    Metric(
        "conflict_score",
        "Conflict score",
        "Of two edits that contradict each other, the later one prevails: its answer is the more probable one.",
        ("prevailing", "superseded"),
        of_test=conflicts.conflict_score,
    ),
    Metric(
        "conflict_magnitude",
        "Conflict magnitude",
        "By how much of it the earlier edit's answer loses its probability to the later edit. It may be negative.",
        ("superseded",),
        of_test=conflicts.conflict_magnitude,
    ),
    Metric(
        "tied_fact_damage",
        "Tied fact damage",
        "By how much of it a fact that two edits lean on, and do not change, loses its probability. Less is better.",
        ("tied_fact",),
        of_test=conflicts.tied_fact_damage,
    ),
    Metric(
        "round_success",
        "Round success",
        "The share of two edits, to a wrong answer and back to a true one, whose answer is then the more probable one.",
        ("left_object", "restored_object"),
        of_test=conflicts.round_success,
    ),
    Metric(
        "distortion",
        "Distortion",
        "How far an edit and its reversal move the distribution over all true answers (Jensen-Shannon divergence, in "
        "nats times 100). Less is better.",
        ("restored_object", "true_object"),
        of_test=conflicts.distortion,
    ),
    Metric(
        "ignore_rate",
        "Ignore rate",
        "The share of the other true answers that an edit and its reversal make less probable. Less is better.",
        ("true_object",),
        of_test=conflicts.ignore_rate,
    ),
    Metric(
        "failure_rate",
        "Failure rate",
        "The share of cases in which more than half of the other true answers became less probable. Less is better.",
        ("true_object",),
        of_test=conflicts.failure_rate,
    ),
    Metric(
        "essence_drift",
        "Essence drift",
        "By how much a text about the subject loses log-probability per token (nats times 100): the logarithm of its "
        "perplexity after the edit over that before. Less is better.",
        ("essence",),
        _essence_drift,
    ),
)
# Of these, less is better.
LOWER = ("tied_fact_damage", "distortion", "ignore_rate", "failure_rate", "essence_drift")
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


# The metric that says how often a kind of probe is answered as expected.
METRIC_OF_KIND: Mapping[str, str] = MappingProxyType(
    {
        kind: metric.name
        for metric in METRICS
        for kind in metric.kinds
        if metric.value is success_by_scoring and metric.of_test is None
    }
)
