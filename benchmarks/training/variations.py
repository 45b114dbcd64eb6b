"""The same case told otherwise, so that a method that is trained sees more than what the cases say word for word.

Reworded: the edit is made in one of the words that the case asks as a paraphrase, the old words become a paraphrase,
and prompts about other subjects that were in the edit's words follow it into the new ones. Retargeted: the new answer
is another one of those that cases in the same words have.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from errata.benchmarks.counterfact import distracting
from errata.editors.core.request import SLOT, EditRequest
from errata.evaluate.probes import Case, Probe

ABOUT = ("rewrite", "paraphrase")
BESIDE = ("neighborhood", "distracting_neighborhood", "attribute")


class Variations:
    """Cases as they are, and as they could be.

    Args:
        cases: What is varied, and where new answers come from.
        reworded: The share of the times that a case is reworded, where it can be.
        retargeted: The share of the times that it is given another answer, where there is one.
    """

    def __init__(self, cases: Sequence[Case], *, reworded: float, retargeted: float) -> None:
        self.cases, self.reworded, self.retargeted = cases, reworded, retargeted
        said: dict[str, set[str]] = {}  # answers by the words that ask for them
        for case in cases if retargeted else ():
            request = case.request
            for words in _wordings(case):
                said.setdefault(words, set()).update(a for a in (request.target, request.target_true) if a)
        self._said = said

    def case(self, place: int, draw: random.Random) -> Case:
        """The case at this place in one of its forms."""
        found = self.cases[place]
        if draw.random() < self.retargeted:
            found = retargeted(found, draw.choice(self._answers(found)))
        if draw.random() < self.reworded and (other := _rewordings(found)):
            found = reworded(found, draw.choice(other))
        return found

    def _answers(self, case: Case) -> list[str]:
        """What cases in the same words have for answers, but the true one of this."""
        return sorted(set().union(*(self._said[words] for words in _wordings(case))) - {case.request.target_true})


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


def _rewordings(case: Case) -> list[Probe]:
    """The paraphrases in which an edit can be made: in which it is plain where the subject stands."""
    subject = case.request.subject
    return [p for p in case.probes if p.kind == "paraphrase" and p.prompt.count(subject) == 1 and SLOT not in p.prompt]


def _wordings(case: Case) -> Iterator[str]:
    """The edit's prompt and its paraphrases with a slot in place of the subject."""
    yield SLOT.join(case.request.template)
    for probe in _rewordings(case):
        yield probe.prompt.replace(case.request.subject, SLOT)


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
