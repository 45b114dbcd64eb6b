"""The null space of AlphaEdit: the projector onto it, and the linear solve that keeps the update inside it.

Shapes: d_in width of the keys, n of them in a batch, N before it. C (d_in, d_in) second moment of the keys, P the
projector onto the directions in which they hardly vary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.editors.core.errors import NumericalError, StatisticsError

# A projector from elsewhere may be rounded, or no projector at all. If P P = P or P = P^T fails by more than this
# relative error, the solve that needs both is not used.
PROJECTOR_TOLERANCE = 1e-3


# How far below zero an eigenvalue of a moment summed in float32 may be, as a share of the largest.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Projector:
    """P in the form that is cheapest to multiply by.

    The forms are B B^T ("span"), and I - B B^T with B the other eigenvectors ("complement"). The one with fewer columns
    is used; the null space of keys is most of the space. A projector from elsewhere stays a "matrix".

    Attributes:
        columns: B (d_in, m), orthonormal; or P itself (d_in, d_in).
        form: What `columns` holds.
    """

    columns: Tensor
    form: Literal["span", "complement", "matrix"]

    @classmethod
    def null_space(cls, C: Tensor, *, threshold: float, energy: float | None = None) -> Projector:
        """Return the projector onto the eigenvectors of C with the smallest eigenvalues, computed in float64.

        (AlphaEdit: Fang et al. 2025. There they are singular values of the raw moment, so the threshold has the
        moment's unit.)

        Args:
            C: (d_in, d_in) second moment.
            threshold: Use all eigenvalues below this.
            energy: Instead, use the smallest eigenvalues that together hold at most this share of the trace. This does
                not depend on the scale of C.

        Raises:
            StatisticsError: no eigenvalue is small enough; or C is not a second moment, because it is not finite or
                has an eigenvalue below zero by more than rounding.
        """
        if not bool(torch.isfinite(C).all()):
            raise StatisticsError("the second moment holds NaN or inf")
        values, vectors = torch.linalg.eigh(C.double())  # ascending
        if float(values[0]) < -ROUNDING * float(values.abs().max()):
            raise StatisticsError(f"the second moment has the eigenvalue {float(values[0]):.3g}; none can be negative")
        if energy is not None:
            small = values.clamp_min(0).cumsum(0) <= energy * values.clamp_min(0).sum()
        else:
            small = values < threshold
        count = int(small.sum())
        if not count:
            wanted = f"hold {energy:g} of the trace" if energy is not None else f"are below {threshold:g}"
            raise StatisticsError(
                f"no eigenvalue of the second moment is small enough (none {wanted}; the smallest is "
                f"{float(values[0]):.3g}, the largest {float(values[-1]):.3g}): raise nullspace_threshold, or give "
                "nullspace_energy, a share between 0 and 1"
            )
        if 2 * count > len(values):
            return cls(vectors[:, count:].contiguous(), "complement")
        return cls(vectors[:, :count].contiguous(), "span")

    @classmethod
    def from_matrix(cls, P: Tensor) -> Projector:
        """Return a projector that was computed elsewhere. `is_exact` tells whether the matrix is one."""
        return cls(P, "matrix")

    def to(self, device: torch.device, dtype: torch.dtype) -> Projector:
        return Projector(self.columns.to(device, dtype), self.form)

    @property
    def dtype(self) -> torch.dtype:
        return self.columns.dtype

    @property
    def dimensions(self) -> int:
        """Dimensions of the space that P projects onto: the trace of P."""
        width, count = self.columns.shape
        if self.form == "matrix":
            return round(float(self.columns.diagonal().sum()))
        return count if self.form == "span" else width - count

    def __matmul__(self, K: Tensor) -> Tensor:
        """Return P K for K (d_in, n)."""
        if self.form == "matrix":
            return self.columns @ K
        inside = self.columns @ (self.columns.T @ K)
        return inside if self.form == "span" else K - inside

    def energy(self, C: Tensor) -> float:
        """Return trace(P C): what keys with the second moment C (d_in, d_in) have in this space, E ||P k||^2."""
        C, B = C.double(), self.columns.to(C.device, torch.float64)
        if self.form == "matrix":
            return float((B * C.T).sum())
        inside = float(((C @ B) * B).sum())
        return inside if self.form == "span" else float(C.trace()) - inside

    def matrix(self) -> Tensor:
        """Return P (d_in, d_in)."""
        return self @ torch.eye(len(self.columns), dtype=self.columns.dtype, device=self.columns.device)

    @property
    def is_exact(self) -> bool:
        """Return whether P P = P = P^T up to PROJECTOR_TOLERANCE."""
        return self.error <= PROJECTOR_TOLERANCE

    @property
    def error(self) -> float:
        """The larger of ||P P - P|| and ||P - P^T|| relative to ||P||, estimated on a few fixed vectors."""
        if self.form != "matrix":
            return 0.0  # orthonormal columns
        P = self.columns
        probes = torch.randn(len(P), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(P)
        image = P @ probes
        scale = image.norm() + torch.finfo(P.dtype).tiny
        return max(float((P @ image - image).norm() / scale), float((P.T @ probes - image).norm() / scale))


# Up to this condition number, float32 keeps three correct digits in the worst case and six in the usual one.
SINGLE_CONDITION = 1e4


@dataclass(frozen=True)
class GrowingFactor:
    """A factor for regularised solves against past columns Q (d_in, N), to which new columns are appended cheaply.

    The part of a new column c that past columns leave is c - Q (ridge I + Q^T Q)^-1 Q^T c. The factor is W (d_in, N)
    with W W^T = Q (ridge I + Q^T Q)^-1 Q^T. So new columns cost two products with W and one n x n factorisation, and no
    triangular solve against all past columns. It is as accurate as the Cholesky factor L of ridge I + Q^T Q, as
    W = Q L^-T: both lose as many digits as the condition number has.

    W has the dtype of the columns, whose own rounding is as large as that of the products with W. Above a condition
    number of SINGLE_CONDITION it is float64. The n x n part is always float64.

    Attributes:
        blocks: W in pieces (d_in, N_i), which are merged like the carries of a binary counter.
        ridge: The regularisation.
        energy: ||Q||^2 (Frobenius). The condition number is at most 1 + energy / ridge.
    """

    blocks: tuple[Tensor, ...]
    ridge: float
    energy: float = 0.0

    @classmethod
    def empty(cls, ridge: float) -> GrowingFactor:
        return cls((), ridge)

    def leftover(self, columns: Tensor) -> Tensor:
        """Return what past columns leave of columns (d_in, n), in float64: c - Q (ridge I + Q^T Q)^-1 Q^T c."""
        left = columns.double()
        for block in self.blocks:
            left = left - block @ (block.T @ columns.to(block))  # (d_in, n)
        return left

    def append(self, columns: Tensor) -> tuple[Tensor, GrowingFactor]:
        """Append columns, and return the solution for them and the new factor. This takes O(d_in N n).

        The solution is Q' (ridge I + Q'^T Q')^-1 E, (d_in, n) in float64: Q' is Q followed by `columns` (d_in, n), and
        E selects them. With Q' = P M, M all keys and P a projector, it is AlphaEdit's (P M M^T + ridge I)^-1 P K for
        the last keys K. That follows from Q (ridge I + M^T Q)^-1 = (Q M^T + ridge I)^-1 Q with M^T P M = Q^T Q.

        Raises:
            NumericalError: the ridge is too small for these keys, so rounding has made the matrix indefinite. Its
                `row` is the first key that fails.
        """
        left = self.leftover(columns)
        G = columns.double().T @ left
        G = (G + G.T) / 2 + self.ridge * torch.eye(len(G), dtype=G.dtype, device=G.device)
        lower, info = torch.linalg.cholesky_ex(G)
        if int(info):
            raise NumericalError(
                f"L2 = {self.ridge:g} is too small for keys that are so similar; raise it", row=int(info) - 1
            )
        W = torch.linalg.solve_triangular(lower.T, left, upper=True, left=False)
        adjoint = torch.linalg.solve_triangular(lower, W, upper=False, left=False)
        energy = self.energy + float(columns.double().norm()) ** 2
        dtype = columns.dtype if 1 + energy / self.ridge < SINGLE_CONDITION else torch.float64
        return adjoint, GrowingFactor(_merge_blocks(self.blocks, W.to(dtype)), self.ridge, energy)


def _merge_blocks(blocks: tuple[Tensor, ...], new: Tensor) -> tuple[Tensor, ...]:
    """Append a block, and merge blocks so that each is wider than the next: they stay few, and copies are rare."""
    kept = [*blocks, new]
    while len(kept) > 1 and kept[-2].shape[1] <= kept[-1].shape[1] and kept[-2].dtype == kept[-1].dtype:
        kept[-2:] = [torch.cat(kept[-2:], dim=1)]
    return tuple(kept)


def dense_adjoint(P: Tensor, M: Tensor, count: int, ridge: float) -> Tensor:
    """Return (P M M^T + ridge I)^-1 P K, (d_in, count), for any matrix P, by one d_in x d_in solve.

    K is the last `count` columns of M.

    Raises:
        NumericalError: the system is singular.
    """
    P, M = P.double(), M.double()
    system = P @ M @ M.T + ridge * torch.eye(len(P), dtype=P.dtype, device=P.device)
    solution, info = torch.linalg.solve_ex(system, P @ M[:, M.shape[1] - count :])
    if int(info):
        raise NumericalError(
            f"the linear system with this projector is singular at L2 = {ridge:g}; raise L2, or use an exact projector"
        )
    return solution
