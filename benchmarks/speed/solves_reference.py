"""The solves as the originals do them: every batch anew, on d_in x d_in systems. Nothing in the library uses it.

Shapes: K (d_in, n) keys of the batch, R (d_out, n) residuals, C (d_in, d_in) second moment, P (d_in, d_in) projector.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memit(K: Tensor, C: Tensor, weight: float) -> Tensor:
    """(weight C + K K^T)^-1 K, (d_in, n), in float64."""
    K = K.double()
    return torch.linalg.solve(weight * C.double() + K @ K.T, K)


def emmet(K: Tensor, C: Tensor, weight: float, ridge: float) -> Tensor:
    """C'^-1 K (K^T C'^-1 K + ridge I)^-1 with C' = weight C, (d_in, n), in float64, by explicit inverses."""
    K = K.double()
    inverse = torch.inverse(weight * C.double())
    G = K.T @ inverse @ K + ridge * torch.eye(K.shape[1], dtype=K.dtype, device=K.device)
    return (torch.inverse(G) @ (K.T @ inverse)).T


def alphaedit(K: Tensor, R: Tensor, P: Tensor, cache: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The update ((P (K K^T + cache) + ridge I)^-1 P K R^T)^T, (d_out, d_in), and the cache with this batch's keys; all
    in float32, as there."""
    eye = torch.eye(len(P), dtype=P.dtype, device=P.device)
    update = torch.linalg.solve(P @ (K @ K.T + cache) + ridge * eye, P @ K @ R.T)
    return update.T, cache + K @ K.T
