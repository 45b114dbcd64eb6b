"""The values of earlier edits, which a later edit writes again; and LyapLock, which weighs them against other keys.

A batch of keys K with the residual R, on a model that carries the change D of earlier edits, gets

    past_keys      Delta = R K^T (S + K K^T)^-1,                              S = P + K_p K_p^T
    past_values    Delta = [R K^T + (V_p - D K_p) K_p^T - D P] (S + K K^T)^-1

P is what the method protects other keys with: lambda C (MEMIT), C' (EMMET), or L2 I within the null space (AlphaEdit).
V_p are the values that earlier edits wanted beside those of the untouched weight. With the same values, a sequence
with past keys already writes what one batch of all requests writes (recursive least squares): the two further terms
cancel each other. They do not after an undo, or behind a brake that changes updates. With them a sequence equals the
one-shot edit of the requests that are still on the model, whatever came between. The first of them is the term of
OTE-SE (arXiv 2605.26670), as LyapLock has it. Alone it pulls to the weights as they stand, and no sequence with it
equals the one-shot edit; tests/editors/test_past_values.py shows both.

LyapLock (EMNLP 2025, arXiv 2505.15702; wpwpwpyo/LyapLock) is the same equation with two differences. V_p are the values
that earlier edits have reached, and P is weighed by a queue q, which grows while the loss on other keys is above a
bound:

    L = trace(D C D^T) after each edit;    after the first: B = alpha L, Z = sqrt(B), q = Z / sqrt(B) = 1
    Z <- max(Z + (L - B) / sqrt(B), sqrt(B))

Their "zmax" is this floor: q is never below 1. With their alpha of 60 no bound was reached in the runs of
tests/editors/test_brakes_golden.py that use it. Their code also keeps rounded moments of the untouched model's values;
these formulas need C alone.

All of it follows from the entries of the ledger in their order: after an undo it is what the remaining edits give, and
nothing else is kept. Edits of other methods count as part of the weight.

Where there is something to bring back, the update has as many factors as there are requests on the model, at most
d_out: unlike with other edits, a record grows with the sequence, and reports have the number as `update_rank`. What
differs by rounding alone is not brought back. While editing, one (d_out, d_in) float64 matrix per layer is kept.

Legend: D (d_out, d_in); K (d_in, n), R (d_out, n) of this edit; K_p (d_in, N), V_p (d_out, N) of earlier ones; S, P, C
(d_in, d_in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errata.editors.core.ledger.patch import LowRank, Update

# What counts as rounding: roundings of the largest matrix that a difference is made of, and a share of the difference.
_ROUNDINGS, _SHARE = 64, 1e-12


@dataclass(frozen=True)
class EarlierEdit:
    """One earlier edit of the method, at one layer.

    Attributes:
        id: In the ledger.
        update: What it adds to the weight.
        keys: (d_in, n).
        values: (d_out, n) what it wanted there, beside what the untouched weight gives; None: what it reached.
    """

    id: str
    update: Update
    keys: Tensor
    values: Tensor | None


@dataclass(frozen=True)
class Queue:
    """LyapLock's queue of one layer: the bound B on the loss, and Z."""

    bound: float
    length: float

    @classmethod
    def first(cls, loss: float, alpha: float) -> Queue | None:
        """Return the queue behind the first edit; None if it has changed nothing."""
        return cls(alpha * loss, (alpha * loss) ** 0.5).after(loss) if loss > 0 else None

    def after(self, loss: float) -> Queue:
        floor = self.bound**0.5
        return replace(self, length=max(self.length + (loss - self.bound) / floor, floor))

    @property
    def strength(self) -> float:
        """q."""
        return self.length / self.bound**0.5


