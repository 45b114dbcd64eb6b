"""How edits follow each other, and what is recorded of each.

A protocol takes a `Bench` (what is edited and asked), the `Baseline` (what the untouched model says) and the cases that
an earlier, interrupted run has recorded; it hands every new record to `write` as soon as it is complete.

    single      every edit by itself on the untouched model, scored, undone
    sequential  edits on top of each other, in batches; all edits so far are scored at checkpoints (sequences.py)
    batch       all edits at once, scored

Records depend on nothing but the configuration: batches are cut by the cases' places, so that a run that was killed and
went on computes the very batches of one that was not. Seconds are written apart, since they never repeat.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from errata.editors.core.editor import Edit, Editor
from errata.editors.core.errors import DisablingEditWarning, NumericalError, RequestError
from errata.editors.core.progress import Progress, silent
from errata.evaluate.collapse import next_token_kl, perplexity
from errata.evaluate.generation import generate
from errata.evaluate.probes import Case, Probe
from errata.evaluate.scoring import ProbeScore, score

Write = Callable[[dict[str, Any], dict[str, float]], None]
NEIGHBORHOOD = ("neighborhood",)


@dataclass(frozen=True)
class Bench:
    """What a protocol works with.

    Attributes:
        editor: The method, on its model.
        cases: In the order of the edits.
        texts: Held-out texts for perplexity; none: leave it out.
        known: Facts that the untouched model knows; those of other subjects are asked again after every edit.
        batch_size: Edits computed together.
        batch_tokens: Tokens of a scoring pass.
        generation_tokens: Longest free answer; 0: leave free generation out.
        fluency_tokens: Length of the text behind an open prompt; 0: leave fluency out.
        perplexity_each: Whether perplexity is measured after every edit.
        eval_every: Edits between checkpoints of a sequence; None: only at its end.
        checkpoint: Given all checkpoints of a sequence so far, whenever there is a new one.
        progress: Told of every edit that is done.
    """

    editor: Editor
    cases: Sequence[Case]
    texts: Sequence[str] = ()
    known: Sequence[Probe] = ()
    batch_size: int = 16
    batch_tokens: int = 8192
    generation_tokens: int = 0
    fluency_tokens: int = 0
    perplexity_each: bool = True
    eval_every: int | None = None
    checkpoint: Callable[[Sequence[dict[str, Any]]], object] = lambda _: None
    progress: Progress = silent

    @property
    def model(self) -> Any:
        return self.editor.model

    @property
    def tokenizer(self) -> Any:
        return self.editor.tokenizer


@dataclass(frozen=True)
class Baseline:
    """What the untouched model says to every probe: {case id: one observation a probe}, and its perplexity."""

    observed: Mapping[str, list[dict[str, Any]]]
    perplexity: float | None
    seconds: float


def baseline(bench: Bench) -> Baseline:
    """Ask the untouched model everything, once: a prompt that many cases share is run once."""
    started = time.perf_counter()
    probes = [probe for case in bench.cases for probe in case.probes]
    scores = score(bench.model, bench.tokenizer, probes, batch_tokens=bench.batch_tokens)
    answers = iter(observed(bench, probes, scores))
    by_case = {case.id: [next(answers) for _ in case.probes] for case in bench.cases}
    return Baseline(by_case, measured_perplexity(bench), time.perf_counter() - started)


def single(bench: Bench, before: Baseline, done: Collection[str], write: Write) -> None:
    """Every edit by itself on the untouched model, scored, and undone before the next."""
    for start in range(0, len(bench.cases), bench.batch_size):
        batch = bench.cases[start : start + bench.batch_size]
        if all(case.id in done for case in batch):
            continue
        probes = [probe for case in batch for probe in case.probes if probe.kind in NEIGHBORHOOD]
        untouched = iter([s.logprobs for s in scores_with_next(bench, probes) if s.logprobs is not None])
        for place, (case, attempt) in enumerate(zip(batch, _attempts(bench, batch), strict=True), start):
            near = [next(untouched) for probe in case.probes if probe.kind in NEIGHBORHOOD]
            if case.id not in done:
                write(*_single_record(bench, before, place, case, attempt, near))
            bench.progress(place + 1, len(bench.cases), "edits")


@dataclass(frozen=True)
class Attempt:
    """An edit, or why there is none."""

    edit: Edit | None
    reason: str | None
    warnings: tuple[str, ...]
    seconds: float


def _attempts(bench: Bench, batch: Sequence[Case]) -> Iterator[Attempt]:
    """Compute the batch's edits together; where one of them is refused, each by itself, to find out which."""
    started = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DisablingEditWarning)
            edits = bench.editor.compute([case.request for case in batch])
    except (NumericalError, RequestError) as error:
        if len(batch) > 1:
            for case in batch:
                yield from _attempts(bench, [case])
        else:
            reason = f"{type(error).__name__}: {error}"
            yield Attempt(None, reason, (), time.perf_counter() - started)
        return
    messages = passed_on(caught)
    seconds = (time.perf_counter() - started) / len(batch)
    for edit in edits:
        ids = [f"request {request.id} " for request in edit.requests]
        yield Attempt(edit, None, tuple(m for m in messages if any(name in m for name in ids)), seconds)


