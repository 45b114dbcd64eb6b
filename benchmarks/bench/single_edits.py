"""Single edits: each by itself on the untouched model, found together, scored together.

Edits are cut into groups by the index of a case. Those of a group are found in one computation. Each is then written to
the model for a moment: the ledger may refuse it, and the perplexity of plain text is measured, from the lowest edited
block on. After that the questions about all of them are asked together, while none is on the model: each row of a
batch runs through its own edit (editors/core/forward/row_patches.py). An edit that cannot stand beside others answers
while it is written.

A record says with how many edits its answers were computed (`together`), and why, if an edit had to be alone (`alone`).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from errata.benchmarks.bench import guard
from errata.benchmarks.bench.attempts import REFUSALS, case_diagnostics, check_ranks, passed_on, reason_of
from errata.benchmarks.bench.baseline import Baseline, token_budget
from errata.benchmarks.bench.context import Bench, Write
from errata.benchmarks.bench.measurements import (
    NEIGHBORHOOD,
    held_out_texts,
    known_of_others,
    observed,
    observed_together,
    retention,
    scores_with_next,
    share_kept,
)
from errata.benchmarks.runs import summary
from errata.editors.core import ranks
from errata.editors.core.edit import Edit
from errata.editors.core.errors import DisablingEditWarning
from errata.editors.core.forward.row_patches import UNTOUCHED, RowPatches, lowest_block, reason_alone
from errata.editors.core.model.batching import solve_with_halving
from errata.evaluate.collapse import HeldOutTexts, next_token_kl
from errata.evaluate.probes import Case, Probe, rounds
from errata.evaluate.scoring import score, score_edited


def single(bench: Bench, before: Baseline, done: Collection[str], write: Write) -> None:
    """Every edit by itself on the untouched model, scored, and undone before the next."""
    texts = held_out_texts(bench, token_budget(bench, before)) if bench.config.collapse.perplexity_each else None
    bench.progress(0, len(bench.cases), "edits")
    for start in range(0, len(bench.cases), bench.config.batch_size):
        group = bench.cases[start : start + bench.config.batch_size]
        # A group that was stopped half way is computed again as a whole, so that its bits are the same.
        if all(case.id in done for case in group):
            continue
        bench.stop.check()
        with bench.memory.phase("edits"):
            attempts = list(_attempts(bench, group))
        with bench.memory.phase("evaluation"):
            attempts = _answered(bench, before, texts, attempts)
        for place, attempt in enumerate(attempts, start):
            if attempt.case.id not in done:
                write(*_record(bench, before, place, attempt))
                bench.stop.advanced()
            bench.progress(place + 1, len(bench.cases), "edits")


@dataclass(frozen=True)
class EditedAnswers:
    """What an edited model says to a case's probes, and how far it has moved where it should not have.

    Attributes:
        observed: One observation per probe.
        drift: Divergence at each neighbour's prompt, in nats.
        retention: Share of the known facts that are kept.
        together: With how many edits they were computed.
    """

    observed: list[dict[str, Any]]
    drift: list[float]
    retention: float | None
    together: int = 1


@dataclass(frozen=True)
class Attempt:
    """An edit, or why there is none; and what was measured of it.

    Attributes:
        between: What the model said behind the first of edits in turn.
        by_itself: What it says to the probes of the last of edits in turn, made by itself, by their indices.
        damage: Perplexity, and what the guard says.
        alone: Why its answers were computed apart from the group's; None where they were not.
    """

    case: Case
    edit: Edit | None
    reason: str | None
    warnings: tuple[str, ...]
    seconds: float
    between: Sequence[dict[str, Any]] | None = None
    by_itself: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    evaluation: float = 0.0
    damage: dict[str, Any] = field(default_factory=dict)
    answers: EditedAnswers | None = None
    alone: str | None = None


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
            edits = [bench.editor.closed(edit) for edit in bench.editor.compute([case.request for case in group])]
    except REFUSALS as error:
        check_ranks(error)
        if len(group) > 1:
            for case in group:
                yield from _attempts(bench, [case])
        else:
            yield Attempt(group[0], None, reason_of(error), (), time.perf_counter() - started)
        return
    check_ranks(edits)
    messages = passed_on(caught)
    seconds = (time.perf_counter() - started) / len(group)
    for case, edit in zip(group, edits, strict=True):
        ids = [f"request {request.id} " for request in edit.requests]
        yield Attempt(case, edit, None, tuple(m for m in messages if any(name in m for name in ids)), seconds)


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
            edit = bench.editor.closed(bench.editor.compute_together(rounds([case]), ask))
    except REFUSALS as error:
        check_ranks(error)
        return Attempt(case, None, reason_of(error), (), time.perf_counter() - started)
    check_ranks([edit])
    spent = time.perf_counter() - started
    last = _last_by_itself(bench, case)
    return Attempt(case, edit, None, tuple(passed_on(caught)), spent, between=said or None, by_itself=last)


def _last_by_itself(bench: Bench, case: Case) -> dict[int, dict[str, Any]]:
    """Return what the model says to the probes about the case's last edit, made on the untouched model; nothing where
    there are none, or where that edit is refused."""
    places = [i for i, probe in enumerate(case.probes) if probe.kind == "later_edit"]
    if not places:
        return {}
    asked = [case.probes[i] for i in places]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DisablingEditWarning)
            edit = bench.editor.closed(bench.editor.compute_together([[case.requests[-1]]]))
            with edit.applied(), bench.memory.phase("evaluation"):
                scores = score(bench.model, bench.tokenizer, asked, batch_tokens=bench.batch_tokens)
    except REFUSALS:
        return {}
    return dict(zip(places, observed(bench, asked, scores, with_texts=False), strict=True))


def _answered(bench: Bench, before: Baseline, texts: HeldOutTexts | None, attempts: Sequence[Attempt]) -> list[Attempt]:
    """Measure every edit of a group: those that can be together in one batch, the others one by one."""
    if texts is not None:
        firsts = {lowest_block(bench.editor.architecture, a.edit.patch) for a in attempts if a.edit is not None}
        texts.keep_below(firsts.pop() if len(firsts) == 1 else None)
    is_group = sum(attempt.edit is not None for attempt in attempts) > 1

    def write_each(some: Sequence[Attempt]) -> list[dict[str, Any]]:
        return [_written(bench, before, texts, attempt, is_group=is_group) for attempt in some]

    measured = ranks.share_out(attempts, write_each)
    found = [replace(attempt, **changes) for attempt, changes in zip(attempts, measured, strict=True)]
    waiting = [i for i, one in enumerate(found) if one.edit is not None and one.reason is None and one.answers is None]
    started = time.perf_counter()
    if waiting:
        answers = ranks.share_out([found[i] for i in waiting], partial(_answers_of, bench))
        share = (time.perf_counter() - started) / len(waiting)
        for i, given in zip(waiting, answers, strict=True):
            found[i] = replace(found[i], answers=given, evaluation=found[i].evaluation + share)
    return found


def _answers_of(bench: Bench, attempts: Sequence[Attempt]) -> list[EditedAnswers]:
    return solve_with_halving([attempts], partial(_answers_together, bench), _advice)


def _advice(attempt: Attempt) -> str:
    return f"{attempt.case.id}: no memory to score its probes; lower scoring.batch_tokens"


def _written(
    bench: Bench, before: Baseline, texts: HeldOutTexts | None, attempt: Attempt, *, is_group: bool
) -> dict[str, Any]:
    """Measure an edit while it is on the model; its answers too, if it cannot be asked together with others. Return
    the fields of the attempt that this gives."""
    if attempt.edit is None:
        return {}
    started = time.perf_counter()
    case, alone, answers = attempt.case, None, None
    if is_group:
        alone = reason_alone(bench.model, attempt.edit.patch)
    is_alone = alone is not None or not is_group
    near = _neighbours(case) if is_alone else []
    untouched = [s.logprobs for s in scores_with_next(bench, near)] if near else []
    try:
        with attempt.edit.applied():
            verdict = guard.verdict(bench, before, without=case.subjects)
            damage = {
                "perplexity": None if texts is None else texts.perplexity().value,
                "guard": None if verdict is None else verdict.plain(),
            }
            if is_alone:
                answers = _answers_alone(bench, case, untouched)
    except REFUSALS as error:
        return {"reason": reason_of(error), "evaluation": time.perf_counter() - started}
    spent = time.perf_counter() - started
    return {"damage": damage, "answers": answers, "alone": alone, "evaluation": spent}


def _answers_alone(bench: Bench, case: Case, untouched: Sequence[Tensor | None]) -> EditedAnswers:
    """What the model says while it is edited."""
    scores = scores_with_next(bench, case.probes)
    drift = _drift([s.logprobs for s in scores if s.logprobs is not None], untouched)
    said = observed(bench, case.probes, scores)
    return EditedAnswers(said, drift, retention(bench, without=case.subjects))


def _answers_together(bench: Bench, group: Sequence[Attempt]) -> list[EditedAnswers]:
    """What the model says to the probes of several edits, each as its own edit makes it."""
    patches = RowPatches(bench.model, [attempt.edit.patch for attempt in group if attempt.edit is not None])
    asked: list[tuple[int, Sequence[Probe]]] = [(i, attempt.case.probes) for i, attempt in enumerate(group)]
    near = [(UNTOUCHED, _neighbours(attempt.case)) for attempt in group]
    *found, untouched = _scores(bench, patches, [*asked, (UNTOUCHED, [p for _, probes in near for p in probes])])
    said = observed_together(bench, patches, asked, found)
    kept = _retention_together(bench, patches, group)
    before = iter(untouched)
    answers = []
    for (_, probes), scores, own, share in zip(near, found, said, kept, strict=True):
        then = [next(before).logprobs for _ in probes]
        drift = _drift([s.logprobs for s in scores if s.logprobs is not None], then)
        answers.append(EditedAnswers(own, drift, share, len(group)))
    return answers


def _scores(bench: Bench, patches: RowPatches, asked: Sequence[tuple[int, Sequence[Probe]]]) -> list[Any]:
    return score_edited(patches, bench.tokenizer, asked, batch_tokens=bench.batch_tokens, next_token=NEIGHBORHOOD)


def _retention_together(bench: Bench, patches: RowPatches, group: Sequence[Attempt]) -> list[float | None]:
    """Return the share of known facts of other subjects that each edit keeps."""
    asked = [(i, known_of_others(bench, without=attempt.case.subjects)) for i, attempt in enumerate(group)]
    found = score_edited(patches, bench.tokenizer, asked, batch_tokens=bench.batch_tokens)
    return [share_kept(scores) for scores in found]


def _neighbours(case: Case) -> list[Probe]:
    return [probe for probe in case.probes if probe.kind in NEIGHBORHOOD]


def _drift(after: Sequence[Tensor], before: Sequence[Tensor | None]) -> list[float]:
    """Return how far each neighbour's prediction has moved, in nats."""
    then = [logprobs for logprobs in before if logprobs is not None]
    return [next_token_kl(a, b) for a, b in zip(after, then, strict=True)]


