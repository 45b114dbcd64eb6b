"""Score many probes in few forward passes: the probability of their answers, and teacher-forced correctness.

    scores = score(model, tokenizer, probes)
    scores[0].nll_target < scores[0].nll_other          # the expected answer is the more probable one
    sum(scores[0].target_correct)                       # how many of its tokens are the model's first choice

Scoring an answer needs the model's prediction after the prompt and after each answer token but the last. So a row of
the forward pass is prompt ids + answer ids[:-1], joined as ids. Four things keep the passes few and small, and change
no number:
- A row that begins another row needs no pass of its own: it is read in the longer one.
- All probes that are scored together share rows, also across cases.
- Rows are sorted by length, so that a batch has little padding. The padding is on the right.
- The LM head runs only at the positions that are read.

Example: two probes. The first has the prompt p0 p1 p2, the target a b c and the competing answer d; the second has the
prompt q0 q1 q2, the target x and the competing answer y. Scored one by one, their answers take four rows.

    position     0    1    2    3    4       read at        for the tokens
    row 0        q0   q1   q2   -    -       2              x y                 -: padding
    row 1        p0   p1   p2   a    b       2, 3, 4        a d, b, c

    run     one batch of 2 x 5 positions, the LM head at 4 of them
    shared  the row p0 p1 p2 of the answer d is the beginning of row 1, and q0 q1 q2 is the row of both x and y

All of this assumes that a position depends on the positions before it and on nothing else, as in every causal decoder.
Edits that look ahead say so (`Folded.looks_ahead`). On a model with such an edit nothing is shared, each row ends where
it is read, and no row is padded. In the example that makes the rows p0 p1 p2, p0 p1 p2 a, p0 p1 p2 a b and q0 q1 q2.
That is a row for each token of an answer: the price of scores that equal those of one question at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.editors.core.contexts.asking import AskedPrompt, PromptReader
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import ErrataError, RequestError
from errata.editors.core.ledger.adapter_hooks import looks_ahead
from errata.editors.core.model import tokens
from errata.editors.core.model.activations import batches_by_length, limit_batch_tokens, run_base
from errata.editors.core.model.architecture import Architecture, describe, max_positions
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.reading import ReadPrompt
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.progress import Progress, silent
from errata.evaluate.probes import KINDS, Probe

Model = Any  # a causal language model of transformers

# Logits held at a time: 2^25 in float32 are 128 MiB, for any vocabulary.
_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True)
class ProbeScore:
    """The scores of one probe. For an answer that the probe lacks, `nll` is None and the tuples are empty.

    Attributes:
        nll_target: Mean negative log-probability per token of the target, in nats.
        nll_other: The same for the competing answer.
        target_correct: For each token of the target: is it the most probable one after the prompt and the target's
            tokens before it? False where the model's output is not finite.
        other_correct: The same for the competing answer.
        target_choice: For each token of the target, the id of the most probable token there.
        logprobs: Log-probabilities of the first token after the prompt, (vocabulary,), on the CPU; only on demand.
            Probes with the same prompt share one tensor.
    """

    nll_target: float | None
    nll_other: float | None
    target_correct: tuple[bool, ...]
    other_correct: tuple[bool, ...]
    target_choice: tuple[int, ...] = ()
    logprobs: Tensor | None = None


@dataclass(frozen=True)
class ScoringPlan:
    """Probes as rows of ids, and what to read in them. It depends on the tokenizer alone, and can run many times.

    A read is one position of one row; a want is one token whose probability is read there. Rows are sorted by length,
    reads by row, and wants by read.

    Attributes:
        rows: Token ids.
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


def score(
    model: Model,
    tokenizer: Tokenizer,
    probes: Sequence[Probe],
    *,
    batch_tokens: int = 8192,
    next_token: bool | Collection[str] = False,
    progress: Progress = silent,
) -> list[ProbeScore]:
    """Score both answers of every probe with the model as it is.

    Args:
        model: Any causal decoder of transformers, on any device and in any dtype. The log-softmax is computed in
            float32, or in float64 for a float64 model.
        tokenizer: Its fast tokenizer.
        probes: In any order, from any number of cases. The more at once, the more rows they share.
        batch_tokens: Bound on the tokens of a batch, padding included. More is faster on a GPU and takes more memory.
            A CPU takes at most 1,024 per thread: larger activations leave its caches and take 1.7 times as long.
        next_token: Keep the log-probabilities of the first token after the prompt, for all probes (True) or for those
            of the named kinds. They are one float per vocabulary entry and prompt, so name the kinds that you compare.
        progress: Called after every batch with (rows done, rows in all, what is done).

    Returns:
        One ProbeScore per probe, in their order. A probe without answers has an empty one.

    Raises:
        RequestError: a prompt or an answer has no tokens.
        ErrataError: a row is longer than the model's positions. Nothing has been scored then.
    """
    plan = make_plan(tokenizer, probes, next_token=next_token, model=model)
    return run_plan(model, plan, batch_tokens=batch_tokens, progress=progress)


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
    kinds = (KINDS if next_token else ()) if isinstance(next_token, bool) else next_token
    encoder = _Encoder(tokenizer, model, probes)
    pieces = [encoder.pieces(probe, wants_next=probe.kind in kinds) for probe in probes]
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


