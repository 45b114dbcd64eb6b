"""Asking a model whether facts hold: the facts, the questions about them, and what it writes behind their prompts.

results = check(edits, model, tokenizer, facts)      # a model that carries the edits of a folder
results = check_shipped(model, tokenizer, facts)     # a model that has them in its weights
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.benchmarks.facts.fact_file import StatedFact
from errata.editors.core.contexts.asking import AskedPrompt, read_on
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.request import EditRequest
from errata.editors.core.storage.edit_folder import Edits
from errata.editors.core.storage.merging import fact_key
from errata.editors.core.storage.readme_card import scores_in
from errata.evaluate.generation import Continuation, continuations
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import score

# How far the model is read where a question must stay as it is and its answer is not given.
COMPARED_TOKENS = 8
WRITTEN = 20  # facts behind whose prompts the model writes


@dataclass(frozen=True)
class WrittenTexts:
    """How the model goes on behind a prompt; `before` is what the untouched model wrote, None where it is not there."""

    before: str | None
    now: str


@dataclass(frozen=True)
class QuestionResult:
    """Whether a question about a fact is answered as it should be, and what was written, where that was asked for."""

    probe: Probe
    holds: bool
    texts: WrittenTexts | None = None


@dataclass(frozen=True)
class CheckResult:
    """Whether a fact holds, and what became of the questions about it.

    Attributes:
        probability: Of the answer: geometric mean over its tokens.
        holds: Whether every token of the answer is the likeliest one.
        held: Whether it did when it was last written down; None where it was not checked.
        paraphrases: Whether the fact holds in other words.
        unchanged: Whether answers that must stay have stayed.
        texts: What the model writes behind the prompt, of the first WRITTEN facts.
    """

    request: EditRequest
    probability: float
    holds: bool
    held: bool | None = None
    paraphrases: tuple[QuestionResult, ...] = ()
    unchanged: tuple[QuestionResult, ...] = ()
    texts: WrittenTexts | None = None

    @property
    def is_good(self) -> bool:
        """Whether the fact holds, in other words too, and nothing changed that must stay."""
        return self.holds and all(asked.holds for asked in (*self.paraphrases, *self.unchanged))


def check(edits: Edits, model: Any, tokenizer: Any, facts: Sequence[StatedFact] = ()) -> list[CheckResult]:
    """Whether the facts of edits hold on a model, as it stands.

    Args:
        edits: Their requests are asked, in the form that they were made in.
        model: Carries them, or does not.
        tokenizer: The model's.
        facts: What else to ask about them.
    """
    requests = [request for entry in edits.entries for request in entry.info.requests]
    return asked(Ledger.of(model), tokenizer, requests, facts, known_of(edits.notes))


def check_shipped(model: Any, tokenizer: Any, facts: Sequence[StatedFact], base: Any = None) -> list[CheckResult]:
    """Whether facts hold on a model that has them in its weights, such as an export.

    Args:
        model: As it stands.
        tokenizer: The model's.
        facts: They are asked with all of their questions.
        base: The untouched model, which is needed if a question that must stay has no answer.
    """
    return asked(Ledger.of(model), tokenizer, [fact.request for fact in facts], facts, {}, base)


def needs_base(facts: Sequence[StatedFact]) -> bool:
    """Whether a question that must stay has no answer, so that the untouched model has to be asked."""
    return any(probe.target is None for fact in facts for probe in fact.unchanged)


def known_of(notes: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What was written down of each fact."""
    return {id_: said for note in notes.values() for id_, said in scores_in(note).items()}


def asked(
    ledger: Ledger,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    facts: Sequence[StatedFact],
    known: Mapping[str, Mapping[str, Any]],
    base: Any = None,
    *,
    with_texts: bool = True,
) -> list[CheckResult]:
    """What the model says to requests and to the questions about them, all in one pass."""
    by_key = {fact_key(fact.request): fact for fact in facts}
    stated = [by_key.get(fact_key(request)) or StatedFact(request, 0) for request in requests]
    probes = [Probe("rewrite", r.text, r.target, r.target_true, r.join, r.chat) for r in requests]
    questions = [probe for fact in stated for probe in (*fact.paraphrases, *fact.unchanged)]
    scores = iter(
        score(ledger.model, tokenizer, [*probes, *(probe for probe in questions if probe.target is not None)])
    )
    scored = [next(scores) for _ in probes]
    written = [probe for probe in questions if probe.target is None]
    if with_texts:
        near = stated[:WRITTEN]
        written += [*probes[:WRITTEN], *(probe for fact in near for probe in (*fact.paraphrases, *fact.unchanged))]
    said = _said(ledger, tokenizer, list(dict.fromkeys(written)), base)
    texts = {probe: _texts(ledger, one, base) for probe, one in said.items()}
    found = []
    for request, fact, its, own in zip(requests, stated, scored, probes, strict=True):
        paraphrases, unchanged = (
            tuple(
                QuestionResult(
                    probe,
                    said[probe].stayed if probe.target is None else all(next(scores).target_correct),
                    texts.get(probe),
                )
                for probe in group
            )
            for group in (fact.paraphrases, fact.unchanged)
        )
        assert its.nll_target is not None, "a request has an answer"
        held = known.get(str(request.id), {}).get("holds")
        holds, probability = all(its.target_correct), math.exp(-its.nll_target)
        found.append(CheckResult(request, probability, holds, held, paraphrases, unchanged, texts.get(own)))
    return found


@dataclass(frozen=True)
class _Said:
    """How two models continue a prompt, for COMPARED_TOKENS tokens."""

    before: Continuation
    now: Continuation

    @property
    def stayed(self) -> bool:
        """Whether they do so with the same tokens."""
        return self.before.ids == self.now.ids


def _texts(ledger: Ledger, said: _Said, base: Any) -> WrittenTexts:
    """Return the texts; without the first one where no untouched model was asked."""
    return WrittenTexts(said.before.text if base is not None or ledger.entries else None, said.now.text)


def _said(ledger: Ledger, tokenizer: Any, probes: Sequence[Probe], base: Any) -> dict[Probe, _Said]:
    """Return how the model continues each prompt, and how the untouched model does (`base`, or the ledger's)."""
    if not probes:
        return {}
    model, prompts = ledger.model, [AskedPrompt(probe.prompt, probe.chat) for probe in probes]
    now = continuations(model, tokenizer, read_on(model, tokenizer, prompts), COMPARED_TOKENS)
    if base is None and not ledger.entries:
        return {probe: _Said(one, one) for probe, one in zip(probes, now, strict=True)}
    with ledger.untouched():
        other = model if base is None else base
        before = continuations(other, tokenizer, read_on(other, tokenizer, prompts), COMPARED_TOKENS)
    return {probe: _Said(other, one) for probe, one, other in zip(probes, now, before, strict=True)}
