"""Tolerances that follow from the precision: how far a number moves when what it is computed from moves by a rounding.

Two machines round differently, so their float32 results may differ by about this much, and by far less than a mistake.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
SEEDS = range(3)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Return the distance of two tensors relative to the second, in the Euclidean norm."""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12))


def nudge(model: Any, seed: int) -> None:
    """Move every weight of a float32 model up or down by one rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = 2 * torch.randint(0, 2, parameter.shape, generator=generator) - 1
            parameter.mul_(1 + EPS * signs)


def shift_of_direction(matrix: Tensor, direction: Tensor) -> float:
    """Return how far the solution x (d,) of C x = k moves, relative to x, when C (d, d) moves by one rounding.

    C moves by a symmetric matrix of norm eps * |C|: a solve in float32 promises no more than the exact solution of a
    system that close. The largest move of a few random ones counts.
    """
    C, x = matrix.double(), direction.double()
    moves = []
    for seed in SEEDS:
        noise = torch.randn(C.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        noise = noise + noise.T
        noise *= EPS * torch.linalg.matrix_norm(C, 2) / torch.linalg.matrix_norm(noise, 2)
        moves.append(apart(torch.linalg.solve(C + noise, C @ x), x))
    return max(moves)


def of_logits(largest: float) -> float:
    """Return how far a log probability may be off in float32 where the logits reach up to `largest`.

    A forward pass of a few layers loses up to ten roundings of its largest logit, on one machine and on another.
    """
    return 16 * EPS * largest