@torch.inference_mode()
def run_plan(
    model: Model, plan: ScoringPlan, *, batch_tokens: int = 8192, progress: Progress = silent
) -> list[ProbeScore]:
    """Run a plan on a model. Arguments and errors are those of `score`."""
    _check_lengths(model, plan)
    ahead = looks_ahead(model)
    plan = _unshared(plan) if ahead else plan
    kept = {read for read in plan.first_reads if read is not None}
    parts: list[_Part] = []
    with evaluating(model):
        reader = _Reader(describe(model), plan, kept)
        done = 0
        for group in batches_by_length(plan.rows, limit_batch_tokens(batch_tokens, model.device), even=ahead):
            parts += reader.read(group, done)
            done += len(group)
            progress(done, len(plan.rows), "rows scored")
    return _collect(plan, parts)


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


def _unshared(plan: ScoringPlan) -> ScoringPlan:
    """Return a plan of the same reads, each at the end of a row of its own."""
    ends = [plan.rows[row][: position + 1] for row, position in plan.reads]
    rows = sorted(set(ends), key=lambda row: (len(row), row))
    index = {row: i for i, row in enumerate(rows)}
    reads = sorted(range(len(ends)), key=lambda read: index[ends[read]])  # old indices in their new order
    read_at = {old: i for i, old in enumerate(reads)}
    wants = sorted(range(len(plan.wants)), key=lambda want: read_at[plan.wants[want][0]])
    want_at = {old: i for i, old in enumerate(wants)}
    return replace(
        plan,
        rows=tuple(rows),
        reads=tuple((index[ends[old]], len(ends[old]) - 1) for old in reads),
        wants=tuple((read_at[plan.wants[old][0]], plan.wants[old][1]) for old in wants),
        answers=tuple(tuple(tuple(want_at[want] for want in side) for side in pair) for pair in plan.answers),
        first_reads=tuple(None if read is None else read_at[read] for read in plan.first_reads),
    )


def reads_per_chunk(architecture: Architecture) -> int:
    """Return at how many positions to hold logits at a time."""
    return max(1, _LOGITS_AT_ONCE // int(architecture.head.weight.shape[0]))  # type: ignore[union-attr, operator]


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


@dataclass(frozen=True)
class _Part:
    """Results of some reads: the nll of each want, the most probable id of each read (-1 where not finite), and the
    log-probabilities that are kept."""

    nll: Tensor
    choice: Tensor
    logprobs: dict[int, Tensor]


class _Reader:
    """Runs rows and reads what the plan wants in them."""

    def __init__(self, architecture: Architecture, plan: ScoringPlan, kept: set[int]) -> None:
        self.architecture, self.plan, self.kept = architecture, plan, kept
        self.rows_of_reads = [row for row, _ in plan.reads]
        self.reads_of_wants = [read for read, _ in plan.wants]
        self.chunk = reads_per_chunk(architecture)

    def read(self, group: Sequence[Sequence[int]], start: int) -> Iterator[_Part]:
        """Yield the results of the rows `group`; `start` is the index of the first of them in the plan."""
        batch = tokens.right_padded(group, self.plan.pad).to(self.architecture.device)
        hidden = run_base(self.architecture, batch)  # (rows, length, d)
        first = bisect_left(self.rows_of_reads, start)
        last = bisect_left(self.rows_of_reads, start + len(group))
        for low in range(first, last, self.chunk):
            yield self._part(hidden, start, low, min(low + self.chunk, last))

    def _part(self, hidden: Tensor, start: int, low: int, high: int) -> _Part:
        """Return the results of reads `low` to `high` of the plan. `hidden[0]` is the plan's row `start`."""
        reads = torch.tensor(self.plan.reads[low:high], device=hidden.device)  # (reads, 2)
        logits = self.architecture.logits(hidden[reads[:, 0] - start, reads[:, 1]])  # (reads, V)
        logits = logits.to(working_dtype(logits.dtype))
        total = logits.logsumexp(-1)
        first, last = (bisect_left(self.reads_of_wants, read) for read in (low, high))
        wants = torch.tensor(self.plan.wants[first:last], device=logits.device).reshape(-1, 2)
        rows, ids = wants[:, 0] - low, wants[:, 1]
        finite = total.isfinite()
        return _Part(
            nll=total[rows] - logits[rows, ids],
            choice=torch.where(finite, logits.argmax(-1), -1),
            logprobs={i: (logits[i - low] - total[i - low]).cpu() for i in range(low, high) if i in self.kept},
        )


def _collect(plan: ScoringPlan, parts: list[_Part]) -> list[ProbeScore]:
    """Put the results of all reads together, per probe."""
    # One transfer from the device for the whole plan, not one per batch.
    nll = torch.cat([part.nll for part in parts]).tolist() if parts else []
    choice = torch.cat([part.choice for part in parts]).tolist() if parts else []
    logprobs = {read: tensor for part in parts for read, tensor in part.logprobs.items()}

    def mean(wants: tuple[int, ...]) -> float | None:
        return sum(nll[want] for want in wants) / len(wants) if wants else None

    def choices(wants: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(choice[plan.wants[want][0]] for want in wants)

    def correct(wants: tuple[int, ...]) -> tuple[bool, ...]:
        return tuple(choice[read] == token for read, token in (plan.wants[want] for want in wants))

    return [
        ProbeScore(
            nll_target=mean(target),
            nll_other=mean(other),
            target_correct=correct(target),
            other_correct=correct(other),
            target_choice=choices(target),
            logprobs=None if first is None else logprobs[first],
        )
        for (target, other), first in zip(plan.answers, plan.first_reads, strict=True)
    ]


def _check_lengths(model: Model, plan: ScoringPlan) -> None:
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
