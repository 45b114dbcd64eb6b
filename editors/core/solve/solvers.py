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


NO_KEY = "the key is zero or not finite: the edited layer reads nothing at the token of the fact"


def check_keys(K: Tensor) -> None:
    """Refuse keys K (d_in, n) that no equation can be solved with.

    Raises:
        NumericalError: one is not finite; its `row` says which.
    """
    if (row := _first(~torch.isfinite(K).all(dim=0))) is not None:
        raise NumericalError(NO_KEY, row=row)


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
        NumericalError: without a ridge, a key of zero, or one that depends on those before it; its `row` says which.
    """
    G = K.T @ Y
    G = (G + G.T) / 2 + ridge * torch.eye(len(G), dtype=G.dtype, device=G.device)
    lower, info = torch.linalg.cholesky_ex(G)
    if int(info) and len(G) == 1:
        raise NumericalError(NO_KEY, row=0)
    if int(info):
        raise NumericalError(
            f"the {len(G)} keys of the batch depend on each other, this one on those before it, so that not all "
            "requests can be met exactly: give a larger ridge, or fewer requests about one subject",
            row=int(info) - 1,
        )
    return torch.cholesky_solve(Y.T, lower).T


def update_directions(K: Tensor, factor: Factor | Inverse | None) -> Tensor:
    """Unit vectors u = C^-1 k / ||C^-1 k|| (or k / ||k|| without a factor): (n, d_in) float64, for keys K (n, d_in).

    ROME writes its update along u (Meng et al. 2022, equation 2 and appendix A).

    Raises:
        NumericalError: a key is zero or not finite, so that no direction is its own; its `row` says which.
    """
    U = K.double() if factor is None else factor.solve(K.T).T.double()
    norms = U.norm(dim=1, keepdim=True)
    if (row := _first(~((norms > 0) & torch.isfinite(norms)))) is not None:
        raise NumericalError(NO_KEY, row=row)
    return U / norms


def rank_one_values(residual: Tensor, keys: Tensor, U: Tensor) -> Tensor:
    """v = r / (k . u) for each request, so that the update v u^T sends k to r: (n, d_out) float64.

    Args:
        residual: (n, d_out) what the update adds to the value of k.
        keys: (n, d_in) the keys k that the update is solved at.
        U: (n, d_in) unit directions.

    Raises:
        NumericalError: k . u is exactly zero, so that no finite update does it; its `row` says which.
    """
    scale = (keys.double() * U).sum(dim=1, keepdim=True)
    if (row := _first(scale == 0)) is not None:
        raise NumericalError(
            "the key is orthogonal to the direction of its update: no finite update reaches its value", row=row
        )
    return residual.double() / scale


def _first(bad: Tensor) -> int | None:
    """The first place of a mask (n,) or (n, 1) that is set."""
    places = bad.flatten().nonzero()
    return int(places[0]) if len(places) else None
