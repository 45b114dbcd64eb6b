"""Many edits on one model: what a sequence of edits does to all of them, and to everything else.

Edits are applied in batches, each on the model that the ones before have left. At checkpoints, and at the end, all
edits so far are scored, so that what later edits undo is seen; the baseline is always the untouched model. The model is
rolled back at the end.

What is asked about the edits of a sequence must not be about its other edits: neighbours whose prompt mentions a
subject that the sequence edits are left out (`without_edited_subjects`), and the known facts are those of subjects that
it never edits.

An edit that is refused, or that the guard undoes, changes nothing; its case is scored like the others, on the model as
it stands. How edits are made is in sequence_runner.py.

Every edit is written down before the next is made (sequence_log.py), and every part of a checkpoint's evaluation
(partial_results.py). A sequence that was killed goes on behind the last that was, and ends with the bytes of one that
nothing disturbed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

from errata.benchmarks.bench.baseline import TOGETHER, Baseline
from errata.benchmarks.bench.context import Bench, Write
from errata.benchmarks.bench.measurements import (
    NEIGHBORHOOD,
    measured_ability,
    measured_perplexity,
    observed,
    retention,
    scores_with_next,
)
from errata.benchmarks.bench.sequence_log import EditOutcome, SequenceLog
from errata.benchmarks.bench.sequence_runner import SequenceRunner
from errata.benchmarks.runs import summary
from errata.evaluate.collapse import next_token_kl
from errata.evaluate.probes import Case, Probe, kinds_about_others


def sequential(bench: Bench, before: Baseline, done: Collection[str], write: Write) -> None:
    """Edits on top of each other, `batch_size` at a time."""
    _sequence(bench, before, done, write, bench.config.batch_size)


def batch(bench: Bench, before: Baseline, done: Collection[str], write: Write) -> None:
    """All edits at once."""
    _sequence(bench, before, done, write, len(bench.cases))


def without_edited_subjects(cases: Sequence[Case]) -> list[Case]:
    """The cases without probes of other subjects that mention a subject which some other case edits."""
    mentions, about_others = _mentions(_subjects(cases)), kinds_about_others()
    return [dataclasses.replace(case, probes=tuple(_kept(case, mentions, about_others))) for case in cases]


def never_edited(known: Sequence[Probe], cases: Sequence[Case]) -> list[Probe]:
    """Known facts whose prompt mentions no subject that the cases edit."""
    mentioned = _mentions(_subjects(cases))
    return [probe for probe in known if not mentioned(probe.prompt)]


def _subjects(cases: Sequence[Case]) -> set[str]:
    return set().union(*(case.subjects for case in cases))


def _mentions(subjects: Collection[str]) -> Callable[[str], set[str]]:
    """Which of the subjects a text mentions, as whole words."""
    longest_first = sorted(subjects, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(subject)}(?!\w)" for subject in longest_first) or "(?!)")
    return lambda text: set(pattern.findall(text))


def _kept(case: Case, mentioned: Callable[[str], set[str]], about_others: Collection[str]) -> Iterator[Probe]:
    for probe in case.probes:
        # A distracting prompt mentions the edited subject itself, on purpose.
        if probe.kind not in about_others or not mentioned(probe.prompt) - case.subjects:
            yield probe


def _sequence(bench: Bench, before: Baseline, done: Collection[str], write: Write, size: int) -> None:
    log, count = _log(bench), len(bench.cases)
    course = SequenceRunner(bench, before, log)
    bench.progress(0, count, "edits")
    try:
        for start in range(0, count, size):
            course.go_to(bench.cases[start : start + size], start)
            now = len(course.made)
            bench.progress(now, count, "edits")
            is_last = course.ended or now == count
            records_wanted = is_last and any(case.id not in done for case in bench.cases[:now])
            if records_wanted or (not log.has_point(now) and (is_last or _is_due(bench, start, now))):
                course.catch_up()
                records, able = _evaluated(bench, before, course.made, texts=is_last)
                point = {**_checkpoint(bench, records, now), "ability": able}
                log.checkpoint(point)
                bench.track(now, point)
            if is_last:
                break
        for record in records if records_wanted else ():
            if record["case"] not in done:
                write(record, {})
    finally:
        bench.editor.rollback()


def _is_due(bench: Bench, start: int, now: int) -> bool:
    every = bench.config.eval_every
    return every is not None and now // every > start // every


def _log(bench: Bench) -> SequenceLog:
    assert bench.log is not None, "a sequence has a log"
    return bench.log


def _evaluated(
    bench: Bench, before: Baseline, made: Sequence[EditOutcome], *, texts: bool
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """One record for each edit so far, as the model now stands, free texts only where they are wanted; and its scores
    in lm-eval's tasks."""
    parts = _log(bench).parts(len(made), bench.stop)
    shared = parts.kept(partial(_shared, bench))
    records = []
    for start in range(0, len(made), TOGETHER):
        cases = bench.cases[start : min(start + TOGETHER, len(made))]
        said = parts.kept(partial(_asked, bench, cases, with_texts=texts))
        for place, (case, (answers, drift)) in enumerate(zip(cases, said, strict=True), start):
            record = _record(place, case, made[place], before, answers)
            records.append({**record, "neighborhood_kl": drift, **shared})
    able = parts.kept(partial(measured_ability, bench))
    _log(bench).seconds({"checkpoint": len(made), "evaluation": parts.seconds})
    return records, able


