"""Linear solves of the locate-then-edit methods (ROME, MEMIT, EMMET): pure functions of tensors, in float64.

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
    """The Cholesky factor of a second moment: computed once, kept, and used for any number of solves."""

    lower: Tensor  # (d_in, d_in) float64

    def solve(self, K: Tensor) -> Tensor:
        """Return C^-1 K for K (d_in, n), in float64."""
        # cholesky_solve would copy the factor, which is ten times the work if there are few columns.
        return self.second_half(self.half(K))

    def half(self, K: Tensor) -> Tensor:
        """Return L^-1 K for K (d_in, n), C = L L^T, in float64."""
        return torch.linalg.solve_triangular(self.lower, K.to(self.lower), upper=False)

    def second_half(self, X: Tensor) -> Tensor:
        """Return L^-T X for X (d_in, n), in float64."""
        return torch.linalg.solve_triangular(self.lower.T, X.to(self.lower), upper=True)


@dataclass(frozen=True)
class Inverse:
    """The explicit inverse in float32 of the authors' code, to compare with their numbers.

    At a condition number of 1e5 its error is about 1e-4.
    """

    inverse: Tensor  # (d_in, d_in) float32

    def solve(self, K: Tensor) -> Tensor:
        """Return C^-1 K for K (d_in, n), in float32."""
        return self.inverse @ K.to(self.inverse)


def factorise(
    C: Tensor, dtype: torch.dtype = torch.float64, name: str = "C", advice: str = "give more text"
) -> Factor | Inverse:
    """Factorise C, to apply C^-1: the Cholesky factor in float64 or, for float32, the inverse of the authors' code.

    Args:
        C: (d_in, d_in) second moment.
        dtype: float64 or float32.
        name: What to call C in messages.
        advice: What a message about a singular C should recommend.

    Raises:
        StatisticsError: C is not square, holds NaN or inf, or is singular. A singular C has seen fewer directions than
            it has dimensions. No ridge is added to hide that.
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


# If a batch has more requests than this share of d_in, one factorisation of the sum costs less than solves with the
# kept factor.
CROSSOVER = 0.44


NO_KEY = "the key is zero or not finite: the edited layer reads nothing at the token of the fact"


def check_keys(K: Tensor) -> None:
    """Refuse keys K (d_in, n) that are not finite, as no equation can be solved with them.

    Raises:
        NumericalError: a key is not finite. Its `row` is the index of the key.
    """
    if (row := _first_index(~torch.isfinite(K).all(dim=0))) is not None:
        raise NumericalError(NO_KEY, row=row)


def memit_adjoint(K: Tensor, C: Callable[[], Tensor], weight: float, factor: Factor | Inverse | None) -> Tensor:
    """Return A = (weight C + K K^T)^-1 K, (d_in, n) in float64 (MEMIT: Meng et al. 2023, equation 14).

    The update R A^T maps the keys K to the residuals R, as far as that is possible without moving other keys. Small
    batches use the kept factor of C: A = Y (I + K^T Y)^-1 with Y = C^-1 K / weight. Large batches, and a singular C,
    which has no factor, take one factorisation of the sum.

    Args:
        K: (d_in, n) keys.
        C: Returns the second moment (d_in, d_in); called only if the moment itself is needed.
        weight: Weight of C against the keys.
        factor: The factor of C; None if C is singular.

    Raises:
        StatisticsError: the sum is singular too.
    """
    K = K.double()
    if factor is not None and K.shape[1] < CROSSOVER * K.shape[0]:
        Y = factor.solve(K).double() / weight
        return small_adjoint(K, Y, 1.0)
    return factorise(weight * C().double() + K @ K.T, name="plus the keys of the batch").solve(K)


def small_adjoint(K: Tensor, Y: Tensor, ridge: float) -> Tensor:
    """Return Y (ridge I + K^T Y)^-1, (d_in, n), by an n x n factorisation; Y = S^-1 K, S symmetric positive definite.

    Raises:
        NumericalError: without a ridge, a key is zero or depends linearly on those before it. Its `row` is the index.
    """
    G = K.T @ Y
    G = (G + G.T) / 2 + ridge * torch.eye(len(G), dtype=G.dtype, device=G.device)
    lower, info = torch.linalg.cholesky_ex(G)
    if int(info) and len(G) == 1:
        raise NumericalError(NO_KEY, row=0)
    if int(info):
        raise NumericalError(
            f"the {len(G)} keys of the batch depend on each other, this one on those before it, so not all requests "
            "can be met exactly: give a larger ridge, or fewer requests about one subject",
            row=int(info) - 1,
        )
    return torch.cholesky_solve(Y.T, lower).T


def ridge_rows(X: Tensor, ridge: Tensor) -> Tensor:
    """Return (X X^T + ridge I)^-1 X, (t, d_in), for tokens X (t, d_in), by the smaller of the two possible systems.

    V^T times these rows is the ridge regression of the values V (t, d_out) on X. The result has a gradient in `ridge`,
    a number above 0.

    Raises:
        NumericalError: the ridge is too small for these tokens, so that the system is singular.
    """
    wide = len(X) < X.shape[1]
    G = X @ X.T if wide else X.T @ X
    solution, info = torch.linalg.solve_ex(
        G + ridge * torch.eye(len(G), dtype=G.dtype, device=G.device), X if wide else X.T
    )
    if int(info) or not bool(torch.isfinite(solution).all()):
        raise NumericalError(f"the regression is singular at a ridge of {float(ridge):g}")
    return solution if wide else solution.T


def update_directions(K: Tensor, factor: Factor | Inverse | None) -> Tensor:
    """Return the unit vectors u = C^-1 k / ||C^-1 k|| (k / ||k|| without a factor), (n, d_in) in float64.

    ROME writes its update along u (Meng et al. 2022, equation 2 and appendix A).

    Args:
        K: (n, d_in) keys.
        factor: The factor of C, or None to leave C out.

    Raises:
        NumericalError: a key is zero or not finite, so it has no direction. Its `row` is the index of the key.
    """
    U = K.double() if factor is None else factor.solve(K.T).T.double()
    norms = U.norm(dim=1, keepdim=True)
    if (row := _first_index(~((norms > 0) & torch.isfinite(norms)))) is not None:
        raise NumericalError(NO_KEY, row=row)
    return U / norms


def rank_one_values(residual: Tensor, keys: Tensor, U: Tensor) -> Tensor:
    """Return v = r / (k . u) for each request, (n, d_out) in float64, so that the update v u^T maps k to r.

    Args:
        residual: (n, d_out) what the update should add to the value of k.
        keys: (n, d_in) the keys k that the update is solved at.
        U: (n, d_in) unit directions.

    Raises:
        NumericalError: k . u is exactly zero, so no finite update exists. Its `row` is the index of the request.
    """
    scale = (keys.double() * U).sum(dim=1, keepdim=True)
    if (row := _first_index(scale == 0)) is not None:
        raise NumericalError(
            "the key is orthogonal to the direction of its update: no finite update reaches its value", row=row
        )
    return residual.double() / scale


def _first_index(mask: Tensor) -> int | None:
    """Return the first index at which a mask (n,) or (n, 1) is set; None if it is nowhere."""
    indices = mask.flatten().nonzero()
    return int(indices[0]) if len(indices) else None
