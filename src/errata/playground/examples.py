"""Facts to try in the playground, and what to ask about one: of a testbed its own world says both, of any other model
a few facts of the common world and what the user types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from errata.editors.core.request import SLOT, EditRequest
from errata.evaluate.probes import Probe

# What a page can show of one edit.
MAX_ASKED = 12


@dataclass(frozen=True)
class ExampleFact:
    """What the fields of the page hold.

    Attributes:
        prompt, subject, target: Of an EditRequest.
        wordings: Other prompts to ask, with `{}` for the subject or without.
        others: Subjects to ask the edit's own prompt about.
    """

    prompt: str
    subject: str
    target: str
    wordings: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def request(self) -> EditRequest:
        """The edit that it asks for.

        Raises:
            RequestError: a field is empty, or the subject is not in the prompt.
        """
        return EditRequest(self.prompt.strip(), self.subject.strip(), self.target.strip())


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


def examples(testbed: Path | None) -> list[ExampleFact]:
    """Facts to try: one of each relation of a testbed (the folder), or `COMMON` where the model is none. Each is of
    another subject, no question, and in a prompt that does not begin with the subject, where some methods break the
    model."""
    if testbed is None:
        return list(COMMON)
    from errata.benchmarks.datasets import world

    chosen: dict[str, EditRequest] = {}
    subjects: set[str] = set()
    for case in world.cases(testbed, split="test"):
        relation, request = case.id.partition("/")[0], case.request
        is_new = relation not in chosen and request.subject not in subjects
        if is_new and request.subject_span[0] > 0 and "?" not in request.text:
            chosen[relation] = request
            subjects.add(request.subject)
    return [ExampleFact(request.prompt, request.subject, request.target) for request in chosen.values()]


def questions(fact: ExampleFact, request: EditRequest, testbed: Path | None) -> tuple[Probe, ...]:
    """What to ask about an edit: its prompt, other wordings, and the same of other subjects.

    What the fact says itself comes first; what it leaves empty a testbed fills in, where the prompt is one of its
    wordings. The probes about other subjects have no answers: whether these hold is seen by what was said before.
    """
    before, after = request.template
    wordings = [text.replace(SLOT, request.subject) for text in _said(fact.wordings)]
    others = [f"{before}{other}{after}" for other in _said(fact.others)]
    if testbed is not None and not (wordings and others):
        reworded, beside = _known(request, testbed)
        wordings, others = wordings or reworded, others or [f"{before}{subject}{after}" for subject in beside]
    return (
        Probe("rewrite", request.text, request.target),
        *(Probe("paraphrase", prompt, request.target) for prompt in wordings[:MAX_ASKED]),
        *(Probe("neighborhood", prompt) for prompt in others[:MAX_ASKED]),
    )


def _said(lines: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _known(request: EditRequest, testbed: Path) -> tuple[list[str], list[str]]:
    """Held-out wordings of the request's relation, as a bench asks them, and other subjects, those with the
    same true answer first; neither where the prompt is no wording of the testbed."""
    from errata.benchmarks.datasets.world import NEIGHBORS, Known
    from errata.benchmarks.testbed.wording import behind_a_sentence

    known, template = Known.of(testbed), SLOT.join(request.template)
    for relation in known.world.relations.values():
        if template in (*relation.trained, *relation.held_out):
            asked = [t.replace(SLOT, request.subject) for t in relation.held_out if t != template]
            same = [fact for fact in known.facts if fact.relation == relation.name]
            beside = [near for fact in same if fact.subject == request.subject for near in known.neighbors(fact)]
            others = dict.fromkeys(fact.subject for fact in (*beside, *same) if fact.subject != request.subject)
            return [behind_a_sentence(prompt) for prompt in asked], list(others)[:NEIGHBORS]
    return [], []
