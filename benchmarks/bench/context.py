"""What protocols share: what is edited and asked (`Bench`), what the untouched model says (`Baseline`), and how a model
is asked as it stands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from errata.benchmarks import ability
from errata.benchmarks.ability import AbilityConfig
from errata.benchmarks.bench.config import GuardConfig
from errata.benchmarks.bench.sequence_log import SequenceLog
from errata.benchmarks.datasets.json_records import Dropped
from errata.benchmarks.runs.run_folder import encodable
from errata.benchmarks.runs.stopping import Stop
from errata.editors.core.editor import Editor
from errata.editors.core.errors import DisablingEditWarning, LedgerError, NumericalError, RequestError
from errata.editors.core.progress import Progress, silent
from errata.evaluate import scoring
from errata.evaluate.collapse import perplexity
from errata.evaluate.generation import generate
from errata.evaluate.probes import Case, Probe
from errata.evaluate.scoring import ProbeScore, score

Write = Callable[[dict[str, Any], dict[str, float]], None]
Part = Callable[[Callable[[], Any]], Any]
# Cases that are scored together, and written down as one part. Of a sequence a distribution over the vocabulary is held
# for each of their neighbours.
TOGETHER = 256
NEIGHBORHOOD = ("neighborhood",)
# What one edit may end with: it is then recorded as refused, and the run goes on.
REFUSALS = (NumericalError, RequestError, LedgerError)


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
        confidence: Of the intervals at checkpoints.
        seed: Of their bootstrap.
        ability: What lm-eval is to ask of the untouched model and at checkpoints; None: nothing.
        guard: The limits within which edits have to keep the model; None: there are none.
        track: Told of every checkpoint of a sequence.
        diary: Where a sequence writes down what it has done.
        stop: Asked between edits whether to go on.
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
    confidence: float = 0.95
    seed: int = 0
    ability: AbilityConfig | None = None
    guard: GuardConfig | None = None
    track: Callable[[int, Mapping[str, Any]], object] = lambda *_: None
    diary: SequenceLog | None = None
    stop: Stop = field(default_factory=Stop)
    progress: Progress = silent

    @property
    def model(self) -> Any:
        return self.editor.model

    @property
    def tokenizer(self) -> Any:
        return self.editor.tokenizer


@dataclass(frozen=True)
class Baseline:
    """What the untouched model says to every probe: {case id: one observation a probe}, its perplexity, its scores in
    lm-eval's tasks, and the perplexity of the guard's texts."""

    observed: Mapping[str, list[dict[str, Any]]]
    perplexity: float | None
    ability: Mapping[str, Mapping[str, Any]] | None = None
    guard: float | None = None


def baseline(bench: Bench, part: Part = lambda make: make()) -> Baseline:
    """Ask the untouched model everything, once.

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


def fitting(bench: Bench) -> tuple[Bench, list[Dropped]]:
    """The bench with the cases that can be asked on its model, and the others: of those a probe has no tokens, or more
    than the model has positions for."""
    probes = [probe for case in bench.cases for probe in case.probes]
    new = [_new_tokens(bench, probe) for probe in probes]
    reasons = iter(scoring.unfit(bench.model, bench.tokenizer, probes, new))
    kept, dropped = [], []
    for case in bench.cases:
        found = [reason for reason in (next(reasons) for _ in case.probes) if reason is not None]
        if found:
            dropped.append(Dropped(case.id, "probes", found[0]))
        else:
            kept.append(case)
    return replace(bench, cases=kept), dropped


def _new_tokens(bench: Bench, probe: Probe) -> int:
    """How many tokens are written behind a probe's prompt, at most."""
    if probe.kind == "generation":
        return bench.fluency_tokens
    return 0 if probe.target is None else bench.generation_tokens


def passed_on(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Messages of the warnings that belong into records; the others are raised again for whoever listens."""
    for warning in caught:
        if not issubclass(warning.category, DisablingEditWarning):
            warnings.warn(str(warning.message), warning.category, stacklevel=3)
    return [str(warning.message) for warning in caught if issubclass(warning.category, DisablingEditWarning)]


def plain_diagnostics(diagnostics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """What the method reports of a request, seconds apart; of what JSON cannot hold, how Python writes it."""
    report = dict(diagnostics)
    seconds = {f"method_{name}": report.pop(name) for name in list(report) if "seconds" in name}
    return {name: _plain_value(value) for name, value in report.items()}, seconds


def _plain_value(value: Any) -> Any:
    try:
        return encodable(value)
    except TypeError:
        return repr(value)


def reason_of(error: Exception) -> str:
    """Why an edit was refused, in a record."""
    return f"{type(error).__name__}: {error}"


def scores_with_next(bench: Bench, probes: Sequence[Probe]) -> list[ProbeScore]:
    """Scores, with the next token's distribution behind the neighbours' prompts."""
    return score(bench.model, bench.tokenizer, probes, batch_tokens=bench.batch_tokens, next_token=NEIGHBORHOOD)


def measured_perplexity(bench: Bench, n_texts: int | None = None) -> float | None:
    """Of the model as it stands, on the first so many texts; None where there are no texts."""
    if not bench.texts:
        return None
    return perplexity(bench.model, bench.tokenizer, bench.texts[:n_texts], batch_tokens=bench.batch_tokens).value


def measured_ability(bench: Bench) -> dict[str, dict[str, Any]] | None:
    """Of the model as it stands, {task: its score as plain values}; None where no task is asked."""
    if bench.ability is None:
        return None
    return ability.plain(ability.measure(bench.model, bench.tokenizer, bench.ability))


def retention(bench: Bench, *, without: str | None = None) -> float | None:
    """The share of known facts that are answered, every token the likeliest; without those that mention a subject."""
    probes = [probe for probe in bench.known if without is None or without not in probe.prompt]
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
