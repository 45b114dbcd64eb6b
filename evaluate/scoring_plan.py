"""The plan of a scoring: probes as rows of token ids, and what to read in them. No model runs here.

What a plan saves, and an example, is told in scoring.py, which runs it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from errata.editors.core.contexts.asking import AskedPrompt, PromptReader
from errata.editors.core.errors import ErrataError, RequestError
from errata.editors.core.model import tokens
from errata.editors.core.model.architecture import max_positions
from errata.editors.core.model.reading import ReadPrompt
from errata.editors.core.model.tokens import Tokenizer
from errata.evaluate.probes import FIRST_TOKEN_ALONE, Probe

Model = Any  # a causal language model of transformers


@dataclass(frozen=True)
class ScoringPlan:
    """Probes as rows of ids, and what to read in them. It depends on the tokenizer alone, and can run many times.

    A read is one position of one row; a want is one token whose probability is read there. Rows are sorted by length,
    reads by row, and wants by read.

    Attributes:
        rows: Token ids.
        owners: For each row, the edit that it is run with: an index of `RowPatches.patches`, or UNTOUCHED; empty where
            all rows are run with the model as it is.
        reads: (row, position) of each read.
        wants: (read, token id) of each want.
        answers: For each probe, the wants of its target and those of its other answer.
        first_reads: For each probe, the read after its prompt if its next token is asked for, else None.
        pad: Id to pad with.
        longest: A probe that needs the longest row, for messages.
    """

    rows: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, int], ...]
    wants: tuple[tuple[int, int], ...]
    answers: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    first_reads: tuple[int | None, ...]
    pad: int
    longest: Probe | None = None
    owners: tuple[int, ...] = ()


def make_plan(
    tokenizer: Tokenizer,
    probes: Sequence[Probe],
    *,
    next_token: bool | Collection[str] = False,
    model: Model | None = None,
) -> ScoringPlan:
    """Tokenise probes and find the fewest rows in which all can be read. Arguments and errors are those of `score`.

    With a model, prompts are read behind the facts that edits put before them (`core/contexts`). The plan is then one
    for the model as it stands.
    """
    tokens.check_tokenizer(tokenizer)
    encoder = _Encoder(tokenizer, model, probes)
    pieces = [encoder.pieces(probe, wants_next=_wants_next(probe, next_token)) for probe in probes]
    # A row that begins a longer one is read in that: its host.
    rows, host = shared_rows({row for piece in pieces for row in piece.rows()})
    wanted: dict[tuple[int, int], dict[int, None]] = {}
    for piece in pieces:
        for row, position, token in piece.reads():
            ids = wanted.setdefault((host[row], position), {})  # a dict, as an ordered set
            if token is not None:
                ids[token] = None
    reads = sorted(wanted)
    read_at = {read: i for i, read in enumerate(reads)}
    wants = [(i, token) for i, read in enumerate(reads) for token in wanted[read]]
    want_at = {want: i for i, want in enumerate(wants)}

    def wants_of(piece: _Pieces, answer: list[int]) -> tuple[int, ...]:
        if not answer:
            return ()
        row, start = host[piece.row(answer)], len(piece.prompt) - 1
        return tuple(want_at[read_at[row, start + i], token] for i, token in enumerate(answer))

    return ScoringPlan(
        rows=tuple(rows),
        reads=tuple(reads),
        wants=tuple(wants),
        answers=tuple((wants_of(piece, piece.target), wants_of(piece, piece.other)) for piece in pieces),
        first_reads=tuple(read_at[host[p.prompt], len(p.prompt) - 1] if p.wants_next else None for p in pieces),
        pad=tokens.pad_id(tokenizer),
        longest=max(zip(probes, pieces, strict=True), key=lambda pair: pair[1].length, default=(None, None))[0],
    )


def _wants_next(probe: Probe, next_token: bool | Collection[str]) -> bool:
    return next_token if isinstance(next_token, bool) else probe.kind in next_token


def unscorable_reasons(
    model: Model, tokenizer: Tokenizer, probes: Sequence[Probe], new_tokens: Sequence[int] | None = None
) -> list[str | None]:
    """Return for every probe why it cannot be scored; None if it can.

    Args:
        model: The model.
        tokenizer: Its fast tokenizer.
        probes: The probes.
        new_tokens: For each probe, how many tokens must fit after its prompt, for a generation; by default 0.
    """
    encoder, limit = _Encoder(tokenizer, model), max_positions(model)
    found: list[str | None] = []
    for probe, new in zip(probes, new_tokens or [0] * len(probes), strict=True):
        try:
            pieces = encoder.pieces(probe, wants_next=True)
        except RequestError as error:
            found.append(str(error))
            continue
        length = max(pieces.length, len(pieces.prompt) + new)
        found.append(_too_long(probe, length, limit) if limit is not None and length > limit else None)
    return found


def shared_rows(rows: Collection[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], int]]:
    """Return the rows that begin no other row, sorted by length; and for every row the index of one that it begins (or
    is)."""
    # In sorted order, a row that begins others comes right before one of them: one backward sweep finds the longest.
    ordered = sorted(rows)
    longest: dict[tuple[int, ...], tuple[int, ...]] = {}
    following: tuple[int, ...] = ()
    for row in reversed(ordered):
        longest[row] = longest[following] if following[: len(row)] == row and following else row
        following = row
    kept = sorted(set(longest.values()), key=lambda row: (len(row), row))
    index = {row: i for i, row in enumerate(kept)}
    return kept, {row: index[longest[row]] for row in ordered}


def joined(plans: Sequence[tuple[int, ScoringPlan]]) -> ScoringPlan:
    """Return one plan for several, each with the owner of its rows. Rows of different owners stay apart.

    Rows of different owners with the same ids stand side by side, so that they come into one batch. The probes are
    those of the first plan, then those of the second, and so on.
    """
    rows = [(row, owner) for owner, plan in plans for row in plan.rows]
    return _reordered(
        ScoringPlan(
            rows=tuple(row for row, _ in rows),
            owners=tuple(owner for _, owner in rows),
            reads=tuple((row + at, position) for at, plan in _offsets(plans, "rows") for row, position in plan.reads),
            wants=tuple((read + at, token) for at, plan in _offsets(plans, "reads") for read, token in plan.wants),
            answers=tuple(
                (tuple(want + at for want in target), tuple(want + at for want in other))
                for at, plan in _offsets(plans, "wants")
                for target, other in plan.answers
            ),
            first_reads=tuple(
                None if read is None else read + at
                for at, plan in _offsets(plans, "reads")
                for read in plan.first_reads
            ),
            pad=plans[0][1].pad,
            longest=max((plan for _, plan in plans), key=_length).longest,
        )
    )


def unshared(plan: ScoringPlan) -> ScoringPlan:
    """Return a plan of the same reads, each at the end of a row of its own."""
    ends = [(plan.rows[row][: position + 1], plan.owners[row] if plan.owners else None) for row, position in plan.reads]
    rows = list(dict.fromkeys(ends))
    index = {row: i for i, row in enumerate(rows)}
    owners = tuple(owner for _, owner in rows if owner is not None)
    return _reordered(
        replace(
            plan,
            rows=tuple(row for row, _ in rows),
            owners=owners,
            reads=tuple((index[end], len(end[0]) - 1) for end in ends),
        )
    )


def _length(plan: ScoringPlan) -> int:
    """Return the length of the longest row."""
    return len(plan.rows[-1]) if plan.rows else 0


def _offsets(
    plans: Sequence[tuple[int, ScoringPlan]], name: Literal["rows", "reads", "wants"]
) -> Iterator[tuple[int, ScoringPlan]]:
    """Yield each plan with how many rows, reads or wants the plans before it have."""
    before = 0
    for _, plan in plans:
        yield before, plan
        before += len(getattr(plan, name))


def _reordered(plan: ScoringPlan) -> ScoringPlan:
    """Return a plan with rows sorted by length, reads by row, and wants by read."""
    owners = plan.owners or (0,) * len(plan.rows)
    rows = sorted(range(len(plan.rows)), key=lambda i: (len(plan.rows[i]), plan.rows[i], owners[i]))
    row_at = {old: i for i, old in enumerate(rows)}
    reads = sorted(range(len(plan.reads)), key=lambda i: row_at[plan.reads[i][0]])  # old indices in their new order
    read_at = {old: i for i, old in enumerate(reads)}
    wants = sorted(range(len(plan.wants)), key=lambda want: read_at[plan.wants[want][0]])
    want_at = {old: i for i, old in enumerate(wants)}
    return replace(
        plan,
        rows=tuple(plan.rows[old] for old in rows),
        owners=tuple(owners[old] for old in rows) if plan.owners else (),
        reads=tuple((row_at[plan.reads[old][0]], plan.reads[old][1]) for old in reads),
        wants=tuple((read_at[plan.wants[old][0]], plan.wants[old][1]) for old in wants),
        answers=tuple(tuple(tuple(want_at[want] for want in side) for side in pair) for pair in plan.answers),
        first_reads=tuple(None if read is None else read_at[read] for read in plan.first_reads),
    )


@dataclass(frozen=True)
class _Pieces:
    """The ids of one probe. An answer that it lacks is empty."""

    prompt: tuple[int, ...]
    target: list[int]
    other: list[int]
    wants_next: bool

    def row(self, answer: list[int]) -> tuple[int, ...]:
        return (*self.prompt, *answer[:-1])

    @property
    def length(self) -> int:
        """Length of the longest row; 0 if there is none."""
        return max(map(len, self.rows()), default=0)

    def rows(self) -> Iterator[tuple[int, ...]]:
        yield from (self.row(answer) for answer in (self.target, self.other) if answer)
        if self.wants_next:
            yield self.prompt

    def reads(self) -> Iterator[tuple[tuple[int, ...], int, int | None]]:
        """Yield (row, position, token wanted there); the token is None where only the distribution is wanted."""
        start = len(self.prompt) - 1
        for answer in (self.target, self.other):
            row = self.row(answer)
            yield from ((row, start + i, token) for i, token in enumerate(answer))
        if self.wants_next:
            yield self.prompt, start, None


class _Encoder:
    """Tokenises probes, each distinct text once. A model is given for the facts on it; arguments as of PromptReader."""

    def __init__(self, tokenizer: Tokenizer, model: Model | None = None, probes: Sequence[Probe] = ()) -> None:
        self.tokenizer = tokenizer
        self.reader = PromptReader(tokenizer, model, [_asked(probe) for probe in probes])
        self.prompts: dict[tuple[str, bool, str | None], tuple[ReadPrompt, tuple[int, ...]]] = {}
        self.answers: dict[tuple[str, str, str | None], list[int]] = {}

    def pieces(self, probe: Probe, *, wants_next: bool) -> _Pieces:
        read, prompt = self._prompt(probe)
        try:
            target, other = (self._answer(read, answer) for answer in (probe.target, probe.other))
            target = target[:1] if probe.kind in FIRST_TOKEN_ALONE else target
            return _Pieces(prompt, target, other, wants_next)
        except RequestError as error:
            message = f"an answer of the {probe.kind} probe {probe.prompt!r}: {error.message}"
            raise RequestError(message, field=error.field) from error

    def _prompt(self, probe: Probe) -> tuple[ReadPrompt, tuple[int, ...]]:
        key = (probe.prompt, probe.chat, probe.join)
        if key not in self.prompts:
            read = self.reader.read(_asked(probe))
            self.prompts[key] = (read, tuple(tokens.prompt_ids(self.tokenizer, read.text)))
        if not self.prompts[key][1]:
            raise RequestError(f"the prompt {probe.prompt!r} of a {probe.kind} probe has no tokens", field="prompt")
        return self.prompts[key]

    def _answer(self, read: ReadPrompt, answer: str | None) -> list[int]:
        if answer is None:
            return []
        key = (read.text, answer, read.join)
        if key not in self.answers:
            self.answers[key] = tokens.answer_ids(self.tokenizer, read.text, answer, read.join)
        return self.answers[key]


def _asked(probe: Probe) -> AskedPrompt:
    return AskedPrompt(probe.prompt, probe.chat, probe.join)


def check_lengths(model: Model, plan: ScoringPlan) -> None:
    """Refuse rows that the model has no positions for.

    Such a row would raise an index error, and on a GPU that ends the process.
    """
    limit = max_positions(model)
    if plan.rows and limit is not None and len(plan.rows[-1]) > limit:
        raise ErrataError(_too_long(plan.longest, len(plan.rows[-1]), limit) + "; drop the record that it comes from")


def _too_long(probe: Probe | None, length: int, limit: int) -> str:
    which = "" if probe is None else f" in the {probe.kind} probe {_shortened(probe.prompt)!r}"
    expected = f"expected prompts with their answers of at most {limit} tokens, the positions of this model"
    return f"{expected}, got {length}{which}"


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