@dataclass(frozen=True)
class Drift:
    """What earlier edits have made of one layer.

    Attributes:
        ids: Of the edits.
        D: (d_out, d_in) their sum, float64; None where there are none.
        keys, values: K_p and V_p in pieces, (d_in, n) and (d_out, n), float64.
        queue: LyapLock's.
    """

    ids: tuple[str, ...] = ()
    D: Tensor | None = None
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    queue: Queue | None = None

    def after(self, edit: EarlierEdit, alpha: float | None, moment: Callable[[], Tensor]) -> Drift:
        """Return the drift with one more edit; `alpha` is LyapLock's, None without it."""
        added = edit.update.matrix(torch.float64, edit.keys.device)
        D, K = added if self.D is None else self.D + added, edit.keys.double()
        values = D @ K if edit.values is None else edit.values.double()
        queue = self.queue
        if alpha is not None:
            loss = float(((D @ moment().to(D)) * D).sum())
            queue = Queue.first(loss, alpha) if queue is None else queue.after(loss)
        return Drift((*self.ids, edit.id), D, (*self.keys, K), (*self.values, values), queue)

    @property
    def strength(self) -> float:
        """q; 1 without LyapLock."""
        return 1.0 if self.queue is None else self.queue.strength


class PastValues:
    """The drift of each layer, extended by new edits and computed again after an undo.

    Args:
        alpha: LyapLock's bound; None without it.
    """

    def __init__(self, alpha: float | None) -> None:
        self.alpha = alpha
        self._drifts: dict[int, Drift] = {}

    def drift(self, layer: int, edits: Sequence[EarlierEdit], moment: Callable[[], Tensor]) -> Drift:
        """Return what these edits have made of a layer; `moment` returns C."""
        found = self._drifts.get(layer, Drift())
        if found.ids != tuple(edit.id for edit in edits[: len(found.ids)]):
            found = Drift()
        for edit in edits[len(found.ids) :]:
            found = found.after(edit, self.alpha, moment)
        self._drifts[layer] = found
        return found


def pull(drift: Drift, inside: Tensor, adjoint: Tensor, dtype: torch.dtype) -> LowRank | None:
    """Return what brings earlier values back: Delta before this edit's own keys, ((V_p - D K_p) K_p^T - D P) S^-1.

    None where it is rounding alone: where MEMIT or AlphaEdit edits in sequence without undo or brakes, the terms cancel
    each other.

    That is V_p B^T - D with B = S^-1 K_p, since P = S - K_p K_p^T. Where P acts in a subspace alone, so does Delta.

    Args:
        drift: Of at least one edit.
        inside: (d_out, d_in) the part of D that P acts on.
        adjoint: (d_in, N) B.
        dtype: In which updates are kept, and rounded.
    """
    assert drift.D is not None
    K, V = torch.cat(drift.keys, dim=1), torch.cat(drift.values, dim=1)
    outside = drift.D - inside
    rounding = _ROUNDINGS * torch.finfo(dtype).eps * float(drift.D.norm())
    found = (V - outside @ K) @ adjoint.to(V).T - inside
    size = float(found.norm())
    return factored(found, K.shape[1], max(rounding, _SHARE * size)) if size > rounding else None


def factored(matrix: Tensor, rank: int, rounding: float) -> LowRank:
    """Return a matrix (d_out, d_in) as factors: of this rank, or of a higher one where it does not suffice.

    Its columns are found as those of its product with a few random vectors, always the same.

    Args:
        matrix: The matrix, float64.
        rank: The rank that is tried first.
        rounding: Norm of what may be left of it beside the factors.
    """
    d_out, d_in = matrix.shape
    generator = torch.Generator().manual_seed(0)
    while rank < d_out:
        probes = torch.randn(d_in, rank, generator=generator, dtype=torch.float64).to(matrix)
        basis = torch.linalg.qr(matrix @ probes)[0]
        inner = basis.T @ matrix
        if float((matrix - basis @ inner).norm()) <= rounding:
            return LowRank(basis, inner)
        rank *= 2
    return LowRank(torch.eye(d_out, dtype=matrix.dtype, device=matrix.device), matrix)


def ridge_columns(Q: Tensor, ridge: float) -> Tensor:
    """Return (ridge I + Q Q^T)^-1 Q = Q (ridge I + Q^T Q)^-1, (d_in, N) in float64, by one N x N factorisation."""
    Q = Q.double()
    G = Q.T @ Q + ridge * torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)
    return torch.cholesky_solve(Q.T, torch.linalg.cholesky(G)).T
