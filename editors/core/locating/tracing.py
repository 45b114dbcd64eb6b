"""Causal tracing of one fact: which states bring the answer back, and which lose it.

    trace(model, tokenizer, "The capital of {} is", "Gavaria", Swap("Loruvia"))

A prompt runs clean and corrupted. Then each cell (token, layer) of a heat map runs again, with one state of the one run
written into the other:

- denoising writes clean states into the corrupted run, and asks what brings the answer back;
- noising writes corrupted states into the clean run, and asks what the answer cannot do without.

Sources: Meng et al. 2022 (ROME), section 2; Zhang and Nanda 2023 for the replacement of the subject by another one, the
logit difference, and both directions.

Shapes: S corrupted rows, T tokens, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError, RequestError
from errata.editors.core.locating.answer_scores import (
    DIRECTIONS,
    AnswerScorer,
    Direction,
    Metric,
    best_other,
    effect,
    named,
)
from errata.editors.core.locating.corruption import Corruption, Noise, ScaledNoise, Swap, embedded, scaled_noise
from errata.editors.core.locating.grids import PARTS, Grid, Part
from errata.editors.core.locating.patched_cells import CellSources, read_cells, runs_ends
from errata.editors.core.locating.recorded_rows import RecordedRows, TracedRows, record
from errata.editors.core.model.activations import without_autocast
from errata.editors.core.model.architecture import Architecture, describe
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.reading import as_read
from errata.editors.core.model.tokens import Tokenizer, answer_ids, locate_subject
from errata.editors.core.progress import Progress, silent
from errata.editors.core.request import SLOT, EditRequest

GRIDS = (Grid("state"), Grid("mlp"), Grid("attention"))
Tokens = Literal["all", "subject_last"]


@dataclass(frozen=True)
class LocatedPrompt:
    """A prompt as the model reads it, with the tokens of its subject.

    Attributes:
        ids: Token ids.
        first: First token of the subject.
        end: One past its last token.
        text: What is read.
        template: The prompt as it was written, with `{}` for the subject.
        join: What stands between prompt and answer; None: see `joining.joined`.
    """

    ids: tuple[int, ...]
    first: int
    end: int
    text: str
    template: str
    join: str | None = None


@dataclass(frozen=True)
class FactTrace:
    """The heat maps of one fact.

    Attributes:
        prompt: The prompt, as read.
        subject: Its subject.
        tokens: The text of each token.
        subject_range: First token of the subject, and one past its last.
        answers: First tokens of the answer and of the other answer, as text.
        answer_ids: Their ids.
        corruption: What the prompt was corrupted by, in words.
        direction: Which run was patched.
        rows: The tokens that the heat maps have a row for.
        clean, corrupted: Scores of both prompts by name: metrics, and the probabilities "answer" and "other".
        grids: {name of the grid: {score: (len(rows), L)}} in float64.
        bases: {name of the grid: scores of the corrupted rows that were patched}; those of `corrupted`, but where the
            noise was drawn twice.
    """

    prompt: str
    subject: str
    tokens: tuple[str, ...]
    subject_range: tuple[int, int]
    answers: tuple[str, str]
    answer_ids: tuple[int, int]
    corruption: str
    direction: Direction
    rows: tuple[int, ...]
    clean: Mapping[str, float]
    corrupted: Mapping[str, float]
    grids: Mapping[str, Mapping[str, Tensor]]
    bases: Mapping[str, Mapping[str, float]]

    def effects(self, grid: str, metric: Metric, *, normalised: bool = False) -> Tensor:
        """Return the effect of every cell, (len(rows), L); see `answer_scores.effect`."""
        corrupted = self.bases[grid][metric]
        return effect(
            metric, self.grids[grid][metric], self.clean[metric], corrupted, self.direction, normalised=normalised
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, heat maps as lists of rows."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "grids"}
        grids = {name: {score: cells.tolist() for score, cells in found.items()} for name, found in self.grids.items()}
        return {**plain, "grids": grids}


@torch.no_grad()
def trace(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    subject: str,
    corruption: Corruption | ScaledNoise,
    *,
    answer: str | None = None,
    chat: bool = False,
    grids: Sequence[Grid] = GRIDS,
    direction: Direction = "denoising",
    tokens: Tokens = "all",
    batch_tokens: int = 8192,
    progress: Progress = silent,
) -> FactTrace:
    """Return the heat maps of one fact, all metrics from one run.

    Args:
        model: A decoder of transformers; edits that are applied to it are traced with it.
        tokenizer: Its fast tokenizer.
        prompt: Text that the answer continues, with `{}` for the subject or the subject itself.
        subject: What the fact is about.
        corruption: `Swap(other subject)`, or `Noise(rule)`; noise in standard deviations of a plain `Noise` counts
            those of the whole vocabulary's embeddings, and `scaled_noise` makes another scale.
        answer: The answer that is asked about; None: what the model says. Its first token counts.
        chat: Whether the prompt is a message to an instruct model.
        grids: What is traced; see `Grid`.
        direction: "denoising" or "noising".
        tokens: Which tokens get a row: "all", or "subject_last".
        batch_tokens: Bound on the tokens that run at once.
        progress: Is told how many tokens are done.

    Raises:
        RequestError: the subject is not in the prompt, or the other subject has another number of tokens or changes
            other tokens.
        ConfigError: an unknown direction, no grid, or noise without its scale.
        ArchitectureError: a block has no MLP or attention that a grid asks for.
    """
    if direction not in DIRECTIONS:
        raise ConfigError(f"unknown direction {direction!r}{did_you_mean(direction, DIRECTIONS)}")
    if not grids:
        raise ConfigError("expected at least one grid to trace")
    architecture = describe(model)
    with evaluating(model), without_autocast():
        located = locate(tokenizer, prompt, subject, chat=chat)
        architecture.check_length(len(located.ids), f"{len(located.ids)} tokens for the prompt", None)
        scaled = scaled_noise(architecture, corruption) if isinstance(corruption, Noise) else corruption
        pair = _runs(architecture, tokenizer, located, scaled, grids, chat)
        answers = _answers(tokenizer, located, pair, answer, scaled)
        scorer = AnswerScorer(answers, pair.clean.logits[0].double().log_softmax(-1))
        rows = tuple(range(len(located.ids))) if tokens == "all" else (located.end - 1,)
        run = _Tracing(architecture, pair, scorer, direction, rows, batch_tokens, progress)
        cells, bases = run.cells(grids)
    return FactTrace(
        prompt=located.text,
        subject=subject,
        tokens=tuple(map(tokenizer.decode, ([token] for token in located.ids))),
        subject_range=(located.first, located.end),
        answers=(tokenizer.decode([answers[0]]), tokenizer.decode([answers[1]])),
        answer_ids=answers,
        corruption=_in_words(scaled),
        direction=direction,
        rows=rows,
        clean=_plain(scorer(pair.clean.logits)),
        corrupted=_plain(scorer(pair.corrupted.logits)),
        grids=cells,
        bases=bases,
    )


def locate(tokenizer: Tokenizer, prompt: str, subject: str, *, chat: bool = False) -> LocatedPrompt:
    """Return a prompt's tokens, with those of its subject.

    Raises:
        RequestError: the subject is not in the prompt, or no token holds it.
    """
    request = EditRequest(prompt, subject, target="?")
    read = as_read(tokenizer, request.text, chat=chat)
    start, end = request.subject_span
    found = locate_subject(tokenizer, read.text, (read.start + start, read.start + end))
    template = SLOT.join(request.template)
    return LocatedPrompt(tuple(found.ids), found.first, found.last + 1, read.text, template, read.join)


def swapped(tokenizer: Tokenizer, located: LocatedPrompt, subject: str, *, chat: bool = False) -> LocatedPrompt:
    """Return the prompt with another subject.

    Args:
        tokenizer: The tokenizer.
        located: The prompt with its own subject.
        subject: The other subject.
        chat: Whether the prompt is a message.

    Raises:
        RequestError: the other subject has another number of tokens, or changes other tokens.
    """
    other = locate(tokenizer, located.template, subject, chat=chat)
    same_place = (other.first, other.end, len(other.ids)) == (located.first, located.end, len(located.ids))
    outside = [i for i in range(len(located.ids)) if not located.first <= i < located.end]
    if not same_place or any(other.ids[i] != located.ids[i] for i in outside):
        raise RequestError(
            f"the other subject {subject!r} has {other.end - other.first} tokens from token {other.first} on, and the "
            f"prompt's own has {located.end - located.first} from token {located.first} on; the two prompts must "
            "differ in the subject's tokens alone",
            field="donor",
        )
    return other


@dataclass(frozen=True)
class _Pair:
    """The runs of a fact: clean, corrupted, and corrupted by the second draw where there is one."""

    clean: RecordedRows
    corrupted: RecordedRows
    second: RecordedRows | None
    first_difference: int


def _runs(
    architecture: Architecture,
    tokenizer: Tokenizer,
    located: LocatedPrompt,
    corruption: ScaledNoise | Swap,
    grids: Sequence[Grid],
    chat: bool,
) -> _Pair:
    """Run the clean and the corrupted rows once."""
    wanted = {part for grid in grids for part in (grid.part, *grid.severed)}
    parts: tuple[Part, ...] = tuple(part for part in PARTS if part in wanted and part != "state")
    keep = runs_ends(architecture)
    ids = torch.tensor([located.ids], device=architecture.device)
    clean = record(architecture, TracedRows(ids), parts, keep_prefix=keep)
    if isinstance(corruption, Swap):
        other = swapped(tokenizer, located, corruption.subject, chat=chat)
        changed = torch.tensor([other.ids], device=ids.device)
        if not bool((changed != ids).any()):
            raise RequestError(f"the other subject {corruption.subject!r} is the same as the prompt's", field="donor")
        first = int((changed != ids)[0].nonzero()[0])
        return _Pair(clean, record(architecture, TracedRows(changed), parts, keep_prefix=keep), None, first)
    noise = corruption.noise
    end = min(len(located.ids), located.end + noise.extra_tokens)
    own = embedded(architecture, located.ids[located.first : end])
    twice = noise.draws == "two" and any(grid.severed for grid in grids)
    runs = []
    for draw in corruption.drawn(end - located.first, own.shape[-1], 1 + twice):
        # As the original: the sum is formed in float64 and then rounded to the precision of the model.
        values = torch.from_numpy(draw).to(own.device)
        values = (values if noise.replaced else own.double() + values).to(own.dtype)
        rows = TracedRows(ids.expand(noise.samples, -1), located.first, values)
        runs.append(record(architecture, rows, parts, keep_prefix=keep))
    return _Pair(clean, runs[0], runs[1] if twice else None, located.first)


def _answers(
    tokenizer: Tokenizer, located: LocatedPrompt, pair: _Pair, answer: str | None, corruption: ScaledNoise | Swap
) -> tuple[int, int]:
    """Return the ids of the answer and of the other answer: their first tokens."""

    def first(text: str) -> int:
        return answer_ids(tokenizer, located.text, text, located.join)[0]

    right = int(pair.clean.logits[0].argmax()) if answer is None else first(answer)
    if isinstance(corruption, Swap) and corruption.answer is not None:
        return right, first(corruption.answer)
    return right, best_other([pair.corrupted.logits], right)


@dataclass(frozen=True)
class _Tracing:
    """The run of all cells of one fact."""

    architecture: Architecture
    pair: _Pair
    scorer: AnswerScorer
    direction: Direction
    rows: tuple[int, ...]
    batch_tokens: int
    progress: Progress

    def cells(self, grids: Sequence[Grid]) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, float]]]:
        """Return the scores of all cells by grid and score, and those of the corrupted rows by grid."""
        second = self.pair.second
        apart = [grid for grid in grids if grid.severed and second is not None]
        together = [grid for grid in grids if grid not in apart]
        found: dict[str, dict[str, Tensor]] = {}
        bases: dict[str, dict[str, float]] = {}
        for some, corrupted in ((together, self.pair.corrupted), (apart, second)):
            if some and corrupted is not None:
                scores = self._scores(some, corrupted)
                base = _plain(self.scorer(corrupted.logits))
                found |= {grid.name: named(cells) for grid, cells in zip(some, scores, strict=True)}
                bases |= {grid.name: base for grid in some}
        return found, bases

    def _scores(self, grids: Sequence[Grid], corrupted: RecordedRows) -> Tensor:
        """Return the scores (grids, len(rows), L, 5)."""
        n_layers = self.architecture.n_layers
        denoises = self.direction == "denoising"
        base, source = (corrupted, self.pair.clean) if denoises else (self.pair.clean, corrupted)
        base = base if denoises else _repeated(base, len(corrupted.logits))
        held = self.pair.corrupted if denoises else base
        sources = CellSources(base, source, held)
        from_below = held is not base
        untouched = self.scorer(base.logits)
        table = untouched.expand(len(grids), len(self.rows), n_layers, -1).clone()
        for row, token in enumerate(self.rows):
            # Before the first token that differs, both runs are the same, so that a patch changes nothing.
            if token >= self.pair.first_difference:
                self._fill(table[:, row], sources, token, grids, from_below)
            self.progress(row + 1, len(self.rows), "tokens")
        return table

    def _fill(self, table: Tensor, sources: CellSources, token: int, grids: Sequence[Grid], from_below: bool) -> None:
        """Fill in the scores (grids, L, 5) of one token."""
        n_layers, is_last = self.architecture.n_layers, token == sources.base.rows.shape[1] - 1
        places, cells = [], []
        for number, grid in enumerate(grids):
            for layer in range(n_layers):
                writes = Grid(grid.part, grid.window, grid.severed, from_below).writes(layer, n_layers)
                if not is_last:  # what the last block gives at an earlier token is read by nothing
                    writes = frozenset(write for write in writes if write.layer < n_layers - 1)
                if writes:
                    places.append((number, layer))
                    cells.append(writes)
        if not cells:
            return
        scores = read_cells(self.architecture, sources, token, cells, self.scorer, batch_tokens=self.batch_tokens)
        for (number, layer), score in zip(places, scores, strict=True):
            table[number, layer] = score


def _repeated(run: RecordedRows, count: int) -> RecordedRows:
    """Return a run of one row as that of several equal rows."""
    if count == 1:
        return run
    return RecordedRows(
        TracedRows(run.rows.ids.expand(count, -1)),
        run.entry.expand(count, -1, -1),
        {part: [states.expand(count, -1, -1) for states in kept] for part, kept in run.outputs.items()},
        [(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)) for keys, values in run.prefix],
        run.form,
        run.logits.expand(count, -1),
    )


def _plain(scores: Tensor) -> dict[str, float]:
    return {name: float(score) for name, score in named(scores).items()}


def _in_words(corruption: ScaledNoise | Swap) -> str:
    if isinstance(corruption, Swap):
        return f"the subject {corruption.subject}"
    noise = corruption.noise
    level = "" if noise.needs_texts else f", level {corruption.level:.4g}"
    return f"noise {noise.rule}{level}, {noise.samples} samples" + (", in place of the embedding" * noise.replaced)
