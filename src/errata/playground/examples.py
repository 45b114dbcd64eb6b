"""Facts to try in the playground, and the questions to ask about a fact.

A testbed provides both from its own world. For any other model there are a few well-known facts, and the questions are
what the user types.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.editors.core.request import SLOT, EditRequest
from errata.evaluate.probes import Probe

MAX_ASKED = 12  # questions of one kind that the page can show


@dataclass(frozen=True)
class ExampleFact:
    """The contents of the page's fields.

    Attributes:
        prompt: The prompt of an EditRequest.
        subject: Its subject.
        target: Its target.
        wordings: Other prompts to ask, with or without `{}` for the subject.
        others: Other subjects to ask the edit's own prompt about.
        chat: Whether the prompts are messages to an instruct model.
        join: What stands between prompt and answer, as `EditRequest` takes it.
    """

    prompt: str
    subject: str
    target: str
    wordings: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    chat: bool = False
    join: str | None = None

    def request(self) -> EditRequest:
        """Return the edit that the fields ask for. White space around a prompt is the user's, and stays.

        Raises:
            RequestError: A field is empty, or the subject is not in the prompt.
        """
        subject, target = self.subject.strip(), self.target.strip()
        return EditRequest(self.prompt, subject, target, join=self.join, chat=self.chat)


COMMON = (
    ExampleFact(
        "The mother tongue of {} is",
        "Danielle Darrieux",
        "English",
        ("{} spoke the language", "Where {} is from, people speak"),
        ("Jean Gabin", "Édith Piaf", "Marlene Dietrich"),
    ),
    ExampleFact(
        "The Eiffel Tower is in the city of",
        "The Eiffel Tower",
        "Rome",
        ("To visit {}, one travels to", "The mayor who looks after {} is the mayor of"),
        ("The Louvre", "The Colosseum", "Big Ben"),
    ),
    ExampleFact(
        "{} plays the instrument",
        "Miles Davis",
        "violin",
        ("On stage, {} is seen with his", "{} is famous for playing the"),
        ("Louis Armstrong", "John Coltrane", "Yo-Yo Ma"),
    ),
)

COMMON_IN_CHAT = (
    ExampleFact(
        "What is the mother tongue of {}?",
        "Danielle Darrieux",
        "English",
        ("Which language did {} speak at home?",),
        ("Jean Gabin", "Marlene Dietrich"),
        chat=True,
    ),
    ExampleFact(
        "In which city is {}?",
        "the Eiffel Tower",
        "Rome",
        ("Which city do I travel to if I want to see {}?",),
        ("the Louvre", "Big Ben"),
        chat=True,
    ),
)


def examples(testbed: Path | None, *, chat: bool = False) -> list[ExampleFact]:
    """Return facts to try.

    For a testbed it is one fact per relation, each about another subject. Its prompt is no question, and does not begin
    with the subject, since some methods break the model there.

    Args:
        testbed: The folder of a testbed; None for any other model, which gets `COMMON`.
        chat: Whether the model has a chat template. `COMMON_IN_CHAT` then comes first.
    """
    if testbed is None:
        return [*(COMMON_IN_CHAT if chat else ()), *COMMON]
    from errata.benchmarks.datasets import world

    chosen: dict[str, EditRequest] = {}
    subjects: set[str] = set()
    for case in world.cases(testbed, split="test"):
        relation, request = case.id.partition("/")[0], case.request
        is_new = relation not in chosen and request.subject not in subjects
        if is_new and request.subject_span[0] > 0 and "?" not in request.text:
            chosen[relation] = request
            subjects.add(request.given_subject)
    return [ExampleFact(request.prompt, request.given_subject, request.target) for request in chosen.values()]


def questions(fact: ExampleFact, request: EditRequest, testbed: Path | None) -> tuple[Probe, ...]:
    """Return what to ask about an edit: its prompt, other wordings of it, and its prompt about other subjects.

    The wordings and subjects of the fact are used where it has any. A testbed fills in those that are missing, if the
    prompt is one of its own wordings. Probes about other subjects have no target: their answer has held if it is the
    answer of the untouched model.

    Args:
        fact: The contents of the fields.
        request: The edit.
        testbed: The folder of a testbed; None for any other model.
    """
    before, after = request.template
    wordings = [text.replace(SLOT, request.given_subject) for text in _lines(fact.wordings)]
    others = [f"{before}{other.strip()}{after}" for other in _lines(fact.others)]
    if testbed is not None and not (wordings and others):
        reworded, beside = _known(request, testbed)
        wordings, others = wordings or reworded, others or [f"{before}{subject}{after}" for subject in beside]
    form: Any = {"join": request.join, "chat": request.chat}
    return (
        Probe("rewrite", request.text, request.target, **form),
        *(Probe("paraphrase", prompt, request.target, **form) for prompt in wordings[:MAX_ASKED]),
        *(Probe("neighborhood", prompt, **form) for prompt in others[:MAX_ASKED]),
    )


def _lines(lines: Sequence[str]) -> list[str]:
    """Return the lines that are not blank, each once, as they were typed."""
    return list(dict.fromkeys(line for line in lines if line.strip()))


def _known(request: EditRequest, testbed: Path) -> tuple[list[str], list[str]]:
    """Return wordings and other subjects that the testbed knows for a request.

    The wordings are the held-out ones of the request's relation, as a bench asks them. Subjects with the same true
    answer come first. Both lists are empty where the prompt is no wording of the testbed.
    """
    from errata.benchmarks.datasets.world import NEIGHBORS, Known
    from errata.benchmarks.testbed.wording import behind_a_sentence

    known, template = Known.of(testbed), SLOT.join(request.template)
    for relation in known.world.relations.values():
        if template in (*relation.trained, *relation.held_out):
            asked = [t.replace(SLOT, request.given_subject) for t in relation.held_out if t != template]
            same = [fact for fact in known.facts if fact.relation == relation.name]
            beside = [near for fact in same if fact.subject == request.subject for near in known.neighbors(fact)]
            others = dict.fromkeys(fact.subject for fact in (*beside, *same) if fact.subject != request.subject)
            return [behind_a_sentence(prompt) for prompt in asked], list(others)[:NEIGHBORS]
    return [], []