def _record(bench: Bench, before: Baseline, place: int, attempt: Attempt) -> tuple[dict[str, Any], dict[str, float]]:
    """Record and seconds of one edit. An edit that the ledger refuses has failed like one that was never found, and of
    either the damage is that of the untouched model: none."""
    case, answers = attempt.case, attempt.answers
    record: dict[str, Any] = {"place": place, "case": case.id, **case.asked()}
    status = "failed" if answers is None else "ok"
    record |= {"status": status, "reason": attempt.reason, "warnings": list(attempt.warnings)}
    record["diagnostics"], seconds = case_diagnostics(attempt.edit.diagnostics if attempt.edit else ({},))
    record |= {"perplexity_before": before.perplexity, **_damage(bench, before, attempt)}
    record |= summary.disabled(record)
    if answers is not None:
        record["together"] = answers.together
    if attempt.alone is not None:
        record["alone"] = attempt.alone
    record["probes"] = [
        {
            **probe.as_dict(),
            "before": was,
            "after": None if answers is None else answers.observed[i],
            **({} if attempt.between is None else {"between": attempt.between[i]}),
            **({"by_itself": attempt.by_itself[i]} if i in attempt.by_itself else {}),
        }
        for i, (probe, was) in enumerate(zip(case.probes, before.observed[case.id], strict=True))
    ]
    seconds |= {"edit": attempt.seconds, "evaluation": attempt.evaluation}
    return record, seconds


def _damage(bench: Bench, before: Baseline, attempt: Attempt) -> dict[str, Any]:
    """How far the model has moved; of an edit that was refused, what holds of the model as it was."""
    case, answers = attempt.case, attempt.answers
    if answers is None:
        return {
            "perplexity": before.perplexity if bench.config.collapse.perplexity_each else None,
            "neighborhood_kl": 0.0 if _neighbours(case) else None,
            "retention": retention(bench, without=case.subjects),
            "guard": None,
        }
    drift = math.fsum(answers.drift) / len(answers.drift) if answers.drift else None
    return {
        "perplexity": attempt.damage["perplexity"],
        "neighborhood_kl": drift,
        "retention": answers.retention,
        "guard": attempt.damage["guard"],
    }
