"""The null space of AlphaEdit: the projector onto it, and the solve that stays in it.

Shapes: d_in width of the keys, n of them in a batch, N before it. C (d_in, d_in) second moment of the keys, P the
projector onto the directions in which they hardly vary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.editors.core.errors import NumericalError, StatisticsError

# A projector handed in may have been rounded or made otherwise: beyond this relative error of P P = P or P = P^T the
# solve that needs both is not used.
PROJECTOR_TOLERANCE = 1e-3


# Of the largest eigenvalue: how far below zero those of a moment summed in float32 may lie.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Projector:
    """P in the form that costs least to multiply by: B B^T, or I - B B^T with B the other eigenvectors, whichever has
    fewer columns (the null space of keys is most of the space); or the matrix, where it was made elsewhere.

    Attributes:
        columns: B (d_in, m), orthonormal; or P itself (d_in, d_in).
        form: What `columns` are.
    """

    columns: Tensor
    form: Literal["span", "complement", "matrix"]

    @classmethod
    def null_space(cls, C: Tensor, *, threshold: float, energy: float | None = None) -> Projector:
        """Onto the eigenvectors of C with eigenvalue below `threshold` (AlphaEdit: Fang et al. 2025, where they are
        singular values of the raw moment, so that the threshold has the moment's unit); or, with `energy`, onto as many
        of the smallest as together hold at most that share of the trace, whatever the scale. In float64.

        Raises:
            StatisticsError: no direction is that small, or C is no second moment: it is not finite, or has a negative
                eigenvalue beyond rounding.
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
        """One that was made elsewhere; `is_exact` tells whether it is one."""
        return cls(P, "matrix")

    def to(self, device: torch.device, dtype: torch.dtype) -> Projector:
        return Projector(self.columns.to(device, dtype), self.form)

    @property
    def dtype(self) -> torch.dtype:
        return self.columns.dtype

    @property
    def dimensions(self) -> int:
        """Of the space that it projects onto; the trace of P."""
        width, count = self.columns.shape
        if self.form == "matrix":
            return round(float(self.columns.diagonal().sum()))
        return count if self.form == "span" else width - count

    def __matmul__(self, K: Tensor) -> Tensor:
        """P K for K (d_in, n)."""
        if self.form == "matrix":
            return self.columns @ K
        inside = self.columns @ (self.columns.T @ K)
        return inside if self.form == "span" else K - inside

    def matrix(self) -> Tensor:
        """P (d_in, d_in)."""
        return self @ torch.eye(len(self.columns), dtype=self.columns.dtype, device=self.columns.device)

    @property
    def is_exact(self) -> bool:
        """Whether P P = P = P^T up to PROJECTOR_TOLERANCE, tried on a few fixed vectors rather than multiplied out."""
        if self.form != "matrix":
            return True  # orthonormal columns
        P = self.columns
        probes = torch.randn(len(P), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(P)
        image = P @ probes
        scale = image.norm() + torch.finfo(P.dtype).tiny
        errors = ((P @ image - image).norm() / scale, (P.T @ probes - image).norm() / scale)
        return all(bool(error <= PROJECTOR_TOLERANCE) for error in errors)


# Up to this condition number, single precision leaves three digits in the worst case and six in the usual one.
SINGLE_CONDITION = 1e4


@dataclass(frozen=True)
class GrowingFactor:
    """What past columns Q (d_in, N) leave of a new one: c - Q (ridge I + Q^T Q)^-1 Q^T c, for columns that keep coming.

    Kept as W (d_in, N) with W W^T = Q (ridge I + Q^T Q)^-1 Q^T, so that new columns cost two products with W and one
    n x n factorisation: no triangular solve against all that went before. As accurate as the Cholesky factor of
    ridge I + Q^T Q, whose inverse W = Q L^-T holds; both lose its condition number.

    W is kept in the dtype of the columns, whose own rounding is as large as that of the products with it; beyond a
    condition of SINGLE_CONDITION in float64. The n x n part is in float64 always.
    """

    blocks: tuple[Tensor, ...]  # (d_in, N_i): W, in pieces that are merged as a binary counter carries
    ridge: float
    energy: float = 0.0  # ||Q||^2 (Frobenius), which bounds the condition by 1 + energy / ridge

    @classmethod
    def empty(cls, ridge: float) -> GrowingFactor:
        return cls((), ridge)

    def append(self, columns: Tensor) -> tuple[Tensor, GrowingFactor]:
        """Q' (ridge I + Q'^T Q')^-1 E, (d_in, n) float64, where Q' is Q with `columns` (d_in, n) behind the others and
        E picks them; and the factor over Q'. O(d_in N n).

        With Q' = P M, M all keys and P a projector the first is (P M M^T + ridge I)^-1 P K of AlphaEdit for the last
        keys K: the identity Q (ridge I + M^T Q)^-1 = (Q M^T + ridge I)^-1 Q, with M^T P M = Q^T Q.

        Raises:
            NumericalError: rounding has made the extended matrix indefinite; the ridge is too small for these keys. Its
            `row` is the first such key.
        """
        left = columns.double()
        for block in self.blocks:
            left = left - block @ (block.T @ columns.to(block))  # (d_in, n)
        G = columns.double().T @ left
        G = (G + G.T) / 2 + self.ridge * torch.eye(len(G), dtype=G.dtype, device=G.device)
        lower, info = torch.linalg.cholesky_ex(G)
        if int(info):
            raise NumericalError(f"L2 = {self.ridge:g} is too small for keys this alike; raise it", row=int(info) - 1)
        W = torch.linalg.solve_triangular(lower.T, left, upper=True, left=False)
        adjoint = torch.linalg.solve_triangular(lower, W, upper=False, left=False)
        energy = self.energy + float(columns.double().norm()) ** 2
        dtype = columns.dtype if 1 + energy / self.ridge < SINGLE_CONDITION else torch.float64
        return adjoint, GrowingFactor(_carried(self.blocks, W.to(dtype)), self.ridge, energy)


def _carried(blocks: tuple[Tensor, ...], new: Tensor) -> tuple[Tensor, ...]:
    """Blocks with one more, merged so that their widths halve from one to the next: few, and seldom copied."""
    kept = [*blocks, new]
    while len(kept) > 1 and kept[-2].shape[1] <= kept[-1].shape[1] and kept[-2].dtype == kept[-1].dtype:
        kept[-2:] = [torch.cat(kept[-2:], dim=1)]
    return tuple(kept)


def dense_adjoint(P: Tensor, M: Tensor, count: int, ridge: float) -> Tensor:
    """(P M M^T + ridge I)^-1 P K for any matrix P, by one d_in x d_in solve: (d_in, count), K the last columns of M.

    Raises:
        NumericalError: the system is singular.
    """
    P, M = P.double(), M.double()
    system = P @ M @ M.T + ridge * torch.eye(len(P), dtype=P.dtype, device=P.device)
    solution, info = torch.linalg.solve_ex(system, P @ M[:, M.shape[1] - count :])
    if int(info):
        raise NumericalError(
            f"the system of this projector is singular at L2 = {ridge:g}; raise it, or mend the projector"
        )
    return solution
