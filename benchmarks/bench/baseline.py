"""What the untouched model says to every probe, asked once before the first edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.measurements import measured_ability, measured_perplexity, observed
from errata.evaluate.probes import Case
from errata.evaluate.scoring import score

Part = Callable[[Callable[[], Any]], Any]
# Cases that are scored together, and written down as one part. Of a sequence a distribution over the vocabulary is held
# for each of their neighbours.
TOGETHER = 256
BEFORE = "before.json"


@dataclass(frozen=True)
class Baseline:
    """What the untouched model says.

    Attributes:
        observed: {case id: one observation per probe}.
        perplexity: Of the run's texts; None without texts.
        ability: {task of lm-eval: its score as plain values}; None where no task is asked.
        guard: Perplexity of the guard's texts; None without a guard.
    """

    observed: Mapping[str, list[dict[str, Any]]]
    perplexity: float | None
    ability: Mapping[str, Mapping[str, Any]] | None = None
    guard: float | None = None


def baseline(bench: Bench, part: Part = lambda make: make()) -> Baseline:
    """Return what the untouched model says to every probe.

    Args:
        bench: On the untouched model.
        part: Called with what makes each part of it; may have it from an earlier start.
    """
    by_case: dict[str, list[dict[str, Any]]] = {}
    for start in range(0, len(bench.cases), TOGETHER):
        by_case |= part(partial(_by_case, bench, bench.cases[start : start + TOGETHER]))
    return Baseline(by_case, part(partial(measured_perplexity, bench)), part(partial(measured_ability, bench)))


def _by_case(bench: Bench, cases: Sequence[Case]) -> dict[str, list[dict[str, Any]]]:
    """What the model says to each case's probes as it stands; a prompt that many cases share is run once."""
    probes = [probe for case in cases for probe in case.probes]
    scores = score(bench.model, bench.tokenizer, probes, batch_tokens=bench.batch_tokens)
    answers = iter(observed(bench, probes, scores))
    return {case.id: [next(answers) for _ in case.probes] for case in cases}
