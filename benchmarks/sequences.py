"""Many edits on one model: what a sequence of edits does to all of them, and to everything else.

Edits are applied in batches, each on the model that the ones before have left. At checkpoints, and at the end, all
edits so far are scored, so that what later edits undo is seen; the baseline is always the untouched model. The model is
rolled back at the end.

What is asked about the edits of a sequence must not be about its other edits: neighbours whose prompt mentions a
subject that the sequence edits are left out (`apart`), and the known facts are those of subjects that it never edits.

A batch that is refused is made again in halves, down to the single edit that is at fault. That one changes nothing;
its case is scored like the others, on the model as it stands.

Every edit is written down before the next is made (diary.py). A sequence that was killed goes on behind the last one
that was, and ends with the bytes of one that nothing disturbed.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
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
from errata.benchmarks.diary import Diary, Made
from errata.editors.core.editor import Edit
from errata.editors.core.entry import Entry
from errata.editors.core.errors import DisablingEditWarning
from errata.evaluate.collapse import next_token_kl
from errata.evaluate.probes import Case, Probe

# Probes about other subjects than the edited one.
_OF_OTHERS = ("neighborhood", "distracting_neighborhood", "attribute")
# Cases that are scored together: a distribution over the vocabulary is held for each of their neighbours.
_TOGETHER = 256
# Edits read from the diary before they are put on the model.
_REPLAYED = 256


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
    course, diary = _Course(bench), _diary(bench)
    count = len(bench.cases)
    bench.progress(0, count, "edits")
    try:
        for start in range(0, count, size):
            course.go_to(bench.cases[start : start + size], start)
            now = len(course.made)
            bench.progress(now, count, "edits")
            records_wanted = now == count and any(case.id not in done for case in bench.cases)
            if records_wanted or (not diary.has_point(now) and (now == count or _is_due(bench, start, now))):
                course.catch_up()
                records = _records(bench, before, course.made, texts=now == count)
                diary.checkpoint(_checkpoint(bench, records, now))
        for record in records if records_wanted else ():
            if record["case"] not in done:
                write(record, {})
    finally:
        bench.editor.rollback()


def _is_due(bench: Bench, start: int, now: int) -> bool:
    every = bench.eval_every
    return every is not None and now // every > start // every


def _diary(bench: Bench) -> Diary:
    assert bench.diary is not None, "a sequence is written down"
    return bench.diary


class _Course:
    """The edits of a sequence: those that the diary holds, and then those that are made."""

    def __init__(self, bench: Bench) -> None:
        self.made: list[Made] = []
        self._bench, self._diary, self._ledger = bench, _diary(bench), bench.editor.ledger
        self._written = self._diary.edits(self._ledger)
        self._behind: list[Entry] = []  # read from the diary, and not on the model yet
        self._clock = time.perf_counter()

    def go_to(self, group: Sequence[Case], start: int) -> None:
        """Make the edits of a group, whose first case is the `start`-th, or read what the diary has of them."""
        while len(self.made) < start + len(group) and (found := next(self._written, None)) is not None:
            self._read(*found)
        if len(self.made) < start + len(group):
            self.catch_up()
            self._clock = time.perf_counter()
            self._make(group, len(self.made) - start)

    def catch_up(self) -> None:
        """Put what was read on the model: many edits at the price of one sum."""
        self._ledger.extend(self._behind)
        self._behind = []

    def _read(self, entry: Entry | None, made: Sequence[Made]) -> None:
        self.made += made
        self._behind += [] if entry is None else [entry]
        if len(self._behind) == _REPLAYED:
            self.catch_up()

    def _make(self, group: Sequence[Case], done: int) -> None:
        """Make the edits of a group, of which the first `done` are made. Where they are not all, it was refused as a
        whole before, and went on in halves."""
        if done == len(group) or (done == 0 and self._attempt(group)):
            return
        half = (len(group) + 1) // 2
        self._make(group[:half], min(done, half))
        self._make(group[half:], max(0, done - half))

    def _attempt(self, group: Sequence[Case]) -> bool:
        """Apply a group as one edit, and write down what became of it. False where it is refused and can be halved."""
        self._bench.stop.check()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", DisablingEditWarning)
                edit = self._bench.editor.apply([case.request for case in group])
        except REFUSALS as error:
            if len(group) > 1:
                return False
            self._write_down(group, None, [Made({}, reason_of(error))], [{}])
            return True
        plain = [plain_diagnostics(report) for report in edit.diagnostics]
        said = _by_request(edit, passed_on(caught))
        made = [Made(report, None, own) for (report, _), own in zip(plain, said, strict=True)]
        self._write_down(group, self._ledger.entries[-1], made, [seconds for _, seconds in plain])
        return True

    def _write_down(
        self, group: Sequence[Case], entry: Entry | None, made: Sequence[Made], parts: Sequence[dict[str, float]]
    ) -> None:
        self._diary.edited(self._ledger, entry, made)
        self.made += made
        now = time.perf_counter()
        for case, own in zip(group, parts, strict=True):
            self._diary.seconds({"case": case.id, **own, "edit": (now - self._clock) / len(group)})
        self._clock = now


def _by_request(edit: Edit, messages: Sequence[str]) -> list[list[str]]:
    """The warnings about each request."""
    return [[message for message in messages if f"request {request.id} " in message] for request in edit.requests]


def _records(bench: Bench, before: Baseline, made: Sequence[Made], *, texts: bool) -> list[dict[str, Any]]:
    """One record for each edit so far, as the model now stands; free texts only where they are wanted."""
    started = time.perf_counter()
    asked = bench if texts else dataclasses.replace(bench, generation_tokens=0, fluency_tokens=0)
    shared = {"perplexity": measured_perplexity(bench), "retention": retention(bench)}
    records = []
    for start in range(0, len(made), _TOGETHER):
        bench.stop.check()
        cases = bench.cases[start : min(start + _TOGETHER, len(made))]
        for place, (case, answers, drift) in enumerate(_asked(asked, cases), start):
            record = _record(place, case, made[place], before, answers)
            records.append({**record, "neighborhood_kl": drift, **shared})
    _diary(bench).seconds({"checkpoint": len(made), "evaluation": time.perf_counter() - started})
    return records


def _record(place: int, case: Case, made: Made, before: Baseline, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "place": place,
        "sequence": True,
        "case": case.id,
        "request": vars(case.request),
        "status": "failed" if made.reason else "ok",
        "reason": made.reason,
        "warnings": list(made.warnings),
        "diagnostics": dict(made.report),
        "perplexity_before": before.perplexity,
        "probes": [
            {**vars(probe), "before": was, "after": now}
            for probe, was, now in zip(case.probes, before.observed[case.id], answers, strict=True)
        ],
    }


def _asked(bench: Bench, cases: Sequence[Case]) -> Iterator[tuple[Case, list[dict[str, Any]], float | None]]:
    """What the model says to each case's probes as it stands, and how far its neighbours' predictions have moved."""
    probes = [probe for case in cases for probe in case.probes]
    scores = scores_with_next(bench, probes)
    answers = iter(observed(bench, probes, scores))
    with bench.editor.ledger.untouched():
        untouched = scores_with_next(bench, [probe for probe in probes if probe.kind in NEIGHBORHOOD])
    now = [scored.logprobs for scored in scores if scored.logprobs is not None]
    then = [scored.logprobs for scored in untouched if scored.logprobs is not None]
    moved = iter([next_token_kl(a, b) for a, b in zip(now, then, strict=True)])
    for case in cases:
        drifts = [next(moved) for probe in case.probes if probe.kind in NEIGHBORHOOD]
        yield case, [next(answers) for _ in case.probes], math.fsum(drifts) / len(drifts) if drifts else None


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
