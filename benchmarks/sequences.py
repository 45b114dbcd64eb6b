"""Many edits on one model: what a sequence of edits does to all of them, and to everything else.

Edits are applied in batches, each on the model that the ones before have left. At checkpoints, and at the end, all
edits so far are scored, so that what later edits undo is seen; the baseline is always the untouched model. The model is
rolled back at the end.

What is asked about the edits of a sequence must not be about its other edits: neighbours whose prompt mentions a
subject that the sequence edits are left out (`apart`), and the known facts are those of subjects that it never edits.

An edit that is refused changes nothing; its case is scored like the others, on the model as it stands. A sequence that
was stopped begins anew; only a finished one is skipped.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from errata.benchmarks import summary
from errata.benchmarks.asking import (
    NEIGHBORHOOD,
    REFUSALS,
    Baseline,
    Bench,
    Write,
    measured_perplexity,
    observed,
    passed_on,
    plain_diagnostics,
    reason_of,
    retention,
    scores_with_next,
)
from errata.editors.core.errors import DisablingEditWarning
from errata.evaluate.collapse import next_token_kl
from errata.evaluate.probes import Case, Probe
from errata.evaluate.scoring import score

# Probes about other subjects than the edited one.
_OF_OTHERS = ("neighborhood", "distracting_neighborhood", "attribute")


@dataclasses.dataclass(frozen=True)
class _Made:
    """An edit of a sequence: its report, or why it was refused; and its share of the time."""

    report: dict[str, Any]
    reason: str | None
    warnings: tuple[str, ...]
    seconds: dict[str, float]


def sequential(bench: Bench, before: Baseline, done: Collection[str], write: Write) -> None:
    """Edits on top of each other, `bench.batch_size` at a time."""
    _sequence(bench, before, done, write, bench.batch_size)


def batch(bench: Bench, before: Baseline, done: Collection[str], write: Write) -> None:
    """All edits at once."""
    _sequence(bench, before, done, write, len(bench.cases))


def apart(cases: Sequence[Case]) -> list[Case]:
    """The cases without probes of other subjects that mention a subject which some other case edits."""
    subjects = {case.request.subject for case in cases}
    return [dataclasses.replace(case, probes=tuple(_kept(case, _mentions(subjects)))) for case in cases]


def never_edited(known: Sequence[Probe], cases: Sequence[Case]) -> list[Probe]:
    """Known facts whose prompt mentions no subject that the cases edit."""
    mentioned = _mentions({case.request.subject for case in cases})
    return [probe for probe in known if not mentioned(probe.prompt)]


def _mentions(subjects: Collection[str]) -> Callable[[str], set[str]]:
    """Which of the subjects a text mentions, as whole words."""
    longest_first = sorted(subjects, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(subject)}(?!\w)" for subject in longest_first) or "(?!)")
    return lambda text: set(pattern.findall(text))


def _kept(case: Case, mentioned: Callable[[str], set[str]]) -> Iterator[Probe]:
    for probe in case.probes:
        # A distracting prompt mentions the edited subject itself, on purpose.
        if probe.kind not in _OF_OTHERS or not mentioned(probe.prompt) - {case.request.subject}:
            yield probe


def _sequence(bench: Bench, before: Baseline, done: Collection[str], write: Write, size: int) -> None:
    made: list[_Made] = []
    checkpoints: list[dict[str, Any]] = []
    untouched = _next_tokens(bench, bench.cases)
    try:
        for start in range(0, len(bench.cases), size):
            group = bench.cases[start : start + size]
            made += _apply(bench, group)
            bench.progress(len(made), len(bench.cases), "edits")
            last = len(made) == len(bench.cases)
            if last or _is_due(bench, start, len(made)):
                records = _records(bench, before, made, untouched, texts=last)
                checkpoints.append(_checkpoint(bench, records, len(made)))
                bench.checkpoint(checkpoints)
        for record, entry in zip(records, made, strict=True):
            if record["case"] not in done:
                write(record, entry.seconds)
    finally:
        bench.editor.rollback()


def _is_due(bench: Bench, start: int, now: int) -> bool:
    every = bench.eval_every
    return every is not None and now // every > start // every


def _apply(bench: Bench, group: Sequence[Case]) -> Iterator[_Made]:
    """Apply a batch as one edit; where it is refused, each case by itself, to find out which."""
    started = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DisablingEditWarning)
            edit = bench.editor.apply([case.request for case in group])
    except REFUSALS as error:
        if len(group) > 1:
            for case in group:
                yield from _apply(bench, [case])
        else:
            yield _Made({}, reason_of(error), (), {"edit": time.perf_counter() - started})
        return
    seconds = (time.perf_counter() - started) / len(group)
    messages = passed_on(caught)
    for request, report in zip(edit.requests, edit.diagnostics, strict=True):
        plain, parts = plain_diagnostics(report)
        own = tuple(message for message in messages if f"request {request.id} " in message)
        yield _Made(plain, None, own, {**parts, "edit": seconds})


def _records(
    bench: Bench, before: Baseline, made: Sequence[_Made], untouched: Mapping[str, list[Any]], *, texts: bool
) -> list[dict[str, Any]]:
    """One record for each edit so far, as the model now stands; free texts only where they are wanted."""
    started = time.perf_counter()
    cases = bench.cases[: len(made)]
    asked = bench if texts else dataclasses.replace(bench, generation_tokens=0, fluency_tokens=0)
    probes = [probe for case in cases for probe in case.probes]
    answers = iter(
        observed(asked, probes, score(bench.model, bench.tokenizer, probes, batch_tokens=bench.batch_tokens))
    )
    drifts = _drifts(_next_tokens(bench, cases), untouched)
    shared = {"perplexity": measured_perplexity(bench), "retention": retention(bench)}
    records = [
        {
            "place": place,
            "sequence": True,
            "case": case.id,
            "request": vars(case.request),
            "status": "failed" if entry.reason else "ok",
            "reason": entry.reason,
            "warnings": list(entry.warnings),
            "diagnostics": entry.report,
            "perplexity_before": before.perplexity,
            "neighborhood_kl": drifts[case.id],
            **shared,
            "probes": [
                {**vars(probe), "before": was, "after": next(answers)}
                for probe, was in zip(case.probes, before.observed[case.id], strict=True)
            ],
        }
        for place, (case, entry) in enumerate(zip(cases, made, strict=True))
    ]
    share = (time.perf_counter() - started) / len(made)
    for entry in made:
        entry.seconds["evaluation"] = entry.seconds.get("evaluation", 0.0) + share
    return records


def _next_tokens(bench: Bench, cases: Sequence[Case]) -> dict[str, list[Any]]:
    """Distributions of the next token behind each case's neighbours."""
    probes = [probe for case in cases for probe in case.probes if probe.kind in NEIGHBORHOOD]
    found = iter([s.logprobs for s in scores_with_next(bench, probes)])
    return {case.id: [next(found) for probe in case.probes if probe.kind in NEIGHBORHOOD] for case in cases}


def _drifts(now: Mapping[str, list[Any]], untouched: Mapping[str, list[Any]]) -> dict[str, float | None]:
    drifts: dict[str, float | None] = {}
    for case, after in now.items():
        values = [next_token_kl(a, b) for a, b in zip(after, untouched[case], strict=True)]
        drifts[case] = math.fsum(values) / len(values) if values else None
    return drifts


def _checkpoint(bench: Bench, records: Sequence[dict[str, Any]], edits: int) -> dict[str, Any]:
    """All edits so far in numbers."""
    summed = summary.summarise(records, confidence=bench.confidence, seed=bench.seed)
    return {
        "edits": edits,
        "failed": summed.counts["failed"],
        "perplexity": records[0]["perplexity"],
        "perplexity_ratio": summary.perplexity_ratio(records[0]),
        "retention": records[0]["retention"],
        "neighborhood_kl": summed.collapse["neighborhood_kl"],
        "summary": {name: table for name, table in summed.after.items() if not name.startswith("generation")},
    }
