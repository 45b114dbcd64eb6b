"""Another subject for a fact: with as many tokens, and an answer of its own that the model prefers by as much.

That is symmetric token replacement on facts of a dataset. A donor is a fact of the same relation with another answer.
In the fact's own prompt, it must leave all other tokens as they are. Each prompt must prefer its own answer over the
other's by a margin of logits. A few donors are tried in a random order that is fixed by the seed and the fact.

Source: Zhang and Nanda 2023 for the replacement; the margin and the number of donors are ours.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.errors import RequestError
from errata.editors.core.locating.corruption import Swap
from errata.editors.core.locating.tracing import LocatedPrompt, locate, swapped
from errata.editors.core.model.activations import run_base
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.tokens import Tokenizer, answer_ids, right_padded

MARGIN, TRIES = 1.0, 5


@dataclass(frozen=True)
class TraceableFact:
    """A fact that can be traced.

    Attributes:
        prompt: With `{}` for the subject, or with the subject itself.
        subject: What it is about.
        answer: The answer that the model should know; None: what it says.
        relation: Donors come from facts of the same relation.
        id: Its name in results.
        chat: Whether the prompt is a message to an instruct model.
    """

    prompt: str
    subject: str
    answer: str | None = None
    relation: str | None = None
    id: str = ""
    chat: bool = False


@dataclass(frozen=True)
class AskedFact:
    """A fact with what the model says to it.

    Attributes:
        fact: The fact.
        located: Its prompt.
        logits: (V,) of the next token.
        answer: Id of the answer's first token.
        said: Id of the token that the model finds likeliest.
    """

    fact: TraceableFact
    located: LocatedPrompt
    logits: Tensor
    answer: int
    said: int


def ask(architecture: Architecture, tokenizer: Tokenizer, fact: TraceableFact) -> AskedFact:
    """Ask the model for a fact.

    Raises:
        RequestError: the subject is not in the prompt, or the answer tokenises to nothing.
    """
    located = locate(tokenizer, fact.prompt, fact.subject, chat=fact.chat)
    architecture.check_length(len(located.ids), f"{len(located.ids)} tokens for the prompt", fact.id or None)
    (logits,) = _next_logits(architecture, [located.ids])
    said = int(logits.argmax())
    return AskedFact(fact, located, logits, _first(tokenizer, located, fact.answer, logits), said)


def find_donor(
    architecture: Architecture,
    tokenizer: Tokenizer,
    asked: AskedFact,
    facts: Sequence[TraceableFact],
    *,
    seed: int = 0,
    margin: float = MARGIN,
    tries: int = TRIES,
) -> Swap | None:
    """Return another subject for a fact, with the answer that is right for it; None if there is none.

    Args:
        architecture: The model.
        tokenizer: Its tokenizer.
        asked: The fact.
        facts: Where donors come from; only those of the same relation are tried.
        seed: Seed of the order.
        margin: By how many logits each prompt must prefer its own answer over the other's.
        tries: Donors that the model is asked for.
    """
    found = list(_fitting(tokenizer, asked, facts, seed, tries))
    if not found:
        return None
    logits = _next_logits(architecture, [located.ids for _, located in found])
    for (donor, located), own in zip(found, logits, strict=True):
        other = _first(tokenizer, located, donor.answer, own)
        prefers = float(asked.logits[asked.answer] - asked.logits[other])
        reverse = float(own[other] - own[asked.answer])
        if other != asked.answer and min(prefers, reverse) >= margin:
            return Swap(donor.subject, donor.answer or tokenizer.decode([other]))
    return None


def _fitting(
    tokenizer: Tokenizer, asked: AskedFact, facts: Sequence[TraceableFact], seed: int, tries: int
) -> Iterator[tuple[TraceableFact, LocatedPrompt]]:
    """Yield the first donors whose prompts differ in the subject's tokens alone."""
    fact = asked.fact
    pool = [other for other in facts if other.relation == fact.relation and other.subject != fact.subject]
    answers = {None, fact.answer.strip() if fact.answer else None}
    pool = [other for other in pool if other.answer is None or other.answer.strip() not in answers]
    random.Random(f"{seed} {fact.prompt} {fact.subject}").shuffle(pool)
    subjects: set[str] = set()
    for other in pool:
        if other.subject in subjects:
            continue
        subjects.add(other.subject)
        try:
            yield other, swapped(tokenizer, asked.located, other.subject, chat=fact.chat)
        except RequestError:
            subjects.discard(other.subject)
            continue
        if len(subjects) == tries:
            return


def _first(tokenizer: Tokenizer, located: LocatedPrompt, answer: str | None, logits: Tensor) -> int:
    """Return the id of an answer's first token; without an answer, what the model says."""
    return int(logits.argmax()) if answer is None else answer_ids(tokenizer, located.text, answer, located.join)[0]


@torch.no_grad()
def _next_logits(architecture: Architecture, rows: Sequence[Sequence[int]]) -> list[Any]:
    """Return the logits (V,) of the next token for rows of one length."""
    with evaluating(architecture.model):
        hidden = run_base(architecture, right_padded(rows, 0).to(architecture.device))
        return list(architecture.logits(hidden[:, -1]).double())
