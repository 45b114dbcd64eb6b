"""At which prompts priming is measured: those of a dataset's own records.

    pool = PromptPool(cases)
    probes = pool.probes(cases[0], n=10)

For a fact with the new answer x there are up to n prompts of each place:

- "subjects": the record's own neighbourhood prompts, the same relation of other subjects.
- "relations": edited prompts of records with another relation whose answers include x, so that x would be an answer of
  the right kind there. The relation is what the record states, else the wording of its prompt.
- "openings": open prompts about the subjects of other records ("generation").

No prompt mentions an edited subject or x itself, and none has x as its true answer: it would be right to say x there.
Which prompts are asked depends on the fact, on the records and on the subjects to avoid, not on a seed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache

from errata.editors.core.request import SLOT, EditRequest
from errata.evaluate.priming import MEMORIZATION, OPENINGS, PRIMING, RELATIONS, SUBJECTS
from errata.evaluate.probes import Case, Probe


class PromptPool:
    """The records that prompts are taken from.

    Args:
        cases: Of one dataset.
        avoid: Subjects that no prompt may mention: all those that a sequence edits.
    """

    def __init__(self, cases: Sequence[Case], avoid: Collection[str] = ()) -> None:
        self._avoid = _mentions(avoid)
        self._edited: dict[str, list[EditRequest]] = {}
        self._near = {case.id: _near(case) for case in cases}
        openings: dict[str, Probe] = {}
        for case in cases:
            for request in case.requests:
                self._edited.setdefault(_relation(case, request), []).append(request)
            openings |= {probe.prompt: probe for probe in case.probes if probe.kind == "generation"}
        self._openings = list(openings.values())
        self._answers = {
            relation: {answer for request in requests for answer in _answers(request)}
            for relation, requests in self._edited.items()
        }
        self._of_others = cache(self._of_other_relations)

    def probes(self, case: Case, n: int) -> list[Probe]:
        """Return the probe at the edited prompt, and up to `n` at other prompts of each place.

        A case of several requests is asked about its last one, which no later one replaces.
        """
        request = case.requests[-1]
        new = request.target.strip()
        near = self._near.get(case.id) or _near(case)  # the record's own, also where the case is asked less
        others = self._of_others(_relation(case, request), new)
        return [
            Probe(MEMORIZATION, request.text, request.target, join=request.join, chat=request.chat),
            *self._chosen(case, SUBJECTS, near, n),
            *self._chosen(case, RELATIONS, others, n),
            *self._chosen(case, OPENINGS, self._openings, n),
        ]

    def with_probes(self, case: Case, n: int) -> Case:
        """Return the case with these probes behind its own."""
        return replace(case, probes=(*case.probes, *self.probes(case, n)))

    def _of_other_relations(self, own: str, new: str) -> list[Probe]:
        """Return the edited prompts of relations that have an answer in common with an edit, but not the same truth."""
        found = {
            other.text: Probe("rewrite", other.text, other.target_true, join=other.join, chat=other.chat)
            for relation, requests in self._edited.items()
            if relation != own and new in self._answers[relation]
            for other in requests
        }
        return list(found.values())

    def _chosen(self, case: Case, place: str, found: Sequence[Probe], n: int) -> list[Probe]:
        """Return the first `n` prompts of the fact's own order that mention nothing that they may not."""
        target = case.requests[-1].target
        mentioned = _mentions({target.strip(), *case.subjects})
        own = {request.text for request in case.requests}
        kept: list[Probe] = []
        for probe in _drawn(found, f"priming {place} {case.id}"):
            if len(kept) == n:
                break
            is_right = probe.target is not None and probe.target.strip() == target.strip()
            if not (is_right or probe.prompt in own or mentioned(probe.prompt) or self._avoid(probe.prompt)):
                kept.append(Probe(PRIMING, probe.prompt, target, join=probe.join, chat=probe.chat, group=place))
        return kept


def _near(case: Case) -> list[Probe]:
    """Return the neighbourhood probes of a case, one per prompt."""
    return list({probe.prompt: probe for probe in case.probes if probe.kind == "neighborhood"}.values())


def _relation(case: Case, request: EditRequest) -> str:
    """Return what a record calls its relation, else the wording of its prompt."""
    if case.reference is not None and not case.further:
        return case.reference[0]
    return SLOT.join(request.template)


def _answers(request: EditRequest) -> list[str]:
    return [answer.strip() for answer in (request.target, request.target_true) if answer is not None]


def _mentions(words: Collection[str]) -> Callable[[str], bool]:
    """Return whether a text holds one of some phrases, as whole words in any case."""
    pattern = "|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in sorted(words)) or "(?!)"
    found = re.compile(pattern, re.IGNORECASE)
    return lambda text: found.search(text) is not None


def _drawn(found: Sequence[Probe], key: str) -> Iterator[Probe]:
    """Yield all of them in an order that the key decides (Fisher and Yates, one step per probe that is taken)."""
    draws, moved = random.Random(key), dict[int, int]()
    for i in range(len(found)):
        j = draws.randrange(i, len(found))
        yield found[moved.get(j, j)]
        moved[j] = moved.get(i, i)