def _shared(bench: Bench) -> dict[str, Any]:
    """What is measured of the model and not of an edit."""
    return {"perplexity": measured_perplexity(bench), "retention": retention(bench)}


def _record(
    place: int, case: Case, made: EditOutcome, before: Baseline, answers: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "place": place,
        "sequence": True,
        "case": case.id,
        **case.asked(),
        "status": made.status,
        "reason": made.reason,
        "warnings": list(made.warnings),
        "diagnostics": dict(made.report),
        "guard": made.guard,
        "perplexity_before": before.perplexity,
        "probes": [
            {**probe.as_dict(), "before": was, "after": now}
            for probe, was, now in zip(case.probes, before.observed[case.id], answers, strict=True)
        ],
    }


def _asked(bench: Bench, cases: Sequence[Case], *, with_texts: bool) -> list[tuple[list[dict[str, Any]], float | None]]:
    """What the model says to each case's probes as it stands, and how far its neighbours' predictions have moved."""
    probes = [probe for case in cases for probe in case.probes]
    scores = scores_with_next(bench, probes)
    answers = iter(observed(bench, probes, scores, with_texts=with_texts))
    with bench.editor.ledger.untouched():
        untouched = scores_with_next(bench, [probe for probe in probes if probe.kind in NEIGHBORHOOD])
    now = [scored.logprobs for scored in scores if scored.logprobs is not None]
    then = [scored.logprobs for scored in untouched if scored.logprobs is not None]
    moved = iter([next_token_kl(a, b) for a, b in zip(now, then, strict=True)])
    found = []
    for case in cases:
        drifts = [next(moved) for probe in case.probes if probe.kind in NEIGHBORHOOD]
        drift = math.fsum(drifts) / len(drifts) if drifts else None
        found.append(([next(answers) for _ in case.probes], drift))
    return found


def _checkpoint(bench: Bench, records: Sequence[dict[str, Any]], edits: int) -> dict[str, Any]:
    """All edits so far in numbers."""
    summed = summary.summarise(records, confidence=bench.config.confidence, seed=bench.config.seed)
    return {
        "edits": edits,
        "failed": summed.counts["failed"],
        "perplexity": records[0]["perplexity"],
        "perplexity_ratio": summary.perplexity_ratio(records[0]),
        "retention": records[0]["retention"],
        "neighborhood_kl": summed.collapse["neighborhood_kl"],
        "summary": {name: table for name, table in summed.after.items() if not name.startswith("generation")},
    }
