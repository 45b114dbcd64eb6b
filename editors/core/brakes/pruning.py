"""PRUNE: once a sequence is done, its changes are kept from stretching any direction more than the weight itself does.

    D = W_N - W_0 = sum_i s_i u_i v_i^T,    s_i <- f(s_i) where s_i >= s_0,    f(s) = ln s - ln s_0 + s_0

s_0 is the largest singular value of the untouched weight W_0. (Ma et al. 2025, "Perturbation-Restrained Sequential
Model Editing", and mjy1111/PRUNE, from which the other functions f are.) The step is no part of any edit: later edits
of a sequence are found on the model without it. The copy in AlphaEdit's repository adds the result to W_0 + D instead
of W_0, which is not followed.

Legend: W, D (d_out, d_in); U (d_out, r), s (r,), V (r, d_in); k of the r values are at least s_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.ledger.patch import LowRank, Update, summed

Singular = Literal["log", "log2", "log1_5", "log1_2", "linear"]


def _log(base: float) -> Callable[[Tensor, float], Tensor]:
    return lambda s, top: (s.log() - math.log(top)) / math.log(base) + top


FUNCTIONS: Mapping[Singular, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {
        "log": _log(math.e),
        "log2": _log(2),
        "log1_5": _log(1.5),
        "log1_2": _log(1.2),
        "linear": lambda s, top: (s + top) / 2,
    }
)


def pruning(updates: Sequence[Update], W: Tensor, function: Singular) -> LowRank | None:
    """Return what makes the sum of the updates a pruned one, of rank k; None where no singular value is large enough.

    Args:
        updates: All updates of one weight.
        W: (d_out, d_in) the untouched weight.
        function: f, by its name.
    """
    U, s, V = singular_triplets(updates)
    top = largest_singular_value(W)
    large = s >= top
    if not bool(large.any()):
        return None
    change = FUNCTIONS[function](s[large], top) - s[large]
    dtype = working_dtype(W.dtype)
    return LowRank((U[:, large] * change).to(dtype), V[large].to(dtype))


def singular_triplets(updates: Sequence[Update]) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, s and V of the sum of updates, in float64; by QR of their factors where these are few."""
    total = summed(updates)
    if not isinstance(total, LowRank) or total.U.shape[1] > min(total.shape):
        first = updates[0].tensors[0]
        return torch.linalg.svd(total.matrix(torch.float64, first.device), full_matrices=False)
    left, upper = torch.linalg.qr(total.U.double())
    right, lower = torch.linalg.qr(total.V.double().T)
    U, s, V = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ U, s, V @ right.T


def largest_singular_value(W: Tensor) -> float:
    """Return the largest singular value of W, from the smaller of its two Gram matrices."""
    rows = W.double() if W.shape[0] <= W.shape[1] else W.double().T
    return float(torch.linalg.eigvalsh(rows @ rows.T)[-1].clamp_min(0).sqrt())
