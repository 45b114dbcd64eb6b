"""TIES: merge several changes of one weight (Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging
Models")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return one change that stands for several.

    Of each change, the share `density` of elements with the largest magnitude is kept. Per element, the sign of the
    weighted sum is elected (+ for zero), and the changes that agree with it are averaged by their weights.

    Args:
        deltas: Changes of one shape.
        weights: One per change.
        density: The share that is kept, above 0 and at most 1.
    """
    kept = [trimmed(delta, density) * weight for delta, weight in zip(deltas, weights, strict=True)]
    sign = torch.where(torch.stack(kept).sum(0) >= 0, 1, -1)
    agree = [delta.sign() == sign for delta in kept]
    merged = torch.stack([delta * ok for delta, ok in zip(kept, agree, strict=True)]).sum(0)
    share = torch.stack([ok * weight for ok, weight in zip(agree, weights, strict=True)]).sum(0)
    return merged / torch.where(share == 0, 1, share)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Return a change with the int(density n) of its n elements that have the largest magnitude; the rest is zero.

    Which of several equal magnitudes are kept is the choice of `torch.topk`, as in the authors' code.
    """
    flat = delta.reshape(-1)
    chosen = flat.abs().topk(int(density * len(flat))).indices
    return torch.zeros_like(flat).index_copy(0, chosen, flat[chosen]).view_as(delta)
