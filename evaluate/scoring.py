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
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.forward.row_patches import RowPatches
from errata.editors.core.ledger.adapter_hooks import looks_ahead
from errata.editors.core.model import tokens
from errata.editors.core.model.activations import batches_by_length, limit_batch_tokens, run_base
from errata.editors.core.model.architecture import Architecture, describe
from errata.editors.core.model.own_forward import evaluating
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.progress import Progress, silent
from errata.evaluate.probes import Probe
from errata.evaluate.scoring_plan import Model, ScoringPlan, check_lengths, joined, make_plan, unshared

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


def score_edited(
    patches: RowPatches,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[int, Sequence[Probe]]],
    *,
    batch_tokens: int = 8192,
    next_token: bool | Collection[str] = False,
) -> list[list[ProbeScore]]:
    """Score probes of several edits together, each with the model as its own edit makes it.

    Args:
        patches: The edits. The model carries none of them.
        tokenizer: The model's fast tokenizer.
        asked: Probes with the edit that they are asked of: an index of `patches`, or UNTOUCHED.
        batch_tokens: As of `score`.
        next_token: As of `score`.

    Returns:
        For each entry of `asked` the scores of its probes, equal to those of `score` up to rounding.

    Raises:
        RequestError, ErrataError: as `score`.
    """
    if not asked:
        return []
    model = patches.architecture.model
    plans = [(owner, make_plan(tokenizer, probes, next_token=next_token, model=model)) for owner, probes in asked]
    found = iter(run_plan(model, joined(plans), batch_tokens=batch_tokens, patches=patches))
    return [[next(found) for _ in probes] for _, probes in asked]


@torch.inference_mode()
def run_plan(
    model: Model,
    plan: ScoringPlan,
    *,
    batch_tokens: int = 8192,
    patches: RowPatches | None = None,
    progress: Progress = silent,
) -> list[ProbeScore]:
    """Run a plan on a model, with `patches` if its rows have owners. Arguments and errors are those of `score`."""
    check_lengths(model, plan)
    ahead = looks_ahead(model) if patches is None else patches.looks_ahead
    plan = unshared(plan) if ahead else plan
    kept = {read for read in plan.first_reads if read is not None}
    parts: list[_Part] = []
    with evaluating(model):
        reader = _Reader(describe(model), plan, kept, patches)
        done = 0
        for group in batches_by_length(plan.rows, limit_batch_tokens(batch_tokens, model.device), even=ahead):
            parts += reader.read(group, done)
            done += len(group)
            progress(done, len(plan.rows), "rows scored")
    return _collect(plan, parts)


def reads_per_chunk(architecture: Architecture) -> int:
    """Return at how many positions to hold logits at a time."""
    return max(1, _LOGITS_AT_ONCE // int(architecture.head.weight.shape[0]))  # type: ignore[union-attr, operator]


@dataclass(frozen=True)
class _Part:
    """Results of some reads: the nll of each want, the most probable id of each read (-1 where not finite), and the
    log-probabilities that are kept."""

    nll: Tensor
    choice: Tensor
    logprobs: dict[int, Tensor]


class _Reader:
    """Runs rows and reads what the plan wants in them."""

    def __init__(
        self, architecture: Architecture, plan: ScoringPlan, kept: set[int], patches: RowPatches | None
    ) -> None:
        self.architecture, self.plan, self.kept, self.patches = architecture, plan, kept, patches
        self.rows_of_reads = [row for row, _ in plan.reads]
        self.reads_of_wants = [read for read, _ in plan.wants]
        self.chunk = reads_per_chunk(architecture)

    def read(self, group: Sequence[Sequence[int]], start: int) -> Iterator[_Part]:
        """Yield the results of the rows `group`; `start` is the index of the first of them in the plan."""
        hidden = self._hidden(group, self.plan.owners[start : start + len(group)])
        first = bisect_left(self.rows_of_reads, start)
        last = bisect_left(self.rows_of_reads, start + len(group))
        for low in range(first, last, self.chunk):
            yield self._part(hidden, start, low, min(low + self.chunk, last))

    def _hidden(self, rows: Sequence[Sequence[int]], owners: Sequence[int]) -> Tensor:
        """Return the decoder's output (rows, length, d)."""
        if self.patches is not None:
            return self.patches.hidden_states(rows, owners, self.plan.pad)
        return run_base(self.architecture, tokens.right_padded(rows, self.plan.pad).to(self.architecture.device))

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