def passed_on(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Messages of the warnings that belong into records; the others are raised again for whoever listens."""
    for warning in caught:
        if not issubclass(warning.category, DisablingEditWarning):
            warnings.warn(str(warning.message), warning.category, stacklevel=3)
    return [str(warning.message) for warning in caught if issubclass(warning.category, DisablingEditWarning)]


def _single_record(
    bench: Bench, before: Baseline, place: int, case: Case, attempt: Attempt, untouched: Sequence[Tensor]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Record and seconds of one edit. An edit that the ledger refuses has failed like one that was never found."""
    started = time.perf_counter()
    record: dict[str, Any] = {"place": place, "case": case.id, "request": vars(case.request)}
    after, damage, reason = None, {}, attempt.reason
    if attempt.edit is not None:
        try:
            with attempt.edit.applied():
                after, damage = _after(bench, case, untouched)
        except NumericalError as error:
            reason = f"{type(error).__name__}: {error}"
    record |= {"status": "failed" if after is None else "ok", "reason": reason, "warnings": list(attempt.warnings)}
    record["diagnostics"], seconds = plain_diagnostics(attempt.edit.diagnostics[0] if attempt.edit else {})
    record["perplexity_before"] = before.perplexity
    record |= {"perplexity": None, "neighborhood_kl": None, "retention": None, **damage}
    record["probes"] = [
        {**vars(probe), "before": was, "after": None if after is None else after[i]}
        for i, (probe, was) in enumerate(zip(case.probes, before.observed[case.id], strict=True))
    ]
    seconds |= {"edit": attempt.seconds, "evaluation": time.perf_counter() - started}
    return record, seconds


def _after(bench: Bench, case: Case, untouched: Sequence[Tensor]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the model says while it is edited, and how far it has moved where it should not have."""
    scores = scores_with_next(bench, case.probes)
    now = [s.logprobs for s in scores if s.logprobs is not None]
    drift = [next_token_kl(after, before) for after, before in zip(now, untouched, strict=True)]
    damage = {
        "perplexity": measured_perplexity(bench) if bench.perplexity_each else None,
        "neighborhood_kl": math.fsum(drift) / len(drift) if drift else None,
        "retention": _retention(bench, case.request.subject),
    }
    return observed(bench, case.probes, scores), damage


def plain_diagnostics(diagnostics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """What the method reports of a request, seconds apart."""
    report = dict(diagnostics)
    seconds = {f"method_{name}": report.pop(name) for name in list(report) if "seconds" in name}
    return report, seconds


def scores_with_next(bench: Bench, probes: Sequence[Probe]) -> list[ProbeScore]:
    """Scores, with the next token's distribution behind the neighbours' prompts."""
    return score(bench.model, bench.tokenizer, probes, batch_tokens=bench.batch_tokens, next_token=NEIGHBORHOOD)


def measured_perplexity(bench: Bench) -> float | None:
    if not bench.texts:
        return None
    return perplexity(bench.model, bench.tokenizer, bench.texts, batch_tokens=bench.batch_tokens).value


def _retention(bench: Bench, subject: str) -> float | None:
    """The share of known facts of other subjects that are still answered, every token the likeliest."""
    probes = [probe for probe in bench.known if subject not in probe.prompt]
    if not probes:
        return None
    scores = score(bench.model, bench.tokenizer, probes, batch_tokens=bench.batch_tokens)
    return sum(all(s.target_correct) for s in scores) / len(probes)


def observed(bench: Bench, probes: Sequence[Probe], scores: Sequence[ProbeScore]) -> list[dict[str, Any]]:
    """Scores and free texts of the model as it stands, as plain values, one dict a probe."""
    texts = _free_texts(bench, probes)
    return [{**_plain(s), "text": text} for s, text in zip(scores, texts, strict=True)]


def _free_texts(bench: Bench, probes: Sequence[Probe]) -> list[str | None]:
    """What the model writes behind each probe's prompt: a longer text where fluency is asked for, else an answer. One
    prompt can be an open one of one case and a neighbour of another, so that the two are kept apart."""
    is_open = [probe.kind == "generation" for probe in probes]
    open_ended = [probe.prompt for probe, is_one in zip(probes, is_open, strict=True) if is_one]
    asked = [p.prompt for p, is_one in zip(probes, is_open, strict=True) if not is_one and p.target is not None]
    texts = _written(bench, open_ended, bench.fluency_tokens)
    answers = _written(bench, asked, bench.generation_tokens)
    return [(texts if is_one else answers).get(p.prompt) for p, is_one in zip(probes, is_open, strict=True)]


def _written(bench: Bench, prompts: Sequence[str], length: int) -> dict[str, str]:
    """What the model writes behind each of the prompts, `length` tokens at most; nothing for a length of 0."""
    distinct = list(dict.fromkeys(prompts))
    if not distinct or not length:
        return {}
    texts = generate(bench.model, bench.tokenizer, distinct, length, batch_tokens=bench.batch_tokens)
    return dict(zip(distinct, texts, strict=True))


def _plain(scored: ProbeScore) -> dict[str, Any]:
    return {
        "nll_target": scored.nll_target,
        "nll_other": scored.nll_other,
        "target_correct": list(scored.target_correct),
        "other_correct": list(scored.other_correct),
        "target_choice": list(scored.target_choice),
    }
