"""Probes and cases: the prompts that a model is scored on before and after an edit, and the answers expected after it.

Every probe takes the edited model's point of view: `target` is the answer that the model should give after a perfect
edit, and `other` is the answer that competes with it. So a probe passes if the target is more probable than the other,
for every kind, and a perfect edit passes all of them.

Most cases are one request and probes that count by themselves. Three things generalise this:

- A case may have several requests (`Case.requests`). They are edited together, or in turn, and the case stays the unit:
  it is made, refused, undone and scored as a whole.
- An answer may have other spellings (`aliases`), and a probe may need several answers (`also`).
- Probes with the same `test` count as one: any or all of them must hold. If the test has probes of the kind
  `condition`, it counts only where the untouched model answers all of these as expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import RequestError
from errata.editors.core.extensions import ExtensionPoint
from errata.editors.core.request import EditRequest, form_of

Kind = Literal[
    "rewrite",  # the edited prompt itself: target = the new answer, other = the true one
    "paraphrase",  # the same question in other words: as rewrite
    "neighborhood",  # another subject with the same true answer: target = that answer, other = the new one
    "distracting_neighborhood",  # the same behind a sentence that states the edit (CounterFact+)
    "attribute",  # another subject for which the new answer is true: target = it, other = the true one
    "portability",  # a consequence of the edit: target = what now follows, other = what followed before
    "generation",  # an open prompt about the subject, for fluency: no answer
    "unrelated",  # a question whose right answer is not known here: the model should say what it said before
    "hop",  # one fact of a chain that follows from the edits: target = its answer in the new chain
    "condition",  # what the untouched model must know for a test to count: target = its answer then
    "superseded",  # the answer of an earlier edit of the case, behind its prompt, which a later edit replaces
    "later_edit",  # the later edit of the case made by itself: as rewrite
    "prevailing",  # the answer that should replace it, behind the prompt where the two meet
    "tied_fact",  # a fact that the edits lean on and do not change: target = its answer
    "restored_object",  # the true answer that the last edit of the case puts back
    "left_object",  # the wrong answer that the edit before has taught
    "true_object",  # another true answer to the same prompt
    "essence",  # a text about the subject: its first word, target = what follows; how probable it is, not whether
    "doubted",  # the model's own answer is doubted, turn after turn: target = what it should say then
    "memorization",  # the edited prompt: how probable the first token of target is, the new answer
    "priming",  # another prompt, at which the edit should not make that token more probable: likewise
]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Those about other subjects than the edited one.
_ABOUT_OTHERS = ("neighborhood", "distracting_neighborhood", "attribute", "unrelated", "priming")
# Of these, the first token of the target is all that is scored, and no text is written (priming.py).
FIRST_TOKEN_ALONE = ("memorization", "priming")
Rule = Literal["all", "any"]
Matching = Literal["words", "substring"]


@dataclass(frozen=True)
class ProbeKind:
    """A kind of probe of another package, registered by an entry point of `errata.probe_kinds`.

    Attributes:
        name: What `Probe.kind` says; also the name of the entry point.
        metric: The metric that says how often such probes are answered as expected; None: none does.
        title: How tables call the metric.
        meaning: What the metric means, in a sentence or two, for the page of a report.
        is_about_others: Whether the prompts are about other subjects than the edited one, which must keep their
            answers. A second metric then says how often they keep the untouched model's answer, and a sequence leaves
            out those that mention a subject of its other edits.
    """

    name: str
    metric: str | None = None
    title: str = ""
    meaning: str = ""
    is_about_others: bool = False


ADDED = ExtensionPoint(
    "errata.probe_kinds",
    "kind of probe",
    "a ProbeKind",
    lambda loaded: isinstance(loaded, ProbeKind),
    own=KINDS,
    named_by="name",
)


def kinds() -> tuple[str, ...]:
    """Return every kind of probe, those of this package first."""
    return ADDED.names()


def kinds_about_others() -> tuple[str, ...]:
    """Return the kinds of probes that are about other subjects than the edited one.

    Raises:
        ConfigError: Another package's kind cannot be imported.
    """
    return (*_ABOUT_OTHERS, *(kind.name for kind in ADDED.load_others() if kind.is_about_others))


@dataclass(frozen=True)
class FreeAnswer:
    """How the text that a model writes behind a prompt is read. By default: all of it, as `match_answer` does.

    Attributes:
        tokens: Bound on the new tokens of the text; None: as the run says (`generation.tokens`).
        after: Only what follows its first occurrence counts, as behind "Answer:". A text without it gives no answer.
        until: What follows its first occurrence does not count.
        matching: "words": the answer as whole words, whatever the case. "substring": the answer as it is spelled,
            anywhere in the prompt or the text, as the authors of RippleEdits look for it.
        with_prompt: Whether the prompt's own tokens count among `tokens`.
    """

    tokens: int | None = None
    after: str | None = None
    until: str | None = None
    matching: Matching = "words"
    with_prompt: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default}


PLAIN = FreeAnswer()


@dataclass(frozen=True)
class Probe:
    """One prompt, the answer expected after the edit (`target`) and a competing one (`other`), if there are any.

    Attributes:
        kind: What it asks (see `Kind`).
        prompt: What is asked.
        target: The answer of a perfect edit. Probability comparison and teacher forcing score this spelling alone.
        other: The competing answer.
        join: What stands between prompt and answer; None: what the writing has there.
        chat: Whether the prompt is a message to an instruct model.
        aliases: Other spellings of the target. A free answer holds if it gives any of them.
        also: Further answers that a free answer has to give, each as the spellings that count.
        group: The named group that it is scored in, beside the mean over its kind, as "Reasoning".
        test: Probes of a case with the same test count as one.
        rule: Whether "all" or "any" of a test's probes must hold. Shares combine as their minimum or maximum.
        free: How a free answer is read.
        follow_ups: What is said in the same conversation, one message after each answer of the model. The target is
            looked for in its answer to the last one, and no other scoring has a value.

    Raises:
        RequestError: There is no such kind; names the nearest.
    """

    kind: str
    prompt: str
    target: str | None = None
    other: str | None = None
    join: str | None = None
    chat: bool = False
    aliases: tuple[str, ...] = ()
    also: tuple[tuple[str, ...], ...] = ()
    group: str | None = None
    test: str | None = None
    rule: Rule = "all"
    free: FreeAnswer = PLAIN
    follow_ups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS and self.kind not in ADDED.others():
            raise RequestError(f"unknown kind of probe {self.kind!r}{did_you_mean(self.kind, kinds())}", field="kind")

    @classmethod
    def of(cls, fields_: Mapping[str, Any]) -> Probe:
        """Return the probe with these plain values, as `as_dict` gives them; other entries are left alone."""
        found = {each.name: fields_[each.name] for each in fields(cls) if each.name in fields_}
        found["aliases"] = tuple(found.get("aliases", ()))
        found["also"] = tuple(map(tuple, found.get("also", ())))
        found["follow_ups"] = tuple(found.get("follow_ups", ()))
        return cls(**{**found, "free": FreeAnswer(**found.get("free", {}))})

    @property
    def answers(self) -> tuple[tuple[str, ...], ...]:
        """Return the answers that a free answer has to give, each as the spellings that count."""
        return () if self.target is None else ((self.target, *self.aliases), *self.also)

    @property
    def wants_text(self) -> bool:
        """Return whether a free answer says something about it."""
        is_answered = self.target is not None and self.kind not in ("essence", *FIRST_TOKEN_ALONE)
        return is_answered or self.kind in ("generation", "unrelated")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; those that older probes do not have only where they say something."""
        found = {name: getattr(self, name) for name in ("kind", "prompt", "target", "other")}
        found |= form_of(self.join, self.chat)
        found |= {} if not self.aliases else {"aliases": list(self.aliases)}
        found |= {} if not self.also else {"also": [list(spellings) for spellings in self.also]}
        found |= {} if self.group is None else {"group": self.group}
        found |= {} if self.test is None else {"test": self.test, "rule": self.rule}
        found |= {"follow_ups": list(self.follow_ups)} if self.follow_ups else {}
        return found | ({} if self.free == PLAIN else {"free": self.free.as_dict()})


