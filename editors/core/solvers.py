"""The linear algebra of the locate-then-edit methods: pure functions of tensors, in float64.

Shapes: d_in width of the keys, d_out of the values, n requests. C (d_in, d_in) second moment of the keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.editors.core.errors import NumericalError, StatisticsError

# Beyond this condition number the solution of C x = k has fewer than two correct digits, even in float64.
MAX_CONDITION = 1e14


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of values, losses and factors for weights of `dtype`: half precision is worked on in float32."""
    return dtype if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Factor:
    """The Cholesky factor of a second moment: computed once, kept, solved against as often as wanted."""

    lower: Tensor  # (d_in, d_in) float64

    def solve(self, K: Tensor) -> Tensor:
        """C^-1 K for K (d_in, n), in float64."""
        # Not cholesky_solve, which copies the factor: for few columns that is ten times the work.
        half = torch.linalg.solve_triangular(self.lower, K.to(self.lower), upper=False)
        return torch.linalg.solve_triangular(self.lower.T, half, upper=True)


@dataclass(frozen=True)
class Inverse:
    """The explicit inverse in float32, as the authors' code has it: some 1e-4 from the truth at a condition of 1e5.
    For comparison with their numbers."""

    inverse: Tensor  # (d_in, d_in) float32

    def solve(self, K: Tensor) -> Tensor:
        """C^-1 K for K (d_in, n), in float32."""
        return self.inverse @ K.to(self.inverse)


def factorise(
    C: Tensor, dtype: torch.dtype = torch.float64, name: str = "C", advice: str = "give more text"
) -> Factor | Inverse:
    """What C^-1 is applied with: the Cholesky factor in float64 or, for float32, the inverse of the authors' code.

    `name` and `advice` go into the message where there is none.

    Raises:
        StatisticsError: C is no square matrix, holds NaN or inf, or is singular: then it has seen fewer directions
            than it has dimensions. No ridge is added to hide that.
    """
    if C.ndim != 2 or C.shape[0] != C.shape[1]:
        raise StatisticsError(f"expected the second moment {name} to be square, got {tuple(C.shape)}")
    if not bool(torch.isfinite(C).all()):
        raise StatisticsError(f"the second moment {name} holds NaN or inf")
    lower, info = torch.linalg.cholesky_ex(C.double())
    diagonal = lower.diagonal()
    if int(info) or float(diagonal.max() / diagonal.min()) ** 2 > MAX_CONDITION:
        raise StatisticsError(
            f"the second moment {name} ({C.shape[0]} dimensions) is singular: it was collected from too few or too "
            f"uniform tokens; {advice}"
        )
    return Factor(lower) if dtype == torch.float64 else Inverse(torch.inverse(C.float()))


# Requests of a batch, as a share of d_in, above which one factorisation of the sum costs less than solves against the
# kept factor.
CROSSOVER = 0.44


def memit_adjoint(K: Tensor, C: Callable[[], Tensor], weight: float, factor: Factor | Inverse | None) -> Tensor:
    """A = (weight C + K K^T)^-1 K, (d_in, n) float64: the update R A^T sends the keys K to the residuals R as far as it
    can without moving the rest (MEMIT: Meng et al. 2023, equation 14).

    By the kept factor of C for small batches, A = Y (I + K^T Y)^-1 with Y = C^-1 K / weight; else, or without a factor
    because C is singular, by one factorisation of the sum.

    Args:
        K: (d_in, n) keys.
        C: Gives the second moment (d_in, d_in), where it is needed itself.

    Raises:
        StatisticsError: the sum is singular too.
    """
    K = K.double()
    if factor is not None and K.shape[1] < CROSSOVER * K.shape[0]:
        Y = factor.solve(K).double() / weight
        return small_adjoint(K, Y, 1.0)
    return factorise(weight * C().double() + K @ K.T, name="plus the keys of the batch").solve(K)


