"""From a dataset's cases to what a method that is trained learns from: a pure function of the seed and the step.

A lesson is one request and the rows that its loss reads (editors/core/families/learned_editor.py). Asked: the edited
prompt itself, and paraphrases. Kept: neighbours, prompts of other cases, and running text. Which of them, and which
cases a step takes, is drawn from the seed and the step alone, so that training that was interrupted continues with the
same rows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from errata.benchmarks.datasets.json_records import Dropped
from errata.benchmarks.training.augmentation import BESIDE, Augmenter
from errata.editors.core.config import check_least
from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.families.learned_editor import TrainingExample
from errata.editors.core.forward.functional_edit import KeptRow
from errata.editors.core.forward.gradient_factors import AnsweredRow
from errata.editors.core.model.reading import read_ids
from errata.editors.core.model.tokens import Tokenizer, prompt_ids
from errata.evaluate import scoring
from errata.evaluate.probes import Case, Probe


@dataclass(frozen=True)
class RowsConfig:
    """How many rows of each kind the loss of one edit reads, beside its own prompt. `paraphrases`: the same fact in
    other words, to be answered alike. `neighbors`: prompts about other subjects, `distracting`: the same behind a
    sentence that states the edit, `attributes`: prompts about subjects for which the new answer is true, all as the
    case has them, `alike`: prompts in the edit's words about subjects of other cases and their neighbours, and
    `others`: prompts of other cases; none of them may change its answer. `texts`: pieces of
    running text of `text_tokens` tokens, on which nothing may change; each token counts as much as an answer's.
    `reworded` and `retargeted`: the shares of the edits that are made in other words, and to another answer, than the
    case has (benchmarks/training/augmentation.py)."""

    paraphrases: int = 1
    neighbors: int = 3
    distracting: int = 1
    attributes: int = 1
    alike: int = 0
    others: int = 2
    texts: int = 1
    text_tokens: int = 32
    reworded: float = 0.0
    retargeted: float = 0.0
    renamed: float = 0.0

    def __post_init__(self) -> None:
        names = ("paraphrases", "neighbors", "distracting", "attributes", "alike", "others", "texts")
        check_least(self, dict.fromkeys(names, 0) | {"text_tokens": 2}, "rows.")
        for name in ("reworded", "retargeted", "renamed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"rows.{name}: expected a share from 0 to 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Split:
    """Cases to train on, and cases to stop by, of other subjects."""

    train: list[Case]
    held_out: list[Case]


def split(cases: Sequence[Case], held_out: int, seed: int) -> Split:
    """Hold out about `held_out` cases: all of a subject's or none, in a seeded order of subjects.

    Raises:
        DatasetError: nothing is left to train on.
    """
    counts = Counter(case.request.subject for case in cases)
    subjects = sorted(counts)
    random.Random(f"held out {seed}").shuffle(subjects)
    chosen: set[str] = set()
    count = 0
    for subject in subjects:
        if count >= held_out:
            break
        chosen.add(subject)
        count += counts[subject]
    train = [case for case in cases if case.request.subject not in chosen]
    if not train:
        raise DatasetError(f"{len(cases)} cases leave none to train on when {held_out} are held out")
    return Split(train, [case for case in cases if case.request.subject in chosen])


def fitting(cases: Sequence[Case], model: Any, tokenizer: Tokenizer) -> tuple[list[Case], list[Dropped]]:
    """The cases that this model can be asked, and the others, with the reason."""
    probes = [_own(case) for case in cases] + [probe for case in cases for probe in case.probes]
    reasons = scoring.unscorable_reasons(model, tokenizer, probes)
    own, rest = reasons[: len(cases)], iter(reasons[len(cases) :])
    kept, dropped = [], []
    for case, first in zip(cases, own, strict=True):
        found = [reason for reason in (first, *(next(rest) for _ in case.probes)) if reason is not None]
        if found:
            dropped.append(Dropped(case.id, "probes", found[0]))
        else:
            kept.append(case)
    return kept, dropped


def _own(case: Case) -> Probe:
    return Probe("rewrite", case.request.text, case.request.target, case.request.target_true)


def _true(case: Case) -> Probe:
    return Probe("rewrite", case.request.text, case.request.target_true)


class ExampleSampler:
    """The lessons of a training run.

    Args:
        cases: To train on.
        texts: To take running text from; needed where `rows.texts` is above 0.
        tokenizer: Of the model that is edited.
        rows: How many rows of each kind.
        seed: Of the order of the cases and of the choice of rows.
        longest: Tokens that the model takes; a variation of a case that needs more is not asked.
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
        lessons = [self._lesson(place) for place in range(step * size, (step + 1) * size)]
        return [lessons[start : start + requests] for start in range(0, size, requests)]

    def _lesson(self, place: int) -> TrainingExample:
        number, draw = self._case(place), random.Random(f"rows {self.seed} {place}")
        varied = self.variations.case(number, draw)
        case = varied if self._fits(self._encoder.asked(_own(varied))) else self.cases[number]
        asked = [_own(case), *_some(draw, _of_kind(case, "paraphrase"), self.rows.paraphrases)]
        kept = self._beside(case, number, draw)
        return TrainingExample(
            case.request,
            tuple(filter(self._fits, map(self._encoder.asked, asked))),
            (
                *filter(self._fits, map(self._encoder.kept, kept)),
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

    def _case(self, place: int) -> int:
        """The case of a place in the endless order of them."""
        epoch, i = divmod(place, len(self.cases))
        if self._order[0] != epoch:
            order = list(range(len(self.cases)))
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][i]

    def _piece(self, draw: random.Random) -> KeptRow:
        """A piece of a text, from any of its tokens on."""
        ids = self._texts[draw.randrange(len(self._texts))]
        start = draw.randrange(max(1, len(ids) - self.rows.text_tokens + 1))
        return KeptRow(tuple(ids[start : start + self.rows.text_tokens]))


def _of_kind(case: Case, kind: str) -> list[Probe]:
    """Those of its probes that have an answer."""
    return [probe for probe in case.probes if probe.kind == kind and probe.target]


def _some(draw: random.Random, probes: Sequence[Probe], count: int) -> list[Probe]:
    return draw.sample(probes, min(count, len(probes)))


class _Encoder:
    """Probes as rows of ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def asked(self, probe: Probe) -> AnsweredRow:
        """The prompt with the answer that is expected."""
        prompt, answer = self._ids(probe)
        return AnsweredRow((*prompt, *answer[:-1]), tuple(answer))

    def kept(self, probe: Probe) -> KeptRow:
        """The prompt with its answer, read from the answer on; without one, the last token alone."""
        prompt, answer = self._ids(probe)
        answer = answer[:-1]
        return KeptRow((*prompt, *answer), len(prompt) - 1)

    def _ids(self, probe: Probe) -> tuple[list[int], list[int]]:
        return read_ids(self.tokenizer, probe.prompt, probe.target, chat=probe.chat, join=probe.join)
