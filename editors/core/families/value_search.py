"""Search for the value that an edit writes: the vector delta that makes the model give the new answer.

    min over delta of  nll(delta) + kl_factor * KL(p_delta || p_0) + weight_decay * ||delta|| / ||v_0||^2

nll is the mean negative log probability of the answer's tokens, averaged over the rows (the prompt in several
contexts). KL compares next-token distributions on the prompt "{subject} is a". v_0 is the untouched value. Adam takes a
limited number of steps. After each, delta is scaled down to the norm clamp_norm_factor * ||v_0|| if it is longer.
(ROME: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 3.1 step 2, equation 4. MEMIT: Meng
et al. 2023, equation 16. The order of the terms of KL, the unsquared norm and the stopping rule are those of the
authors' code.)

All requests are solved together. delta is one (n, d) tensor with one vectorised Adam. Rows are grouped into buckets of
equal suffix length, and only the suffix is run in each step (suffix.py). The head reads only the positions that the
loss needs. A request that is done leaves the batch. Each step synchronises with the device once.

Shapes: n requests, d hidden size, b rows of a bucket, s suffix length, m positions read in a bucket, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import NumericalError
from errata.editors.core.forward.suffix import Site, Suffixes
from errata.editors.core.forward.whole_rows import WholeRows, rows_at_one_position
from errata.editors.core.ledger.adapter_hooks import looks_ahead
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.batching import solve_with_halving
from errata.editors.core.model.own_forward import evaluating, frozen
from errata.editors.core.progress import Progress, silent

# Of ENCORE's code: one token behind five contexts.
PUBLISHED_COUNT = 5


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

    The essence row is the prompt "{subject} is a", cut off after the edited token.
    """

    name: str
    rows: tuple[PromptRow, ...]
    essence: PromptRow


@dataclass(frozen=True)
class Objective:
    """The settings of the search. The configurations of the methods have the same fields, and explain them."""

    v_num_grad_steps: int
    v_lr: float
    v_weight_decay: float
    clamp_norm_factor: float
    kl_factor: float
    stop_loss: float = 0.05
    stop_when_top: int | None = None
    stop_rule: Literal["all", "published"] = "all"


@dataclass
class Target:
    """The result of the search for one request.

    Attributes:
        initial: (d,) the untouched value at the site, v_0.
        delta: (d,) the vector found.
        losses: One {"loss", "nll", "kl", "weight_decay"} per iteration; the last iteration takes no step.
        trace: (iterations, d) delta at the start of each iteration; None without `keep_trace`.
        on_top: Per iteration, how many tokens of the answer are the likeliest, over all written contexts; empty without
            `stop_when_top`.
    """

    initial: Tensor
    delta: Tensor
    losses: list[dict[str, float]] = field(default_factory=list)
    trace: Tensor | None = None
    on_top: list[int] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """Return the search as JSON values, for diagnostics."""
        return {
            "steps": len(self.losses),
            "losses": [entry["loss"] for entry in self.losses],
            "final": self.losses[-1],
            "delta_norm": float(self.delta.norm()),
            "initial_norm": float(self.initial.norm()),
            **({"on_top": self.on_top} if self.on_top else {}),
        }


def find_targets(
    architecture: Architecture,
    problems: Sequence[SearchProblem],
    objective: Objective,
    *,
    layer: int,
    loss_layer: int,
    site: Site,
    pad: int,
    batch_tokens: int = 16384,
    keep_trace: bool = False,
    progress: Progress = silent,
) -> list[Target]:
    """Find the vectors of all problems. Each result is the same as if the problem were solved alone.

    Args:
        architecture: The model.
        problems: One problem per request.
        objective: The settings of the search.
        layer: The edited layer, counted from 0.
        loss_layer: The layer whose output the final norm and the head read.
        site: What delta is added to, at `PromptRow.start` of every row.
        pad: Id to pad prefixes with.
        batch_tokens: Largest number of suffix tokens of the problems that are solved together. If memory runs out, a
            batch is halved until it fits.
        keep_trace: Whether to record `Target.trace`.
        progress: Called before each step.

    Returns:
        One target per problem.

    Raises:
        NumericalError: A loss is NaN or inf; it names the request and the step.
        OutOfMemoryError: Memory does not suffice for a single request.
    """

    def search(chunk: Sequence[SearchProblem]) -> list[Target]:
        buckets, initial = _buckets(architecture, chunk, layer=layer, last=loss_layer, site=site, pad=pad)
        return _Search(architecture, chunk, objective, buckets, initial, keep_trace).run(progress)

    def advice(problem: SearchProblem) -> str:
        return f"request {problem.name}: no memory for its {len(problem.rows)} rows; give fewer contexts"

    with evaluating(architecture.model), frozen(architecture.model):
        return solve_with_halving(_chunks(problems, batch_tokens), search, advice)


