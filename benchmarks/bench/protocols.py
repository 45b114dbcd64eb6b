"""How edits follow each other, and what is recorded of each.

A protocol takes a `Bench` (what is edited and asked), the `Baseline` (what the untouched model says) and the cases that
an earlier, interrupted run has recorded; it hands every new record to `write` as soon as it is complete.

    single      every edit by itself on the untouched model, scored, undone
    sequential  edits on top of each other, in batches; all edits so far are scored at checkpoints (sequences.py)
    batch       all edits at once, scored

Another package adds a protocol as an `EditProtocol` (edit_protocol.py).

Records depend on nothing but the configuration: batches are cut by the index of a case, so that a resumed run computes
the same batches as one that was never killed. Seconds are written separately, since they never repeat.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from errata.benchmarks.bench import guard
from errata.benchmarks.bench.attempts import REFUSALS, case_diagnostics, passed_on, reason_of
from errata.benchmarks.bench.baseline import Baseline
from errata.benchmarks.bench.context import Bench, Write
from errata.benchmarks.bench.edit_protocol import ADDED
from errata.benchmarks.bench.measurements import (
    NEIGHBORHOOD,
    measured_perplexity,
    observed,
    retention,
    scores_with_next,
)
from errata.benchmarks.bench.sequences import batch, sequential
from errata.benchmarks.runs import summary
from errata.editors.core.edit import Edit
from errata.editors.core.errors import DisablingEditWarning
from errata.evaluate.collapse import next_token_kl
from errata.evaluate.probes import Case, rounds
from errata.evaluate.scoring import score

if TYPE_CHECKING:
    from errata.benchmarks.bench.edit_protocol import Run


def single(bench: Bench, before: Baseline, done: Collection[str], write: Write) -> None:
    """Every edit by itself on the untouched model, scored, and undone before the next."""
    bench.progress(0, len(bench.cases), "edits")
    for start in range(0, len(bench.cases), bench.config.batch_size):
        group = bench.cases[start : start + bench.config.batch_size]
        if all(case.id in done for case in group):
            continue
        bench.stop.check()
        probes = [probe for case in group for probe in case.probes if probe.kind in NEIGHBORHOOD]
        untouched = iter([s.logprobs for s in scores_with_next(bench, probes) if s.logprobs is not None])
        for place, (case, attempt) in enumerate(zip(group, _attempts(bench, group), strict=True), start):
            bench.stop.check()
            near = [next(untouched) for probe in case.probes if probe.kind in NEIGHBORHOOD]
            if case.id not in done:
                write(*_single_record(bench, before, place, case, attempt, near))
                bench.stop.advanced()
            bench.progress(place + 1, len(bench.cases), "edits")


@dataclass(frozen=True)
class Attempt:
    """The edit of a case, or why there is none. `between`: what the model said behind the first of edits in turn."""

    edit: Edit | None
    reason: str | None
    warnings: tuple[str, ...]
    seconds: float
    between: Sequence[dict[str, Any]] | None = None


def _attempts(bench: Bench, group: Sequence[Case]) -> Iterator[Attempt]:
    """Compute the group's edits together; where one of them is refused, each by itself, to find out which. A case of
    several requests is one edit, computed by itself."""
    if any(case.further for case in group):
        for case in group:
            yield _joint_attempt(bench, case) if case.further else next(_attempts(bench, [case]))
        return
    started = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DisablingEditWarning)
            edits = bench.editor.compute([case.request for case in group])
    except REFUSALS as error:
        if len(group) > 1:
            for case in group:
                yield from _attempts(bench, [case])
        else:
            yield Attempt(None, reason_of(error), (), time.perf_counter() - started)
        return
    messages = passed_on(caught)
    seconds = (time.perf_counter() - started) / len(group)
    for edit in edits:
        ids = [f"request {request.id} " for request in edit.requests]
        yield Attempt(edit, None, tuple(m for m in messages if any(name in m for name in ids)), seconds)


def _joint_attempt(bench: Bench, case: Case) -> Attempt:
    """Compute the edit of a case of several requests, together or in turn."""
    started, said = time.perf_counter(), []

    def ask() -> None:
        if not said:
            scores = score(bench.model, bench.tokenizer, case.probes, batch_tokens=bench.batch_tokens)
            said.extend(observed(bench, case.probes, scores, with_texts=False))

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DisablingEditWarning)
            edit = bench.editor.compute_together(rounds([case]), ask)
    except REFUSALS as error:
        return Attempt(None, reason_of(error), (), time.perf_counter() - started)
    return Attempt(edit, None, tuple(passed_on(caught)), time.perf_counter() - started, said or None)


def _single_record(
    bench: Bench, before: Baseline, place: int, case: Case, attempt: Attempt, untouched: Sequence[Tensor]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Record and seconds of one edit. An edit that the ledger refuses has failed like one that was never found, and of
    either the damage is that of the untouched model: none."""
    started = time.perf_counter()
    record: dict[str, Any] = {"place": place, "case": case.id, **case.asked()}
    after, damage, reason = None, None, attempt.reason
    if attempt.edit is not None:
        try:
            with attempt.edit.applied():
                after, damage = _after(bench, before, case, untouched)
        except REFUSALS as error:
            reason = reason_of(error)
    if damage is None:
        damage = _no_damage(bench, before, case)
    record |= {"status": "failed" if after is None else "ok", "reason": reason, "warnings": list(attempt.warnings)}
    record["diagnostics"], seconds = case_diagnostics(attempt.edit.diagnostics if attempt.edit else ({},))
    record |= {"perplexity_before": before.perplexity, **damage}
    record |= summary.disabled(record)
    record["probes"] = [
        {
            **probe.as_dict(),
            "before": was,
            "after": None if after is None else after[i],
            **({} if attempt.between is None else {"between": attempt.between[i]}),
        }
        for i, (probe, was) in enumerate(zip(case.probes, before.observed[case.id], strict=True))
    ]
    seconds |= {"edit": attempt.seconds, "evaluation": time.perf_counter() - started}
    return record, seconds


