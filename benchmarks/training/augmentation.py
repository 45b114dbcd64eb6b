"""Vary the cases that a method is trained on, so that it sees more than what they say word for word.

Reworded: the edit is made in the words of one of its paraphrases. The old words become a paraphrase, and prompts about
other subjects follow the edit into the new words.
Retargeted: the new answer is another answer of cases in the same words.
Renamed: the subject gets a name made of the beginning of its own and the end of another. So there are many more
subjects than cases, and each has a neighbour whose name is nearly its own.
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
    """Gives cases as they are and in varied forms.

    Args:
        cases: The cases to vary, which also give the new answers.
        reworded: Share of the draws in which a case is reworded, if it has a paraphrase that allows it.
        retargeted: Share of the draws in which it gets another answer, if there is one.
        renamed: Share of the draws in which it gets an unknown subject, if a name can be made up.
    """

    def __init__(
        self, cases: Sequence[Case], *, reworded: float = 0.0, retargeted: float = 0.0, renamed: float = 0.0
    ) -> None:
        self.cases, self.reworded, self.retargeted, self.renamed = cases, reworded, retargeted, renamed
        self._in_words: dict[str, list[int]] = {}  # indices of cases, by words with a slot for the subject
        for index, case in enumerate(cases):
            for words in _wordings(case):
                self._in_words.setdefault(words, []).append(index)

    def case(self, index: int, draw: random.Random) -> Case:
        """Return the case at this index in one of its forms."""
        found = self.cases[index]
        if found.request.subject is None:
            return found
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
        subject = subject_of(case.request)
        there = {name for name, _ in self._known(case)}
        others = {name for name in there - {subject} if len(name.split()) == len(subject.split())}
        return sorted({spliced(subject, other) for other in others} - there)

    def alike(self, case: Case, count: int, draw: random.Random) -> list[Probe]:
        """Return prompts in the edit's words about other subjects, with their own answers: at most `count` of those
        that any case in these words edits or probes."""
        if case.request.subject is None:
            return []
        others = sorted(about for about in self._known(case) if about[0] != case.request.subject)
        opening, closing = case.request.template
        return [
            Probe("neighborhood", f"{opening}{subject}{closing}", answer, None, case.request.join, case.request.chat)
            for subject, answer in draw.sample(others, min(count, len(others)))
        ]

    def _answers(self, case: Case) -> list[str]:
        """Return the answers of cases in the same words, without the true answer of this case."""
        requests = [other.request for other in self._in_its_words(case)]
        found = {answer for request in requests for answer in (request.target, request.target_true) if answer}
        return sorted(found - {case.request.target_true})

    def _known(self, case: Case) -> set[tuple[str, str]]:
        """Return the (subject, answer) pairs that cases in the same words state."""
        return {about for other in self._in_its_words(case) for about in _beside(other)}

    def _in_its_words(self, case: Case) -> list[Case]:
        """Return the cases that share one of its wordings."""
        indices = {index for words in _wordings(case) for index in self._in_words.get(words, ())}
        return [self.cases[index] for index in sorted(indices)]


def subject_of(request: EditRequest) -> str:
    """Return the subject of a request, or its prompt where it has none."""
    return request.text if request.subject is None else request.subject


def retargeted(case: Case, target: str) -> Case:
    """Return the case as an edit to another answer. Prompts about other subjects keep their answers."""
    old, new = case.request, replace(case.request, target=target)
    moved = distracting(old, ""), distracting(new, "")
    return Case(case.id, new, tuple(_with_answer(probe, target, *moved) for probe in case.probes))


def reworded(case: Case, words: Probe) -> Case:
    """Return the case with the edit in the words of one of its paraphrases, which holds the subject once."""
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
    old, name = case.request, subject_of(case.request)
    new = replace(old, prompt=SLOT.join(old.template), subject=subject, target_true=None)
    before, after = distracting(old, ""), distracting(new, "")
    probes = []
    for probe in case.probes:
        if probe.kind in ABOUT and probe.prompt.count(name) == 1:
            probes.append(replace(probe, prompt=probe.prompt.replace(name, subject)))
        elif probe.kind in BESIDE and probe.prompt.startswith(before):
            probes.append(replace(probe, prompt=after + probe.prompt.removeprefix(before)))
        elif probe.kind in BESIDE:
            probes.append(probe)
    return Case(case.id, new, tuple(probes))


def spliced(first: str, second: str) -> str:
    """Join the beginning of one name and the end of another with as many words.

    Names of several words are cut between words, others between letters.
    """
    ours, theirs = first.split(), second.split()
    if len(ours) > 1:
        return " ".join([*ours[: (len(ours) + 1) // 2], *theirs[(len(theirs) + 1) // 2 :]])
    return first[: (len(first) + 1) // 2] + second[(len(second) + 1) // 2 :]


def _rewordings(case: Case) -> list[Probe]:
    """Return the paraphrases in which an edit can be made: those that hold the subject exactly once."""
    subject = subject_of(case.request)
    return [p for p in case.probes if p.kind == "paraphrase" and p.prompt.count(subject) == 1 and SLOT not in p.prompt]


def _wordings(case: Case) -> Iterator[str]:
    """Yield the prompt of the edit and its paraphrases, with a slot for the subject; nothing without a subject."""
    if case.request.subject is None:
        return
    yield SLOT.join(case.request.template)
    for probe in _rewordings(case):
        yield probe.prompt.replace(case.request.subject, SLOT)


def _beside(case: Case) -> set[tuple[str, str]]:
    """Return the (subject, true answer) pairs that the case states in the words of its edit: of its own subject and of
    the subjects of its other prompts."""
    request = case.request
    found = {(subject_of(request), request.target_true)} if request.target_true else set()
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
    """Return a probe in the new words if it was in the old ones, bare or behind the sentence that states the edit."""
    behind = distracting(old, "")
    stated = probe.prompt.startswith(behind)
    asked = probe.prompt.removeprefix(behind)
    (start, end), (opening, closing) = old.template, new.template
    if asked.startswith(start) and asked.endswith(end) and len(asked) > len(start) + len(end):
        asked = f"{opening}{asked[len(start) : len(asked) - len(end)]}{closing}"
    return replace(probe, prompt=f"{distracting(new, '') if stated else ''}{asked}")