@dataclass(frozen=True)
class _Bucket:
    """Rows of one suffix length, and the positions that the loss reads.

    Attributes:
        suffixes: The prepared rows.
        owner: (b,) index of each row's request.
        row, column: (m,) the positions to read. Essence rows read their only position.
        token: (m,) the token to predict there.
        weight: (m,) its weight in the request's mean.
        essence: Whether these are essence rows.
        counted: (m,) whether a read counts for `stop_when_top`: those of written contexts do.
    """

    suffixes: Suffixes | WholeRows
    owner: Tensor
    row: Tensor
    column: Tensor
    token: Tensor
    weight: Tensor
    essence: bool
    counted: Tensor

    def select(self, active: Tensor) -> _Bucket | None:
        """Return the rows of active requests, or None; return the bucket itself if its rows cannot be split."""
        keep = active[self.owner]
        rows = keep.nonzero().squeeze(1)
        if len(rows) in (0, len(keep)):
            return self if len(rows) else None
        suffixes = self.suffixes.select(rows)
        if suffixes is None:
            return self
        reads = keep[self.row]
        renumbered = keep.cumsum(0) - 1  # the index of each kept row among the kept ones
        return _Bucket(
            suffixes,
            self.owner[rows],
            renumbered[self.row[reads]],
            self.column[reads],
            self.token[reads],
            self.weight[reads],
            self.essence,
            self.counted[reads],
        )