def _after(
    bench: Bench, before: Baseline, case: Case, untouched: Sequence[Tensor]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the model says while it is edited, and how far it has moved where it should not have."""
    scores = scores_with_next(bench, case.probes)
    now = [s.logprobs for s in scores if s.logprobs is not None]
    drift = [next_token_kl(after, then) for after, then in zip(now, untouched, strict=True)]
    verdict = guard.verdict(bench, before, without=case.subjects)
    damage = {
        "perplexity": measured_perplexity(bench) if bench.config.collapse.perplexity_each else None,
        "neighborhood_kl": math.fsum(drift) / len(drift) if drift else None,
        "retention": retention(bench, without=case.subjects),
        "guard": None if verdict is None else verdict.plain(),
    }
    return observed(bench, case.probes, scores), damage


def _no_damage(bench: Bench, before: Baseline, case: Case) -> dict[str, Any]:
    """Damage as `_after` has it, of the model as it was."""
    return {
        "perplexity": before.perplexity if bench.config.collapse.perplexity_each else None,
        "neighborhood_kl": 0.0 if any(probe.kind in NEIGHBORHOOD for probe in case.probes) else None,
        "retention": retention(bench, without=case.subjects),
        "guard": None,
    }


PROTOCOLS: Mapping[str, Run] = MappingProxyType({"single": single, "sequential": sequential, "batch": batch})


def protocol(name: str) -> Run:
    """Return the function that carries out a protocol of this package or of another.

    Raises:
        ConfigError: There is no such protocol (it names the nearest), or another package's cannot be imported.
    """
    return PROTOCOLS[name] if name in PROTOCOLS else ADDED.load(name).run


def order_of_edits(name: str, cases: Sequence[Case], records: Sequence[Mapping[str, Any]]) -> Sequence[Case]:
    """Return the cases in the order of their edits. Another package's protocol may edit them in any order.

    Args:
        name: The protocol.
        cases: In the order of the dataset.
        records: Of the edits that were made.
    """
    if name in PROTOCOLS:
        return cases
    made = {record["case"] for record in records}
    return sorted(cases, key=lambda case: case.id not in made)
