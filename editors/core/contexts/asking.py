"""What a model reads for a question: the question, or the facts on the model and then the question.

New Fact: The capital of Varland is Brast
Prompt: The capital of Varland is
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from errata.editors.core.contexts.context import Contexts, Fact, contexts_of
from errata.editors.core.contexts.similarity import similarities
from errata.editors.core.model.architecture import max_positions
from errata.editors.core.model.reading import ReadPrompt, as_read
from errata.editors.core.model.tokens import Tokenizer, prompt_ids

FACT, QUESTION = "New Fact: {}\n", "Prompt: {}"
# Tokens that are left for an answer: demonstrations that would need them are not read.
ROOM = 32


class AskedPrompt(NamedTuple):
    """A prompt as it was written, and how it is read (as of `as_read`)."""

    prompt: str
    chat: bool = False
    join: str | None = None


def read_on(model: nn.Module, tokenizer: Tokenizer, questions: Sequence[AskedPrompt]) -> list[ReadPrompt]:
    """Return what a model reads for each question, with the facts that edits put before it.

    Raises:
        RequestError: As of `as_read`.
    """
    reader = PromptReader(tokenizer, model, questions)
    return [reader.read(question) for question in questions]


class PromptReader:
    """Reads prompts behind the facts that a model carries now, each distinct one once.

    Args:
        tokenizer: The tokenizer.
        model: The model; None: prompts are read bare.
        questions: Prompts that will be read, and are compared with the facts together.
    """

    def __init__(self, tokenizer: Tokenizer, model: nn.Module | None, questions: Sequence[AskedPrompt] = ()) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.contexts = None if model is None else contexts_of(model)
        self._facts: dict[str, tuple[Fact, ...]] = {}
        self._find([question.prompt for question in questions])

    def read(self, question: AskedPrompt) -> ReadPrompt:
        """Return the text that the model reads. Errors are those of `as_read`."""
        if self.contexts is None or self.model is None:
            return as_read(self.tokenizer, question.prompt, chat=question.chat, join=question.join)
        self._find([question.prompt])
        facts, is_last = self._facts[question.prompt], self.contexts.retrieval.nearest_last
        return _read(self.model, self.tokenizer, question, facts, nearest_last=is_last)

    def _find(self, prompts: Sequence[str]) -> None:
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._facts))
        if missing and self.contexts is not None and self.model is not None:
            found = _retrieve(self.contexts, self.model, self.tokenizer, missing)
            self._facts |= zip(missing, found, strict=True)


def stated(facts: Sequence[Fact], demonstrations: Sequence[str], question: str) -> str:
    """Return demonstrations, facts and question as one text; the question alone if there is no fact."""
    if not facts:
        return question
    return "".join([*demonstrations, *(FACT.format(fact.statement) for fact in facts), QUESTION.format(question)])


def _retrieve(
    contexts: Contexts, model: nn.Module, tokenizer: Tokenizer, questions: Sequence[str]
) -> list[tuple[Fact, ...]]:
    """Return the facts that each question reads, the most similar one last."""
    rule = contexts.retrieval
    facts = contexts.records[-1].facts if rule.retrieve == "own" else contexts.facts
    count = len(facts) if rule.retrieve == "own" else rule.facts
    if rule.threshold is None and len(facts) <= count == 1:
        return [facts] * len(questions)
    rows = similarities(
        rule.encoder,
        [fact.statement for fact in facts],
        questions,
        model=model,
        tokenizer=tokenizer,
        sentence_encoder=rule.sentence_encoder,
    )
    chosen = []
    for row in rows:
        # Of equally similar facts, the later one is nearer.
        order = sorted(range(len(facts)), key=lambda i, row=row: (row[i], i))[-count:]
        near = [i for i in order if rule.threshold is None or row[i] >= rule.threshold]
        chosen.append(tuple(facts[i] for i in near))
    return chosen


def _read(
    model: nn.Module, tokenizer: Tokenizer, question: AskedPrompt, facts: Sequence[Fact], *, nearest_last: bool
) -> ReadPrompt:
    """Return the text of a question behind its facts, with as many demonstrations as the model has positions for."""
    demonstrations = list(facts[-1].demonstrations) if facts else []
    limit = max_positions(model)
    while True:
        text = stated(facts, demonstrations, question.prompt)
        read = as_read(tokenizer, text, chat=question.chat, join=question.join)
        if not demonstrations or limit is None or len(prompt_ids(tokenizer, read.text)) + ROOM <= limit:
            return read
        demonstrations.pop(0 if nearest_last else -1)