class _Search:
    """The optimisation of one chunk of problems. All state is (n, ...) tensors on the model's device."""

    def __init__(
        self,
        architecture: Architecture,
        problems: Sequence[SearchProblem],
        objective: Objective,
        buckets: list[_Bucket],
        initial: Tensor,
        keep_trace: bool,
    ) -> None:
        self.architecture, self.problems, self.objective, self.buckets = architecture, problems, objective, buckets
        self.initial = initial  # (n, d)
        self.delta = torch.zeros_like(self.initial)
        self.first_moment, self.second_moment = torch.zeros_like(self.delta), torch.zeros_like(self.delta)
        self.active = [True] * len(problems)
        self.reference: Tensor | None = None  # (n, V): log p_0, whose rows are filled in the first step
        self.referenced = 0  # rows of it that are filled
        self.targets = [Target(v, v) for v in self.initial]
        self.traces: list[list[Tensor]] | None = [[] for _ in problems] if keep_trace else None
        # How many tokens are the likeliest in this iteration, how many could be, and how often all were.
        self.on_top = self.delta.new_zeros(len(problems))
        self.wanted = [_counted_tokens(problem) for problem in problems]
        self.hits = [0] * len(problems)

    def run(self, progress: Progress) -> list[Target]:
        steps = self.objective.v_num_grad_steps
        for step in range(1, steps + 1):
            safe_point()
            progress(step, steps, f"values of {len(self.problems)} requests")
            last = step == steps
            terms, gradient = self._evaluate(wants_gradient=not last)
            next_active = self._record(terms, step)
            if last or not any(next_active):
                break
            active = torch.tensor(next_active, device=self.delta.device)
            if next_active != self.active:
                self.active = next_active
                self.buckets = [b for bucket in self.buckets if (b := bucket.select(active)) is not None]
            self._adam_step(gradient, step, active)
        for i, target in enumerate(self.targets):
            target.delta = self.delta[i].detach().clone()
            target.trace = torch.stack(self.traces[i]) if self.traces else None
        return self.targets

    def _evaluate(self, *, wants_gradient: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss terms, each (n,), and the gradient (n, d) of their sum with respect to delta."""
        n = len(self.problems)
        self.on_top = self.delta.new_zeros(n)
        gradient = torch.zeros_like(self.delta)
        terms = {name: self.delta.new_zeros(n) for name in ("nll", "kl", "weight_decay")}
        with torch.set_grad_enabled(wants_gradient):
            delta = self.delta.detach().requires_grad_(wants_gradient)
            decay = self.objective.v_weight_decay * delta.norm(dim=1) / self.initial.norm(dim=1) ** 2
            if wants_gradient:
                gradient += torch.autograd.grad(decay.sum(), delta)[0]
            terms["weight_decay"] += decay.detach()
            # One backward pass per bucket: the graphs of all buckets at once would need their memory together.
            for bucket in self.buckets:
                name, values = self._bucket_loss(bucket, delta)  # (n,)
                if wants_gradient:
                    gradient += torch.autograd.grad(values.sum(), delta)[0]
                terms[name] += values.detach()
        return terms, gradient

    def _bucket_loss(self, bucket: _Bucket, delta: Tensor) -> tuple[str, Tensor]:
        """Return the name of the bucket's loss term, and its values (n,)."""
        hidden = bucket.suffixes.run(delta[bucket.owner])  # (b, s, d)
        row, column = (index.to(hidden.device) for index in (bucket.row, bucket.column))
        read = hidden[row, column]  # (m, d)
        logits = bucket.suffixes.readout(read)
        log_p = torch.log_softmax(logits, dim=-1, dtype=working_dtype(logits.dtype))  # (m, V)
        device = log_p.device  # the head may be on another device than the blocks
        if bucket.essence:
            name, values = "kl", self._divergence(bucket, log_p)
        else:
            token, weight = bucket.token.to(device), bucket.weight.to(device)
            if self.objective.stop_when_top is not None:
                is_top = ((log_p.argmax(1) == token) & bucket.counted.to(device)).to(self.on_top)
                self.on_top = self.on_top.index_add(0, bucket.owner[bucket.row], is_top)
            name, values = "nll", -log_p.gather(1, token[:, None]).squeeze(1) * weight
        total = torch.zeros(len(self.problems), dtype=values.dtype, device=device)
        return name, total.index_add(0, bucket.owner[bucket.row].to(device), values).to(delta)

    def _divergence(self, bucket: _Bucket, log_p: Tensor) -> Tensor:
        """Return kl_factor * KL(p_delta || p_0), (b,). The edited distribution comes first, as in the authors' code."""
        owner = bucket.owner.to(log_p.device)
        if self.reference is None:
            self.reference = log_p.new_zeros(len(self.problems), log_p.shape[1])
        if self.referenced < len(self.problems):  # in the first step delta is 0, so that this is p_0
            self.reference[owner] = log_p.detach()
            self.referenced += len(owner)
        reference = self.reference[owner]
        return self.objective.kl_factor * (log_p.exp() * (log_p - reference)).sum(1)

    def _record(self, terms: dict[str, Tensor], step: int) -> list[bool]:
        """Record the losses of the active requests, and return which requests take another step."""
        total = terms["nll"] + terms["kl"] + terms["weight_decay"]
        # `tolist` of one stacked tensor is the step's only synchronisation with the device.
        columns = [total, terms["nll"], terms["kl"], terms["weight_decay"], self.on_top.to(total)]
        table = torch.stack(columns).T.tolist()
        next_active = list(self.active)
        for i, (loss, nll, kl, decay, on_top) in enumerate(table):
            if not self.active[i]:
                continue
            if not abs(loss) < float("inf"):
                raise NumericalError(
                    f"request {self.problems[i].name}: the loss is {loss} at step {step} of the search for its value; "
                    "lower v_lr, or load the model in float32"
                )
            self.targets[i].losses.append({"loss": loss, "nll": nll, "kl": kl, "weight_decay": decay})
            if self.traces is not None:
                self.traces[i].append(self.delta[i].clone())
            next_active[i] = loss >= self.objective.stop_loss and not self._is_on_top(i, round(on_top))
        return next_active

    def _is_on_top(self, i: int, count: int) -> bool:
        """Count an iteration in which the answer is the likeliest; return whether there were enough of them."""
        if self.objective.stop_when_top is None:
            return False
        self.targets[i].on_top.append(count)
        self.hits[i] += count == (PUBLISHED_COUNT if self.objective.stop_rule == "published" else self.wanted[i])
        return self.hits[i] >= self.objective.stop_when_top

    def _adam_step(self, gradient: Tensor, step: int, active: Tensor) -> None:
        """Take a step of Adam (betas 0.9, 0.999, eps 1e-8) for the active requests, then limit the norm of delta.

        The operations follow torch.optim.Adam, for all requests at once.
        """
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        self.first_moment.lerp_(gradient, 1 - beta1)
        self.second_moment.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (self.second_moment.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        moved = self.delta - self.objective.v_lr / (1 - beta1**step) * self.first_moment / scale
        bound = self.objective.clamp_norm_factor * self.initial.norm(dim=1, keepdim=True)
        norm = moved.norm(dim=1, keepdim=True)
        moved = torch.where(norm > bound, moved * bound / norm, moved)
        self.delta = torch.where(active[:, None], moved, self.delta)


def _chunks(problems: Sequence[SearchProblem], batch_tokens: int) -> list[list[SearchProblem]]:
    """Split the problems into chunks of at most `batch_tokens` suffix tokens, in order."""
    chunks: list[list[SearchProblem]] = []
    used = 0
    for problem in problems:
        tokens = sum(row.suffix_length for row in problem.rows) + 1
        if not chunks or used + tokens > batch_tokens:
            chunks.append([])
            used = 0
        chunks[-1].append(problem)
        used += tokens
    return chunks


def _buckets(
    architecture: Architecture, problems: Sequence[SearchProblem], *, layer: int, last: int, site: Site, pad: int
) -> tuple[list[_Bucket], Tensor]:
    """Group the rows of all problems by suffix length, with essence rows in a separate bucket.

    Returns:
        The buckets, and v_0 (n, d): the value of each problem's first row.
    """
    # An edit on the model that looks at whole rows would see padding. Rows of one length have none.
    ahead = looks_ahead(architecture.model)
    gathered: dict[tuple[bool, int, int], list[tuple[int, PromptRow]]] = defaultdict(list)
    for i, problem in enumerate(problems):
        for essence, row in [(True, problem.essence), *((False, row) for row in problem.rows)]:
            gathered[essence, row.suffix_length, len(row.ids) if ahead else 0].append((i, row))
    share = [1.0 / len(problem.rows) for problem in problems]
    buckets = []
    initial: dict[int, Tensor] = {}
    for (essence, *_), members in sorted(gathered.items(), key=lambda item: item[0]):
        rows = [row for _, row in members]
        suffixes = rows_at_one_position(
            architecture,
            [row.ids for row in rows],
            [row.start for row in rows],
            layer=layer,
            last=last,
            site=site,
            pad=pad,
        )
        is_bare = [row is problems[i].rows[0] and len(problems[i].rows) > 1 for i, row in members]
        buckets.append(_bucket(suffixes, [i for i, _ in members], rows, share, essence, is_bare))
        for b, (i, row) in enumerate(members):
            if row is problems[i].rows[0]:
                initial[i] = suffixes.initial[b]
    values = torch.stack([initial[i] for i in range(len(problems))])
    return buckets, values.to(working_dtype(values.dtype))


def _bucket(
    suffixes: Suffixes | WholeRows,
    owner: list[int],
    rows: list[PromptRow],
    share: list[float],
    essence: bool,
    is_bare: list[bool],
) -> _Bucket:
    """Make a bucket from prepared rows; `share[i]` is the weight of one row of request i."""
    reads: list[tuple[int, int, int, float]] = []  # row, column in the suffix, token, weight
    for b, (i, row) in enumerate(zip(owner, rows, strict=True)):
        if essence:
            reads.append((b, 0, 0, 1.0))
        first = row.suffix_length - len(row.answer)
        reads += [(b, first + t, token, share[i] / len(row.answer)) for t, token in enumerate(row.answer)]
    row, column, token, weight = (list(column) for column in zip(*reads, strict=True))
    device = suffixes.initial.device
    return _Bucket(
        suffixes,
        torch.tensor(owner, device=device),
        torch.tensor(row, device=device),
        torch.tensor(column, device=device),
        torch.tensor(token, device=device),
        torch.tensor(weight, device=device, dtype=working_dtype(suffixes.initial.dtype)),
        essence,
        torch.tensor([not is_bare[b] for b in row], device=device),
    )


def _counted_tokens(problem: SearchProblem) -> int:
    """Return how many tokens of the answer are predicted over all written contexts, or over the bare one alone."""
    return len(problem.rows[0].answer) * max(1, len(problem.rows) - 1)
