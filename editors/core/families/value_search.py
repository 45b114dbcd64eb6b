"""Search for the value that an edit writes: the vector delta that makes the model give the new answer.

    min over delta of  nll(delta) + kl_factor * KL(p_delta || p_0) + weight_decay * ||delta|| / ||v_0||^2

nll is the mean negative log probability of the answer's tokens, averaged over the rows (the prompt in several
contexts). KL compares next-token distributions on the prompt "{subject} is a". v_0 is the untouched value. Adam takes a
limited number of steps. After each, delta is scaled down to the norm clamp_norm_factor * ||v_0|| if it is longer.
(ROME: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 3.1 step 2, equation 4. MEMIT: Meng
et al. 2023, equation 16. The order of the terms of KL, the unsquared norm and the stopping rule are those of the
authors' code.)

All requests are solved together. delta is one (n, d) tensor with one vectorised Adam. Only the suffixes of rows run in
each step (suffix.py), in as few buckets as pay (search_rows.py). The head reads only the positions that the loss needs.
The device decides which requests are done, and moves their delta no more. The host reads losses and decisions from time
to time (`SearchPace`), which is the only synchronisation, and takes requests that are done out of the batch.

A joint search finds one vector for each of several layers at once. delta is then (n, L, d), each vector has the clamp
of its own layer, and the weight decay is the mean over the layers. L = 1 gives what the search at one layer gives.

Where a norm stands behind the site, the length of v_0 means nothing, since norm(c v) = norm(v). It is 250 to 1,000
in the testbed's model of Gemma 3's shape, where steps of v_lr = 0.3 led nowhere. There the search is relative: delta
and v_0 are counted in units of v_0's root mean square, and so are v_lr and the weight decay.

`v_relative` asks for the same elsewhere. Adam's steps have an absolute length, of about v_lr per element, and models
differ in the lengths of their hidden states (numbers in docs/testbed.md).

Shapes: n requests, L layers of a joint search, d hidden size, b rows of a bucket, s longest suffix, m answer positions
and e essence rows of a bucket, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from errata.editors.core import ranks
from errata.editors.core.dtypes import working_dtype
from errata.editors.core.errors import NumericalError
from errata.editors.core.families.search_rows import (
    Bucket,
    SearchPace,
    SearchProblem,
    make_buckets,
    pace_for,
    select_requests,
    units,
)
from errata.editors.core.forward.suffix import Edited, Site
from errata.editors.core.ledger.interrupts import safe_point
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.batching import solve_with_halving
from errata.editors.core.model.own_forward import evaluating, frozen
from errata.editors.core.progress import Progress, silent

# Of ENCORE's code: one token behind five contexts.
PUBLISHED_COUNT = 5
# Logits of one step, for any vocabulary: 2^28 in float32 are 1 GiB. The loss and its gradient take some times as much.
_LOGITS_AT_ONCE = 2**28
# Of torch.optim.Adam.
ADAM_EPSILON = 1e-8


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
    nll_when_top: float | None = None
    stop_kl: float = 0.01


@dataclass
class Target:
    """The result of the search for one request.

    Attributes:
        initial: (d,) the untouched value at the site, v_0; (L, d) of a joint search.
        delta: (d,) the vector found; (L, d) of a joint search.
        losses: One {"loss", "nll", "kl", "weight_decay"} per iteration; the last iteration takes no step. With
            `nll_when_top` also "weighted_nll", the nll as the loss counts it.
        trace: (iterations, *delta.shape) delta at the start of each iteration; None without `keep_trace`.
        on_top: Per iteration, how many tokens of the answer are the likeliest, over all written contexts; empty without
            `stop_when_top`.
        found_norm: The norm of the value found, if it has been given another (anchored_values.py).
        anchor: The norm that it has been given.
        is_dropped: Whether it was too long, and was left as it was before the search.
    """

    initial: Tensor
    delta: Tensor
    losses: list[dict[str, float]] = field(default_factory=list)
    trace: Tensor | None = None
    on_top: list[int] = field(default_factory=list)
    found_norm: float | None = None
    anchor: float | None = None
    is_dropped: bool = False

    def to(self, device: torch.device | str) -> Target:
        """Return the result with its tensors on a device."""
        trace = None if self.trace is None else self.trace.to(device)
        return replace(self, initial=self.initial.to(device), delta=self.delta.to(device), trace=trace)

    def report(self) -> dict[str, Any]:
        """Return the search as JSON values, for diagnostics."""
        return {
            "steps": len(self.losses),
            "losses": [entry["loss"] for entry in self.losses],
            "final": self.losses[-1],
            "delta_norm": float(self.delta.norm()),
            "initial_norm": float(self.initial.norm()),
            **({"on_top": self.on_top} if self.on_top else {}),
            **({} if self.anchor is None else self._anchored()),
        }

    def _anchored(self) -> dict[str, Any]:
        return {"found_norm": self.found_norm, "anchor": self.anchor, "dropped": self.is_dropped}


def find_targets(
    architecture: Architecture,
    problems: Sequence[SearchProblem],
    objective: Objective,
    *,
    layer: Edited,
    loss_layer: int,
    site: Site,
    pad: int,
    batch_tokens: int = 16384,
    relative: bool = False,
    keep_trace: bool = False,
    progress: Progress = silent,
    pace: SearchPace | None = None,
) -> list[Target]:
    """Find the vectors of all problems. Each result is the same as if the problem were solved alone, to rounding.

    Several ranks (ranks.py) share the problems.

    Args:
        architecture: The model.
        problems: One problem per request.
        objective: The settings of the search.
        layer: The edited layer, counted from 0; several, ascending, for a joint search at site "mlp".
        loss_layer: The layer whose output the final norm and the head read.
        site: What delta is added to, at `PromptRow.start` of every row.
        pad: Id to pad prefixes with.
        batch_tokens: Largest number of suffix tokens of the problems that are solved together, padding counted. If
            memory runs out, a batch is halved until it fits.
        relative: Whether to search in units of v_0's root mean square, as behind a norm, or in the problem's own.
        keep_trace: Whether to record `Target.trace`.
        progress: Called before each step.
        pace: How the device runs the search; by default as is best for its kind.

    Returns one target per problem.

    Raises:
        NumericalError: A loss is NaN or inf; it names the request and the step.
        OutOfMemoryError: Memory does not suffice for a single request.
    """
    chosen = pace or pace_for(architecture.device)

    def search(chunk: Sequence[SearchProblem]) -> list[Target]:
        buckets, initial = make_buckets(
            architecture, chunk, layer=layer, last=loss_layer, site=site, pad=pad, pass_tokens=chosen.pass_tokens
        )
        unit, length = units(chunk, initial, relative=relative)
        return _Search(chunk, objective, chosen, buckets, initial / unit, unit, length, keep_trace).run(progress)

    def advice(problem: SearchProblem) -> str:
        return f"request {problem.name}: no memory for its {len(problem.rows)} rows; give fewer contexts"

    def share(own: Sequence[SearchProblem]) -> list[Target]:
        most_reads = _LOGITS_AT_ONCE // int(architecture.head.weight.shape[0])  # type: ignore[operator]
        return solve_with_halving(_chunks(own, batch_tokens, most_reads), search, advice)

    with evaluating(architecture.model), frozen(architecture.model):
        targets = ranks.share_out(problems, share)
    return targets if ranks.count() == 1 else [target.to(architecture.device) for target in targets]


class _Search:
    """The optimisation of one chunk of problems.

    `present` are the indices of the n requests that are still in the batch, on the host. All else is (n, ...) tensors
    on the model's device, one row per present request.
    """

    def __init__(
        self,
        problems: Sequence[SearchProblem],
        objective: Objective,
        pace: SearchPace,
        buckets: list[Bucket],
        initial: Tensor,
        unit: Tensor,
        length: Tensor,
        keep_trace: bool,
    ) -> None:
        self.problems, self.objective, self.pace, self.buckets = problems, objective, pace, buckets
        self.present = list(range(len(problems)))
        self.running = [True] * len(problems)  # of the present requests, as far as the host has read
        self.initial = initial  # (n, d), or (n, L, d) of a joint search; in units, as delta and its moments are
        self.unit = unit  # (n, 1) or (n, L, 1)
        self.length = length  # as unit: what weight decay and clamp refer to
        self.delta = torch.zeros_like(initial)
        self.first_moment, self.second_moment = torch.zeros_like(initial), torch.zeros_like(initial)
        self.active = torch.ones(len(problems), dtype=torch.bool, device=initial.device)
        self.reference: Tensor | None = None  # (n, V)
        self.targets = [Target(v, v) for v in initial * unit]
        self.traces: list[list[Tensor]] | None = [[] for _ in problems] if keep_trace else None
        # How many tokens of the answer must be the likeliest, how many are, and in how many steps enough were.
        self.wanted = torch.tensor([self._wanted(problem) for problem in problems], device=initial.device)
        self.on_top = torch.zeros_like(self.wanted)
        self.hits = torch.zeros_like(self.wanted)
        # PMET: how many tokens there are in all contexts, how many are the likeliest, and what the nll counts.
        tokens = [sum(len(row.answer) for row in problem.rows) for problem in problems]
        self.tokens = torch.tensor(tokens, device=initial.device)
        self.leading = torch.zeros_like(self.tokens)
        self.share = torch.ones(len(problems), dtype=initial.dtype, device=initial.device)
        self.unweighted_nll = torch.zeros_like(self.share)
        self.unread: list[Tensor] = []  # a table (n, 7) per step that the host has not read

    def run(self, progress: Progress) -> list[Target]:
        steps = self.objective.v_num_grad_steps
        for step in range(1, steps + 1):
            safe_point()
            self.step = step
            progress(step, steps, f"values of {len(self.problems)} requests")
            last = step == steps
            terms, gradient = self._evaluate(wants_gradient=not last)
            self._record(terms)
            if last or step % self.pace.read_every == 0:
                self._read(step)
            if last or not any(self.running):
                break
            self._adam_step(gradient, step)
            self._shrink()
        self._hand_over(range(len(self.present)))
        return self.targets

    def _evaluate(self, *, wants_gradient: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss terms, each (n,), and the gradient of their sum with respect to delta, of its shape."""
        self.on_top, self.leading = torch.zeros_like(self.on_top), torch.zeros_like(self.leading)
        self.unweighted_nll = self.delta.new_zeros(len(self.present))
        gradient = torch.zeros_like(self.delta)
        terms = {name: self.delta.new_zeros(len(self.present)) for name in ("nll", "kl", "weight_decay")}
        with torch.set_grad_enabled(wants_gradient):
            delta = self.delta.detach().requires_grad_(wants_gradient)
            decay = self.objective.v_weight_decay * delta.norm(dim=-1) / self.length.squeeze(-1) ** 2
            decay = decay.mean(dim=1) if decay.ndim > 1 else decay
            if wants_gradient:
                gradient += torch.autograd.grad(decay.sum(), delta)[0]
            terms["weight_decay"] += decay.detach()
            # One backward pass per bucket: the graphs of all buckets at once would need their memory together.
            for bucket in self.buckets:
                losses = self._bucket_losses(bucket, delta)  # each (n,)
                if wants_gradient:
                    gradient += torch.autograd.grad(torch.stack(list(losses.values())).sum(), delta)[0]
                for name, values in losses.items():
                    terms[name] += values.detach()
        return terms, gradient

    def _bucket_losses(self, bucket: Bucket, delta: Tensor) -> dict[str, Tensor]:
        """Return the loss terms that the bucket's rows have a share in, each (n,)."""
        hidden = bucket.suffixes.run((delta * self.unit).index_select(0, bucket.owner))  # (b, s, d)
        read = hidden.flatten(0, 1).index_select(0, bucket.reads.to(hidden.device))  # (m + e, d)
        logits = bucket.suffixes.readout(read)
        log_p = torch.log_softmax(logits, dim=-1, dtype=working_dtype(logits.dtype))  # (m + e, V)
        answers = len(bucket.token)
        losses = {}
        if answers:
            losses["nll"] = self._answer_loss(bucket, log_p[:answers]).to(delta)
        if answers < len(log_p):
            losses["kl"] = self._divergence(bucket, log_p[answers:]).to(delta)
        return losses

    def _answer_loss(self, bucket: Bucket, log_p: Tensor) -> Tensor:
        """Return the mean negative log probability of each request's answer, (n,), as the loss counts it."""
        device = log_p.device  # the head may be on another device than the blocks
        token, weight, asker = bucket.token.to(device), bucket.weight.to(device), bucket.asker.to(device)
        nll = -log_p.gather(1, token[:, None]).squeeze(1)
        total = torch.zeros(len(self.present), dtype=torch.result_type(nll, weight), device=device)
        if self.objective.stop_when_top is not None:
            is_top = ((log_p.argmax(1) == token) & bucket.counted.to(device)).to(self.on_top)
            self.on_top.index_add_(0, bucket.asker, is_top)
        if self.objective.nll_when_top is not None:
            self.leading.index_add_(0, bucket.asker, (log_p.argmax(1) == token).to(self.leading))
            self.unweighted_nll += total.index_add(0, asker, nll.detach() * weight).to(self.unweighted_nll)
            weight = weight * self.share.to(weight).index_select(0, asker)
        return total.index_add(0, asker, nll * weight)

    def _divergence(self, bucket: Bucket, log_p: Tensor) -> Tensor:
        """Return kl_factor * KL(p_delta || p_0), (n,). The edited distribution comes first, as in the authors' code."""
        keepers = bucket.keepers.to(log_p.device)
        if self.reference is None:
            self.reference = log_p.new_zeros(len(self.present), log_p.shape[1])
        if self.step == 1:  # delta is 0, so that this is p_0
            self.reference.index_copy_(0, keepers, log_p.detach())
        reference = self.reference.index_select(0, keepers)
        values = self.objective.kl_factor * (log_p.exp() * (log_p - reference)).sum(1)
        return torch.zeros(len(self.present), dtype=values.dtype, device=values.device).index_add(0, keepers, values)

    def _record(self, terms: dict[str, Tensor]) -> None:
        """Decide on the device which requests take another step, and note the losses for the host."""
        total = terms["nll"] + terms["kl"] + terms["weight_decay"]
        going = total >= self.objective.stop_loss
        if self.objective.stop_when_top is not None:
            self.hits += self.on_top == self.wanted
            going &= self.hits < self.objective.stop_when_top
        if self.objective.nll_when_top is not None:
            is_first = self.leading == self.tokens
            going &= ~(is_first & (terms["kl"] <= self.objective.stop_kl))
            self.share = torch.where(is_first, self.objective.nll_when_top, 1.0).to(self.share)
        self.active = self.active & going
        columns = [
            total,
            terms["nll"] if self.objective.nll_when_top is None else self.unweighted_nll,
            terms["kl"],
            terms["weight_decay"],
            terms["nll"],
            self.on_top.to(total),
            self.active.to(total),
        ]
        self.unread.append(torch.stack(columns, dim=1))
        if self.traces is not None:
            for i, delta in zip(self.present, self.delta * self.unit, strict=True):
                self.traces[i].append(delta)

    def _read(self, step: int) -> None:
        """Read what the last steps have noted, as one synchronisation with the device; `step` is the latest."""
        tables = torch.stack(self.unread).tolist()
        for number, table in enumerate(tables, step - len(tables) + 1):
            for at, (loss, nll, kl, decay, weighted, on_top, going) in enumerate(table):
                if not self.running[at]:
                    continue
                i = self.present[at]
                if not abs(loss) < float("inf"):
                    # The search counts in the value's own length: against zero every term of it is 0/0.
                    is_zero = bool((self.unit[at] == 0).any() or self.initial[at].norm() == 0)
                    advice = (
                        "the value that it starts from is zero, so edit another layer"
                        if is_zero
                        else "lower v_lr, or load the model in float32"
                    )
                    raise NumericalError(
                        f"request {self.problems[i].name}: the loss is {loss} at step {number} of the search for its "
                        f"value; {advice}"
                    )
                losses = {"loss": loss, "nll": nll, "kl": kl, "weight_decay": decay}
                if self.objective.nll_when_top is not None:
                    losses["weighted_nll"] = weighted
                self.targets[i].losses.append(losses)
                if self.objective.stop_when_top is not None:
                    self.targets[i].on_top.append(round(on_top))
                self.running[at] = bool(going)
        self.unread = []

    def _wanted(self, problem: SearchProblem) -> int:
        return PUBLISHED_COUNT if self.objective.stop_rule == "published" else _counted_tokens(problem)

    def _adam_step(self, gradient: Tensor, step: int) -> None:
        """Take a step of Adam (betas 0.9, 0.999, eps 1e-8) for the active requests, then limit the norm of delta.

        The operations follow torch.optim.Adam, for all requests at once.
        """
        beta1, beta2, eps = 0.9, 0.999, ADAM_EPSILON
        self.first_moment.lerp_(gradient, 1 - beta1)
        self.second_moment.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (self.second_moment.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        moved = self.delta - self.objective.v_lr / (1 - beta1**step) * self.first_moment / scale
        bound = self.objective.clamp_norm_factor * self.length
        norm = moved.norm(dim=-1, keepdim=True)
        moved = torch.where(norm > bound, moved * bound / norm, moved)
        self.delta = torch.where(self.active.reshape(-1, *[1] * (moved.ndim - 1)), moved, self.delta)

    def _shrink(self) -> None:
        """Take the requests that are done out of the batch, if few enough are left and rows can be split."""
        kept = [at for at, going in enumerate(self.running) if going]
        if self.unread or len(kept) == len(self.present) or len(kept) > self.pace.shrink_at * len(self.present):
            return
        buckets = select_requests(self.buckets, {at: place for place, at in enumerate(kept)})
        if buckets is None:
            return
        self._hand_over(at for at, going in enumerate(self.running) if not going)
        self.buckets, self.present, self.running = buckets, [self.present[at] for at in kept], [True] * len(kept)
        index = torch.tensor(kept, device=self.delta.device)
        names = (
            "delta",
            "initial",
            "unit",
            "length",
            "first_moment",
            "second_moment",
            "active",
            "wanted",
            "on_top",
            "hits",
        )
        for name in (*names, "tokens", "leading", "share"):
            setattr(self, name, getattr(self, name)[index])
        if self.reference is not None:
            self.reference = self.reference[index.to(self.reference.device)]

    def _hand_over(self, places: Iterable[int]) -> None:
        """Write the results of the requests at these places of the batch into their targets."""
        for at in places:
            i = self.present[at]
            target = self.targets[i]
            target.delta = self.delta[at] * self.unit[at]
            target.trace = torch.stack(self.traces[i][: len(target.losses)]) if self.traces else None


def _chunks(problems: Sequence[SearchProblem], batch_tokens: int, most_reads: int) -> list[list[SearchProblem]]:
    """Split the problems into chunks, in order.

    Args:
        problems: Any number; one by itself is a chunk, however large it is.
        batch_tokens: Bound on the positions of a chunk, rows x longest suffix.
        most_reads: Bound on the positions where the head is read.
    """
    chunks: list[list[SearchProblem]] = []
    rows = longest = reads = 0
    for problem in problems:
        own, own_reads = max(row.suffix_length for row in problem.rows), _reads(problem)
        rows, longest, reads = rows + len(problem.rows) + 1, max(longest, own), reads + own_reads
        if not chunks or rows * longest > batch_tokens or reads > most_reads:
            chunks.append([])
            rows, longest, reads = len(problem.rows) + 1, own, own_reads
        chunks[-1].append(problem)
    return chunks


def _reads(problem: SearchProblem) -> int:
    """Return at how many positions the head is read: the answer in each row, and one of the essence row."""
    return sum(len(row.answer) for row in problem.rows) + 1


def _counted_tokens(problem: SearchProblem) -> int:
    """Return how many tokens of the answer are predicted over all written contexts, or over the bare one alone."""
    return len(problem.rows[0].answer) * max(1, len(problem.rows) - 1)
