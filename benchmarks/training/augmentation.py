"""The same case told otherwise, so that a method that is trained sees more than what the cases say word for word.

Reworded: the edit is made in one of the words that the case asks as a paraphrase, the old words become a paraphrase,
and prompts about other subjects that were in the edit's words follow it into the new ones. Retargeted: the new answer
is another one of those that cases in the same words have. Renamed: the subject has a name made of the beginning of its
own and the end of another's, so that there are many more subjects than cases, and of those beside it one that is nearly
its namesake.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from errata.editors.core.request import SLOT, EditRequest
from errata.evaluate.probes import Case, Probe, distracting

ABOUT = ("rewrite", "paraphrase")
BESIDE = ("neighborhood", "distracting_neighborhood", "attribute")


class Augmenter:
    """Cases as they are, and as they could be.

    Args:
        cases: What is varied, and where new answers come from.
        reworded: The share of the times that a case is reworded, where it can be.
        retargeted: The share of the times that it is given another answer, where there is one.
        renamed: The share of the times that it is given an unknown subject, where one can be made up.
    """

    def __init__(
        self, cases: Sequence[Case], *, reworded: float = 0.0, retargeted: float = 0.0, renamed: float = 0.0
    ) -> None:
        self.cases, self.reworded, self.retargeted, self.renamed = cases, reworded, retargeted, renamed
        self._in_words: dict[str, list[int]] = {}  # places of cases, by words with a slot in place of the subject
        for place, case in enumerate(cases):
            for words in _wordings(case):
                self._in_words.setdefault(words, []).append(place)

    def case(self, place: int, draw: random.Random) -> Case:
        """The case at this place in one of its forms."""
        found = self.cases[place]
        if draw.random() < self.retargeted:
            found = retargeted(found, draw.choice(self._answers(found)))
        if draw.random() < self.reworded and (other := _rewordings(found)):
            found = reworded(found, draw.choice(other))
        if draw.random() < self.renamed and (names := self._names(found)):
            found = renamed(found, draw.choice(names))
        return found

    def _names(self, case: Case) -> list[str]:
        """Return names that no subject has: the beginning of this one's name, and the end of another's that cases in
        the same words have."""
        subject = case.request.subject
        there = {name for name, _ in self._known(case)}
        others = {name for name in there - {subject} if len(name.split()) == len(subject.split())}
        return sorted({spliced(subject, other) for other in others} - there)

    def alike(self, case: Case, count: int, draw: random.Random) -> list[Probe]:
        """Return prompts in the edit's words about other subjects, with their own answers: at most `count` of those
        that any case in these words edits or probes."""
        others = sorted(about for about in self._known(case) if about[0] != case.request.subject)
        opening, closing = case.request.template
        return [
            Probe("neighborhood", f"{opening}{subject}{closing}", answer)
            for subject, answer in draw.sample(others, min(count, len(others)))
        ]

    def _answers(self, case: Case) -> list[str]:
        """What cases in the same words have for answers, but the true one of this."""
        requests = [other.request for other in self._in_its_words(case)]
        found = {answer for request in requests for answer in (request.target, request.target_true) if answer}
        return sorted(found - {case.request.target_true})

    def _known(self, case: Case) -> set[tuple[str, str]]:
        """Of whom cases in the same words say something, and what."""
        return {about for other in self._in_its_words(case) for about in _beside(other)}

    def _in_its_words(self, case: Case) -> list[Case]:
        """The cases in one of its words."""
        places = {place for words in _wordings(case) for place in self._in_words.get(words, ())}
        return [self.cases[place] for place in sorted(places)]


def retargeted(case: Case, target: str) -> Case:
    """The case as an edit to another answer. Prompts about other subjects keep theirs."""
    old, new = case.request, replace(case.request, target=target)
    moved = distracting(old, ""), distracting(new, "")
    return Case(case.id, new, tuple(_with_answer(probe, target, *moved) for probe in case.probes))


def reworded(case: Case, words: Probe) -> Case:
    """The case with the edit made in the words of one of its paraphrases, in which the subject stands once."""
    old, new = case.request, replace(case.request, prompt=words.prompt)
    probes = [replace(words, kind="rewrite")]
    for probe in case.probes:
        if probe.kind == "rewrite":
            probes.append(replace(probe, kind="paraphrase"))
        elif probe is not words:
            probes.append(_followed(probe, old, new) if probe.kind in BESIDE else probe)
    return Case(case.id, new, tuple(probes))


def renamed(case: Case, subject: str) -> Case:
    """Return the case as an edit of an unknown subject: with its prompts that hold the subject in a known position, and
    with all probes of other subjects."""
    old = case.request
    new = replace(old, prompt=SLOT.join(old.template), subject=subject, target_true=None)
    before, after = distracting(old, ""), distracting(new, "")
    probes = []
    for probe in case.probes:
        if probe.kind in ABOUT and probe.prompt.count(old.subject) == 1:
            probes.append(replace(probe, prompt=probe.prompt.replace(old.subject, subject)))
        elif probe.kind in BESIDE and probe.prompt.startswith(before):
            probes.append(replace(probe, prompt=after + probe.prompt.removeprefix(before)))
        elif probe.kind in BESIDE:
            probes.append(probe)
    return Case(case.id, new, tuple(probes))


def spliced(first: str, second: str) -> str:
    """The beginning of one name and the end of another with as many words: of words, where they have several, else of
    letters."""
    ours, theirs = first.split(), second.split()
    if len(ours) > 1:
        return " ".join([*ours[: (len(ours) + 1) // 2], *theirs[(len(theirs) + 1) // 2 :]])
    return first[: (len(first) + 1) // 2] + second[(len(second) + 1) // 2 :]


def _rewordings(case: Case) -> list[Probe]:
    """The paraphrases in which an edit can be made: in which it is plain where the subject stands."""
    subject = case.request.subject
    return [p for p in case.probes if p.kind == "paraphrase" and p.prompt.count(subject) == 1 and SLOT not in p.prompt]


def _wordings(case: Case) -> Iterator[str]:
    """The edit's prompt and its paraphrases with a slot in place of the subject."""
    yield SLOT.join(case.request.template)
    for probe in _rewordings(case):
        yield probe.prompt.replace(case.request.subject, SLOT)