@dataclass(frozen=True)
class Case:
    """One edit with the probes that measure its effect: one request, or several that are one case.

    Attributes:
        id: Its name in the results.
        request: The request; of several the first.
        probes: What is asked.
        further: The other requests of the case.
        in_turn: Whether the requests are edited one after another, each on the model as the one before has left it, so
            that a later one may change what an earlier one has taught. Otherwise they are one edit.
        reference: Relation and new answer under which a file of reference texts has texts (datasets/references.py).
            It is no part of what is asked.
        interval: The stretch of time that the case is of, as WikiBigEdit's; its cases are also summed up by
            themselves.
    """

    id: str
    request: EditRequest
    probes: tuple[Probe, ...]
    further: tuple[EditRequest, ...] = ()
    in_turn: bool = False
    reference: tuple[str, str] | None = None
    interval: str | None = None

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """Return all requests, in their order."""
        return (self.request, *self.further)

    @property
    def subjects(self) -> frozenset[str]:
        """Return the subjects that the case edits; none for requests without a subject."""
        return frozenset(request.subject for request in self.requests if request.subject is not None)

    def asked(self) -> dict[str, Any]:
        """Return the requests as records hold them; those of older cases are one entry, `request`."""
        found: dict[str, Any] = {"request": self.request.as_dict()}
        found |= {"further": [request.as_dict() for request in self.further]} if self.further else {}
        found |= {} if self.interval is None else {"interval": self.interval}
        return found | ({"in_turn": True} if self.in_turn else {})

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, without fields that say nothing, so that digests of older cases stay the same."""
        return {"id": self.id, **self.asked(), "probes": [probe.as_dict() for probe in self.probes]}


EditKey = tuple[str, str, bool]


def edit_key(request: EditRequest) -> EditKey:
    """Return what two requests have in common that ask for one and the same edit."""
    return request.text, request.target.strip(), request.chat


def rounds(cases: Sequence[Case]) -> list[list[EditRequest]]:
    """Return what is edited together, round after round: of several cases, each as its requests follow each other.

    A request that another case makes, too, is made once. Without cases in turn, there is one round.
    """
    found: list[dict[EditKey, EditRequest]] = [{}]
    for case in cases:
        for index, request in enumerate(case.requests):
            place = index if case.in_turn else 0
            found += [{} for _ in range(place + 1 - len(found))]
            found[place].setdefault(edit_key(request), request)
    return [list(requests.values()) for requests in found]


def distracting(request: EditRequest, prompt: str) -> str:
    """Return CounterFact+'s prompt: the edit stated in a sentence, then a neighborhood prompt.

    Source: Hoelscher-Obermaier et al. 2023, section 3.
    """
    return f"{request.text} {request.target}. {prompt}"
