"""Many edits on one model: what a sequence of edits does to all of them, and to everything else.

Edits are applied in batches, each on the model that the ones before have left. At checkpoints edits so far are scored,
and at the end all of them (checkpoints.py), so that what later edits undo is seen. Where cases are of several intervals
of time, there is a checkpoint behind each interval. The baseline is always the untouched model. In the end the model is
rolled back.

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
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from errata.benchmarks.bench.baseline import Baseline
from errata.benchmarks.bench.checkpoints import Checkpoints
from errata.benchmarks.bench.context import Bench, Write
from errata.benchmarks.bench.sequence_log import EditOutcome, SequenceLog
from errata.benchmarks.bench.sequence_runner import SequenceRunner
from errata.benchmarks.runs import priming_summary, summary
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
    course, checkpoints = SequenceRunner(bench, before, log), Checkpoints(bench, before, log)
    ends = interval_ends(bench.cases)
    bench.progress(0, count, "edits")
    try:
        for start in range(0, count, size):
            with bench.memory.phase("edits"):
                course.go_to(bench.cases[start : start + size], start)
            now = len(course.made)
            bench.progress(now, count, "edits")
            is_last = course.ended or now == count
            records_wanted = is_last and any(case.id not in done for case in bench.cases[:now])
            if records_wanted or (not log.has_point(now) and (is_last or _is_due(bench, start, now, ends))):
                course.catch_up()
                with bench.editor.finished(), bench.memory.phase("evaluation"):
                    records, able = checkpoints.evaluated(course.made, is_end=is_last)
                point = {**scored_point(bench, records, course.made), "ability": able}
                log.checkpoint(point)
                bench.track(now, point)
            if is_last:
                break
        for record in records if records_wanted else ():
            if record["case"] not in done:
                write(record, {})
    finally:
        bench.editor.rollback()


def interval_ends(cases: Sequence[Case]) -> list[int]:
    """Return the numbers of cases behind which an interval of time ends; none where intervals are mixed."""
    ends = [i for i in range(1, len(cases)) if cases[i].interval != cases[i - 1].interval]
    return ends if len(ends) + 1 == len({case.interval for case in cases}) else []


def _is_due(bench: Bench, start: int, now: int, ends: Sequence[int] = ()) -> bool:
    every = bench.config.eval_every
    is_at = any(start < at <= now for at in (*bench.config.eval_at, *ends))
    return is_at or (every is not None and now // every > start // every)


def _log(bench: Bench) -> SequenceLog:
    assert bench.log is not None, "a sequence has a log"
    return bench.log


def scored_point(bench: Bench, records: Sequence[dict[str, Any]], made: Sequence[EditOutcome]) -> dict[str, Any]:
    """The edits so far in numbers; `scored`, where it is not all of them, says how many were asked about."""
    confidence, seed = bench.config.confidence, bench.config.seed
    summed = summary.summarise(records, confidence=confidence, seed=seed)
    parts = summary.intervals(records, confidence=confidence, seed=seed)
    leaks = priming_summary.summarise(records, confidence=confidence, seed=seed)
    return {
        "edits": len(made),
        **({"scored": len(records)} if len(records) < len(made) else {}),
        "failed": sum(one.status == "failed" for one in made),
        "perplexity": records[0]["perplexity"],
        "perplexity_ratio": summary.perplexity_ratio(records[0]),
        "retention": records[0]["retention"],
        "neighborhood_kl": summed.collapse["neighborhood_kl"],
        "summary": _without_texts(summed.after),
        **({"priming": leaks} if leaks else {}),
        **({"intervals": {name: _without_texts(part["summary"]) for name, part in parts.items()}} if parts else {}),
    }


def _without_texts(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables without those of free answers, which are written at the end alone."""
    return {name: table for name, table in tables.items() if not name.startswith("generation")}
