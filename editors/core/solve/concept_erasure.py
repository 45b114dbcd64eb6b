"""Affine erasers of a concept with two classes: what they leave of a vector says nothing linear about its class.

    eraser = least_squares_eraser(positives, negatives)
    v' = v - left (right (v - mean))

`orthogonal_eraser` removes the direction between the two means. `least_squares_eraser` (LEACE) changes vectors as
little as possible, measured with their covariance. Both keep the mean over all vectors where it is.

Sources: Belrose et al. 2023, "LEACE: Perfect linear concept erasure in closed form", theorem 4.3; its package
concept-erasure 0.2.4 (leace.py, shrinkage.py), which also shrinks the covariance and keeps its trace from growing;
Bodnar et al. 2014, "On the strong convergence of the optimal linear shrinkage estimator", for the shrinkage.

Legend: n vectors in all; d their width. Everything is computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Singular values of the (whitened) cross-covariance below this count as none, as in the package.
_LEAST = 0.01


@dataclass(frozen=True)
class Eraser:
    """v' = v - left (right (v - mean)).

    Attributes:
        left: (d, k), with k = 1, or 2 where the trace was kept from growing.
        right: (k, d).
        mean: (d,) mean over all vectors.
    """

    left: Tensor
    right: Tensor
    mean: Tensor


def orthogonal_eraser(positives: Tensor, negatives: Tensor) -> Eraser:
    """Return the eraser of the direction from the mean of the negatives to the mean of the positives.

    Args:
        positives: (n1, d).
        negatives: (n0, d).

    Raises:
        ValueError: The two means are the same.
    """
    crossed, mean = _crossed(positives, negatives)
    unit = _unit(crossed, least=0.0)
    return Eraser(unit[:, None], unit[None], mean)


def least_squares_eraser(positives: Tensor, negatives: Tensor) -> Eraser:
    """Return LEACE's eraser. Arguments and errors as of `orthogonal_eraser`.

    The covariance is shrunk towards a multiple of the identity, so that fewer vectors than `d` are enough.
    """
    crossed, mean = _crossed(positives, negatives)
    x = torch.cat([positives, negatives]).double() - mean
    sigma = shrunk_covariance(x.T @ x / len(x), len(x))
    values, vectors = torch.linalg.eigh(sigma)
    is_kept = values > values[-1] * len(sigma) * torch.finfo(values.dtype).eps
    values = values.clamp_min(0)
    whiten = (vectors * torch.where(is_kept, values.rsqrt(), 0.0)) @ vectors.T
    unwhiten = (vectors * torch.where(is_kept, values.sqrt(), 0.0)) @ vectors.T
    unit = _unit(whiten @ crossed, least=_LEAST)
    left, right = (unwhiten @ unit)[:, None], (whiten @ unit)[None]
    return Eraser(*_kept_trace(left, right, unit, sigma), mean)


def shrunk_covariance(S: Tensor, n: int) -> Tensor:
    """Return the optimal linear shrinkage of a sample covariance towards the multiple of I that has its trace.

    Args:
        S: (d, d) sample covariance, divided by n.
        n: Number of vectors.
    """
    d, trace = len(S), S.trace()
    target = torch.eye(d, dtype=S.dtype, device=S.device) * trace / d
    size, crossed = target.square().sum(), (S @ target).trace()
    spread = S.square().sum() * size - crossed.square()
    if not float(spread) > 0:  # S is that multiple already
        return S
    alpha = 1 - (trace.square() * size / n) / spread
    return alpha * S + (1 - alpha) * crossed / size * target


def _crossed(positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Return the covariance of vectors with their class (d,), divided by n - 1, and the mean of all vectors."""
    x = torch.cat([positives, negatives]).double()
    z = torch.cat([torch.ones(len(positives)), torch.zeros(len(negatives))]).to(x)
    mean = x.mean(0)
    return (x - mean).T @ (z - z.mean()) / (len(x) - 1), mean


def _unit(direction: Tensor, *, least: float) -> Tensor:
    size = direction.norm()
    if not float(size) > least:
        raise ValueError("the positive and the negative examples have the same mean, so that there is nothing to erase")
    return direction / size


def _kept_trace(left: Tensor, right: Tensor, unit: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return the projection, or its mixture with the orthogonal one, so that the trace of the covariance stays."""
    eye = torch.eye(len(sigma), dtype=sigma.dtype, device=sigma.device)
    P, Q = eye - left @ right, eye - torch.outer(unit, unit)
    w, x = sigma.trace(), (P @ sigma @ P.T).trace()
    if x <= w:
        return left, right
    y, z = 2 * (P @ sigma @ Q.T).trace(), (Q @ sigma @ Q.T).trace()
    # The trace is z <= w at alpha = 0 and x > w at 1, so that a root lies between them: less than 0 is rounding.
    root = (4 * w * x - 4 * w * y + 4 * w * z - 4 * x * z + y.square()).clamp_min(0).sqrt()
    low, high = ((z - y / 2 + sign * root / 2) / (x - y + z) for sign in (-1, 1))
    alpha = (low if low > 0 else high).clamp(0, 1)
    orthogonal = unit[:, None]
    return torch.cat([alpha * left, (1 - alpha) * orthogonal], dim=1), torch.cat([right, orthogonal.T])