def small_adjoint(K: Tensor, Y: Tensor, ridge: float) -> Tensor:
    """Y (ridge I + K^T Y)^-1 for Y = S^-1 K with S symmetric and positive: (d_in, n) by an n x n factorisation.

    Raises:
        NumericalError: without a ridge, keys that depend on each other.
    """
    G = K.T @ Y
    G = (G + G.T) / 2 + ridge * torch.eye(len(G), dtype=G.dtype, device=G.device)
    lower, info = torch.linalg.cholesky_ex(G)
    if int(info):
        raise NumericalError(
            f"the {len(G)} keys of the batch depend on each other, so that not all requests can be met exactly: give "
            "a larger ridge, or fewer requests about one subject"
        )
    return torch.cholesky_solve(Y.T, lower).T


def directions(K: Tensor, factor: Factor | Inverse | None) -> Tensor:
    """Unit vectors u = C^-1 k / ||C^-1 k|| (or k / ||k|| without a factor): (n, d_in) float64, for keys K (n, d_in).

    ROME writes its update along u (Meng et al. 2022, equation 2 and appendix A).

    Raises:
        NumericalError: a key is zero or not finite, so that no direction is its own.
    """
    U = K.double() if factor is None else factor.solve(K.T).T.double()
    norms = U.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all() and torch.isfinite(norms).all()):
        raise NumericalError("a key is zero or not finite: the edited layer reads nothing at the subject's last token")
    return U / norms


def rank_one_values(residual: Tensor, keys: Tensor, U: Tensor) -> Tensor:
    """v = r / (k . u) for each request, so that the update v u^T sends k to r: (n, d_out) float64.

    Args:
        residual: (n, d_out) what the update shall add to the value of k.
        keys: (n, d_in) the keys k that the update is solved at.
        U: (n, d_in) unit directions.

    Raises:
        NumericalError: k . u is exactly zero, so that no finite update does it.
    """
    scale = (keys.double() * U).sum(dim=1, keepdim=True)
    if bool((scale == 0).any()):
        raise NumericalError("a key is orthogonal to the direction of its update: no finite update reaches its value")
    return residual.double() / scale


# --- null space (AlphaEdit) -----------------------------------------------------------------------------------------

# A projector handed in may have been rounded or made otherwise: beyond this relative error of P P = P or P = P^T the
# solve that needs both is not used.
PROJECTOR_TOLERANCE = 1e-3


def null_space_projector(C: Tensor, *, threshold: float, energy: float | None = None) -> tuple[Tensor, int]:
    """The projector onto the directions in which keys hardly vary, P = U U^T (d_in, d_in) float64, and their number.

    U are eigenvectors of C with eigenvalue below `threshold` (AlphaEdit: Fang et al. 2025, where they are
    singular values of the raw moment, so that the threshold has the moment's unit); or, with `energy`, as many of the
    smallest as together hold at most that share of the trace, whatever the scale.

    Raises:
        StatisticsError: no direction is that small.
    """
    values, vectors = torch.linalg.eigh(C.double())  # ascending
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
    U = vectors[:, :count]
    return U @ U.T, count


def is_projector(P: Tensor) -> bool:
    """Whether P P = P = P^T up to PROJECTOR_TOLERANCE, tried on a few fixed vectors rather than multiplied out."""
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

    def absorbed(self, columns: Tensor) -> tuple[Tensor, GrowingFactor]:
        """Q' (ridge I + Q'^T Q')^-1 E, (d_in, n) float64, where Q' is Q with `columns` (d_in, n) behind the others and
        E picks them; and the factor over Q'. O(d_in N n).

        With Q' = P M, M all keys and P a projector the first is (P M M^T + ridge I)^-1 P K of AlphaEdit for the last
        keys K: the identity Q (ridge I + M^T Q)^-1 = (Q M^T + ridge I)^-1 Q, with M^T P M = Q^T Q.

        Raises:
            NumericalError: rounding has made the extended matrix indefinite; the ridge is too small for these keys.
        """
        left = columns.double()
        for block in self.blocks:
            left = left - block @ (block.T @ columns.to(block))  # (d_in, n)
        G = columns.double().T @ left
        G = (G + G.T) / 2 + self.ridge * torch.eye(len(G), dtype=G.dtype, device=G.device)
        lower, info = torch.linalg.cholesky_ex(G)
        if int(info):
            raise NumericalError(f"L2 = {self.ridge:g} is too small for keys this alike; raise it")
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


def null_space_adjoint_directly(P: Tensor, M: Tensor, count: int, ridge: float) -> Tensor:
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
