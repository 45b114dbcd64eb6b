"""Rows of the search for values: what a request asks of the model, and the buckets in which rows run together.

A pass through the blocks costs about as much as some more tokens do: a CPU reads all weights for it, and a GPU waits
for thousands of kernels to be launched. So rows of unequal suffix length share a bucket, padded to the longest, as long
as the padding is cheaper than a further pass (`SearchPace.pass_tokens`). The essence rows, one position each, share one
too.

Shapes: n requests, b rows of a bucket, s longest suffix, m tokens to predict, e essence rows, d hidden size, L
layers of a joint search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.forward.suffix import Edited, Site, Suffixes
from errata.editors.core.forward.whole_rows import WholeRows, rows_at_one_position
from errata.editors.core.ledger.adapter_hooks import looks_ahead
from errata.editors.core.model.architecture import Architecture


@dataclass(frozen=True)
class SearchPace:
    """How a kind of device runs the search.

    Attributes:
        pass_tokens: A pass through the blocks costs as much as this many tokens in a pass.
        read_every: Steps after which the host reads losses. Steps in between keep the device busy, and change nothing
            for requests that are done.
        shrink_at: Share of requests still active at which the others are taken out.
    """

    pass_tokens: int
    read_every: int
    shrink_at: float


# A CPU has nothing to wait for. Measured on one thread: 37 tokens with 135 M parameters, 44 with 1 M.
ON_CPU = SearchPace(pass_tokens=32, read_every=1, shrink_at=1.0)
# Shapes stay fixed until half of the requests are done. Not measured: 10,000 launches take as long as some thousand
# tokens of a model of 1 B parameters.
ON_ACCELERATOR = SearchPace(pass_tokens=4096, read_every=4, shrink_at=0.5)


def pace_for(device: torch.device) -> SearchPace:
    return ON_CPU if device.type == "cpu" else ON_ACCELERATOR


@dataclass(frozen=True)
class PromptRow:
    """One tokenised row of a problem: delta is added at `start`; the last `len(answer)` positions predict `answer`."""

    ids: tuple[int, ...]
    start: int
    answer: tuple[int, ...] = ()

    @property
    def suffix_length(self) -> int:
        return len(self.ids) - self.start


@dataclass(frozen=True)
class SearchProblem:
    """One request: rows that should predict the answer, and the essence row, whose prediction should not change.

    The essence row is the prompt "{subject} is a", cut off after the edited token; None where nothing of it is asked.
    `unit` is the root mean square of what delta is counted in, where that is not v_0.
    """

    name: str
    rows: tuple[PromptRow, ...]
    essence: PromptRow | None
    unit: float | None = None


@dataclass(frozen=True)
class _Member:
    """A row in a bucket. `counted`: whether its answer counts for `stop_when_top`; rows of written contexts do."""

    owner: int
    row: PromptRow
    is_essence: bool
    weight: float
    counted: bool


@dataclass(frozen=True)
class Bucket:
    """Rows that run together, and the positions that the loss reads.

    Attributes:
        suffixes: The prepared rows.
        members: The same rows, on the host.
        owner: (b,) index of each row's request.
        reads: (m + e,) index into the (b * s) positions: first where answers are predicted, then the essence rows'.
        asker: (m,) index of the request that predicts there.
        token: (m,) the token to predict.
        weight: (m,) its weight in the request's mean.
        counted: (m,) whether it counts for `stop_when_top`.
        keepers: (e,) indices of the requests of the essence rows.
    """

    suffixes: Suffixes | WholeRows
    members: tuple[_Member, ...]
    owner: Tensor
    reads: Tensor
    asker: Tensor
    token: Tensor
    weight: Tensor
    counted: Tensor
    keepers: Tensor

    def select(self, place: dict[int, int]) -> Bucket | None:
        """Return the rows of some requests, or None if the rows cannot be split.

        Args:
            place: {index of a request that stays: its new index}.
        """
        kept = [b for b, member in enumerate(self.members) if member.owner in place]
        members = [self.members[b] for b in kept]
        moved = tuple(_Member(place[m.owner], m.row, m.is_essence, m.weight, m.counted) for m in members)
        suffixes = self.suffixes.select(kept) if len(kept) < len(self.members) else self.suffixes
        return None if suffixes is None else _bucket(suffixes, moved)


def select_requests(buckets: Sequence[Bucket], place: dict[int, int]) -> list[Bucket] | None:
    """Return the buckets with the rows of some requests only (see `Bucket.select`), or None if rows cannot be split."""
    wanted = [bucket for bucket in buckets if any(member.owner in place for member in bucket.members)]
    kept = [bucket.select(place) for bucket in wanted]
    found = [bucket for bucket in kept if bucket is not None]
    return found if len(found) == len(wanted) else None


def make_buckets(
    architecture: Architecture,
    problems: Sequence[SearchProblem],
    *,
    layer: Edited,
    last: int,
    site: Site,
    pad: int,
    pass_tokens: int,
) -> tuple[list[Bucket], Tensor]:
    """Prepare the rows of all problems, in as many buckets as are worth their passes.

    Returns:
        The buckets, and v_0 (n, d) or (n, L, d): the value of each problem's first row.
    """
    members = [member for i, problem in enumerate(problems) for member in _members(i, problem)]
    # An edit on the model that looks at whole rows would see padding. Rows of one length have none.
    ahead = looks_ahead(architecture.model)
    lengths = [member.row.suffix_length for member in members]
    whole = [len(member.row.ids) if ahead else 0 for member in members]
    keys = list(zip(padded_lengths(lengths, 0 if ahead else pass_tokens), whole, strict=True))
    buckets = []
    initial: dict[int, Tensor] = {}
    for key in sorted(set(keys)):
        group = tuple(member for member, own in zip(members, keys, strict=True) if own == key)
        rows, starts = [member.row.ids for member in group], [member.row.start for member in group]
        suffixes = rows_at_one_position(architecture, rows, starts, layer=layer, last=last, site=site, pad=pad)
        buckets.append(_bucket(suffixes, group))
        for b, member in enumerate(group):
            if member.row is problems[member.owner].rows[0]:
                initial[member.owner] = suffixes.initial[b]
    values = torch.stack([initial[i] for i in range(len(problems))])
    return buckets, values.to(working_dtype(values.dtype))


def units(problems: Sequence[SearchProblem], initial: Tensor, *, relative: bool) -> tuple[Tensor, Tensor]:
    """Return what a search counts in, and the length in these units that weight decay and clamp refer to.

    Args:
        problems: The problems.
        initial: (n, d) v_0 of each, or (n, L, d).
        relative: Whether v_0's root mean square is the unit of problems that have none of their own, and not 1.

    Returns:
        (n, 1) each, or (n, L, 1).
    """
    unit = initial.square().mean(dim=-1, keepdim=True).sqrt() if relative else torch.ones_like(initial[..., :1])
    length = (initial / unit).norm(dim=-1, keepdim=True)
    for i, problem in enumerate(problems):
        if problem.unit is not None:
            unit[i], length[i] = problem.unit, initial.shape[-1] ** 0.5
    return unit, length


def padded_lengths(lengths: Sequence[int], pass_tokens: int) -> list[int]:
    """Return the length that each row is padded to, so that all passes together cost least.

    A pass costs `pass_tokens` and its rows times their padded length. Rows of one length stay together.
    """
    distinct = sorted(set(lengths))
    number = Counter(lengths)
    counts = list(accumulate((number[length] for length in distinct), initial=0))
    best: list[tuple[int, int]] = [(0, 0)]  # for the k shortest lengths: the cost, and where their last group begins
    for k, longest in enumerate(distinct, 1):
        costs = [(best[j][0] + pass_tokens + (counts[k] - counts[j]) * longest, j) for j in range(k)]
        best.append(min(costs))
    padded: dict[int, int] = {}
    end = len(distinct)
    while end:
        begin = best[end][1]
        padded |= dict.fromkeys(distinct[begin:end], distinct[end - 1])
        end = begin
    return [padded[length] for length in lengths]


def _members(index: int, problem: SearchProblem) -> list[_Member]:
    several = len(problem.rows) > 1
    rows = [
        _Member(index, row, False, 1 / len(problem.rows) / max(1, len(row.answer)), counted=not (several and i == 0))
        for i, row in enumerate(problem.rows)
    ]
    if problem.essence is None:
        return rows
    return [*rows, _Member(index, problem.essence, True, 1.0, counted=False)]


def _bucket(suffixes: Suffixes | WholeRows, members: tuple[_Member, ...]) -> Bucket:
    width = suffixes.length
    reads: list[tuple[int, _Member, int]] = []  # index of a position, who reads it, the token that follows
    for b, member in enumerate(members):
        answer = member.row.answer
        first = b * width + member.row.suffix_length - len(answer)
        reads += [(first + t, member, token) for t, token in enumerate(answer)]
    essence = [(b * width, member) for b, member in enumerate(members) if member.is_essence]
    device, dtype = suffixes.initial.device, working_dtype(suffixes.initial.dtype)
    return Bucket(
        suffixes,
        members,
        owner=torch.tensor([member.owner for member in members], device=device),
        reads=torch.tensor([index for index, *_ in (*reads, *essence)], device=device),
        asker=torch.tensor([member.owner for _, member, _ in reads], device=device, dtype=torch.int64),
        token=torch.tensor([token for *_, token in reads], device=device, dtype=torch.int64),
        weight=torch.tensor([member.weight for _, member, _ in reads], device=device, dtype=dtype),
        counted=torch.tensor([member.counted for _, member, _ in reads], device=device, dtype=torch.bool),
        keepers=torch.tensor([member.owner for _, member in essence], device=device, dtype=torch.int64),
    )
