"""Make the training examples of a method that learns to edit from the cases of a dataset.

An example is one request and the rows that its loss reads (editors/core/families/learned_editor.py). Answer rows are
the edited prompt and paraphrases. Locality rows are neighbours, prompts of other cases, and running text. The seed and
the step alone decide which rows and cases a step takes, so training that was interrupted continues with the same rows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from errata.benchmarks.bench.train_config import RowsConfig
from errata.benchmarks.datasets.json_records import Dropped
from errata.benchmarks.training.augmentation import BESIDE, Augmenter, subject_of
from errata.editors.core.errors import DatasetError
from errata.editors.core.families.learned_editor import TrainingExample
from errata.editors.core.forward.functional_edit import KeptRow
from errata.editors.core.forward.gradient_factors import AnsweredRow
from errata.editors.core.model.reading import read_ids
from errata.editors.core.model.tokens import Tokenizer, prompt_ids
from errata.evaluate import scoring_plan
from errata.evaluate.probes import Case, Probe


@dataclass(frozen=True)
class Split:
    """Cases to train on, and held-out cases of other subjects that decide when to stop."""

    train: list[Case]
    held_out: list[Case]


def split(cases: Sequence[Case], held_out: int, seed: int) -> Split:
    """Hold out about `held_out` cases: all of a subject's or none, in a seeded order of subjects.

    Raises:
        DatasetError: nothing is left to train on.
    """
    counts = Counter(subject_of(case.request) for case in cases)
    subjects = sorted(counts)
    random.Random(f"held out {seed}").shuffle(subjects)
    chosen: set[str] = set()
    count = 0
    for subject in subjects:
        if count >= held_out:
            break
        chosen.add(subject)
        count += counts[subject]
    train = [case for case in cases if subject_of(case.request) not in chosen]
    if not train:
        raise DatasetError(f"{len(cases)} cases leave none to train on when {held_out} are held out")
    return Split(train, [case for case in cases if subject_of(case.request) in chosen])


def fitting(cases: Sequence[Case], model: Any, tokenizer: Tokenizer) -> tuple[list[Case], list[Dropped]]:
    """Sort the cases into those that this model can be asked and those that it cannot, with the reason."""
    probes = [_own(case) for case in cases] + [probe for case in cases for probe in case.probes]
    reasons = scoring_plan.unscorable_reasons(model, tokenizer, probes)
    own, rest = reasons[: len(cases)], iter(reasons[len(cases) :])
    kept, dropped = [], []
    for case, first in zip(cases, own, strict=True):
        several = "has several requests, and a method learns from edits of one" if case.further else None
        found = [reason for reason in (several, first, *(next(rest) for _ in case.probes)) if reason is not None]
        if found:
            dropped.append(Dropped(case.id, "probes", found[0]))
        else:
            kept.append(case)
    return kept, dropped


def _own(case: Case) -> Probe:
    request = case.request
    return Probe("rewrite", request.text, request.target, request.target_true, request.join, request.chat)


def _true(case: Case) -> Probe:
    request = case.request
    return Probe("rewrite", request.text, request.target_true, None, request.join, request.chat)


class ExampleSampler:
    """Draws the examples of a training run.

    Args:
        cases: To train on.
        texts: To take running text from; needed where `rows.texts` is above 0.
        tokenizer: Of the model that is edited.
        rows: How many rows of each kind.
        seed: Of the order of the cases and of the choice of rows.
        longest: Tokens that the model takes. A variation of a case that needs more is left out.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        texts: Sequence[str],
        tokenizer: Tokenizer,
        rows: RowsConfig,
        seed: int,
        *,
        longest: int | None = None,
    ) -> None:
        self.cases, self.rows, self.seed, self.longest = cases, rows, seed, longest
        self.variations = Augmenter(cases, reworded=rows.reworded, retargeted=rows.retargeted, renamed=rows.renamed)
        self._encoder = _Encoder(tokenizer)
        self._order: tuple[int, list[int]] = (-1, [])
        self._texts = [ids for text in texts if len(ids := prompt_ids(tokenizer, text)) > 1] if rows.texts else []

    def batch(self, step: int, edits: int, requests: int) -> list[list[TrainingExample]]:
        """Return what step `step`, counted from 0, learns from: `edits` edits of `requests` requests. Every case comes
        once before any comes again."""
        size = edits * requests
        examples = [self._example(index) for index in range(step * size, (step + 1) * size)]
        return [examples[start : start + requests] for start in range(0, size, requests)]

    def _example(self, index: int) -> TrainingExample:
        number, draw = self._case(index), random.Random(f"rows {self.seed} {index}")
        varied = self.variations.case(number, draw)
        case = varied if self._fits(self._encoder.answer_row(_own(varied))) else self.cases[number]
        asked = [_own(case), *_some(draw, _of_kind(case, "paraphrase"), self.rows.paraphrases)]
        kept = self._beside(case, number, draw)
        return TrainingExample(
            case.request,
            tuple(filter(self._fits, map(self._encoder.answer_row, asked))),
            (
                *filter(self._fits, map(self._encoder.locality_row, kept)),
                *(self._piece(draw) for _ in range(self.rows.texts if self._texts else 0)),
            ),
        )

    def _beside(self, case: Case, number: int, draw: random.Random) -> list[Probe]:
        """Return prompts that must keep their answers: the case's own, and those of other cases."""
        rows, found = self.rows, []
        counts = (rows.neighbors, rows.distracting, rows.attributes)
        for kind, count in zip(BESIDE, counts, strict=True):
            found += _some(draw, _of_kind(case, kind), count)
        found += self.variations.alike(case, rows.alike, draw)
        others = draw.sample(range(len(self.cases)), min(rows.others + 1, len(self.cases)))
        return [*found, *(_true(self.cases[other]) for other in [o for o in others if o != number][: rows.others])]

    def _fits(self, row: AnsweredRow | KeptRow) -> bool:
        return self.longest is None or len(row.ids) <= self.longest

    def _case(self, index: int) -> int:
        """Return the case at an index of the endless order, which shuffles all cases anew in each epoch."""
        epoch, i = divmod(index, len(self.cases))
        if self._order[0] != epoch:
            order = list(range(len(self.cases)))
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][i]

    def _piece(self, draw: random.Random) -> KeptRow:
        """Return a piece of a text that begins at any of its tokens."""
        ids = self._texts[draw.randrange(len(self._texts))]
        start = draw.randrange(max(1, len(ids) - self.rows.text_tokens + 1))
        return KeptRow(tuple(ids[start : start + self.rows.text_tokens]))


def _of_kind(case: Case, kind: str) -> list[Probe]:
    """Return the probes of a kind that have an answer."""
    return [probe for probe in case.probes if probe.kind == kind and probe.target]


def _some(draw: random.Random, probes: Sequence[Probe], count: int) -> list[Probe]:
    return draw.sample(probes, min(count, len(probes)))


class _Encoder:
    """Turns probes into rows of ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def answer_row(self, probe: Probe) -> AnsweredRow:
        """Return the prompt with the answer that it must get."""
        prompt, answer = self._ids(probe)
        return AnsweredRow((*prompt, *answer[:-1]), tuple(answer))

    def locality_row(self, probe: Probe) -> KeptRow:
        """Return the prompt with its answer, read at the answer. Without an answer, only the last token is read."""
        prompt, answer = self._ids(probe)
        answer = answer[:-1]
        return KeptRow((*prompt, *answer), len(prompt) - 1)

    def _ids(self, probe: Probe) -> tuple[list[int], list[int]]:
        return read_ids(self.tokenizer, probe.prompt, probe.target, chat=probe.chat, join=probe.join)