def _beside(case: Case) -> set[tuple[str, str]]:
    """Of whom the case says, in its edit's words, what is true: its own subject, and those of the prompts beside it."""
    request = case.request
    found = {(request.subject, request.target_true)} if request.target_true else set()
    opening, closing = request.template
    for probe in case.probes:
        middle = probe.prompt.removeprefix(opening).removesuffix(closing)
        if (
            probe.kind in ("neighborhood", "attribute")
            and probe.target
            and probe.prompt == f"{opening}{middle}{closing}"
        ):
            found.add((middle, probe.target))
    return found


def _with_answer(probe: Probe, target: str, before: str, after: str) -> Probe:
    if probe.kind in ABOUT:
        return replace(probe, target=target)
    if probe.prompt.startswith(before):
        return replace(probe, prompt=after + probe.prompt.removeprefix(before))
    return probe


def _followed(probe: Probe, old: EditRequest, new: EditRequest) -> Probe:
    """A probe in the new words, where it was in the old ones, bare or behind the sentence that states the edit."""
    behind = distracting(old, "")
    stated = probe.prompt.startswith(behind)
    asked = probe.prompt.removeprefix(behind)
    (start, end), (opening, closing) = old.template, new.template
    if asked.startswith(start) and asked.endswith(end) and len(asked) > len(start) + len(end):
        asked = f"{opening}{asked[len(start) : len(asked) - len(end)]}{closing}"
    return replace(probe, prompt=f"{distracting(new, '') if stated else ''}{asked}")
