"""Which elements of a weight are pruned: by magnitude, by Wanda, and by SparseGPT, which also makes up for the loss.

The conventions are those of hartvigsen-group/composable-interventions, whose pruners are those of locuslab/wanda. A
threshold is the int(n s)-th smallest score of n, counted from 0, and what is not above it is pruned. So magnitude and
SparseGPT prune one element more than int(n s); Wanda prunes int(d_in s) of each row exactly.

Shapes: weights and masks (d_out, d_in); the Gram matrix of the inputs (d_in, d_in).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Columns that SparseGPT and GPTQ treat together: the errors of a block reach later columns when the block is done."""


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Return which elements are pruned (True): the smallest of the whole weight by absolute value."""
    if sparsity == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    scores = weight.abs()
    return scores <= scores.flatten().sort().values[int(scores.numel() * sparsity)]


def wanda_mask(weight: Tensor, squares: Tensor, sparsity: float) -> Tensor:
    """Return which elements are pruned (True): in each row the smallest |W_ij| ||x_j||.

    Args:
        weight: The weight.
        squares: (d_in,) sum of x_j^2 over the tokens of the calibration. A common factor changes nothing.
        sparsity: Share of each row, from 0 to 1. Of equal scores the lower column is pruned first.

    Source: Sun et al., arXiv 2306.11695, equation 1.
    """
    scores = weight.abs() * squares.to(weight).sqrt()
    lowest = scores.sort(dim=1, stable=True).indices[:, : int(weight.shape[1] * sparsity)]
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, lowest, True)


def inverse_factor(gram: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Return the upper Cholesky factor of the inverse of a damped Gram matrix, and which columns had no input.

    Args:
        gram: H; the diagonal of a column without input becomes 1.
        damp: What is added to the diagonal, as a share of its mean.

    Raises:
        torch.linalg.LinAlgError: The damped matrix is not positive definite.
    """
    dead = gram.diagonal() == 0
    damped = gram.clone()
    damped.diagonal()[dead] = 1
    damped.diagonal().add_(damp * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True), dead


def sparsegpt(weight: Tensor, gram: Tensor, sparsity: float, *, damp: float = 0.01, block: int = BLOCK) -> Tensor:
    """Return the pruned weight: what is left makes up for what each pruned element did to the output.

    In each block of columns the elements with the smallest w^2 / U_jj^2 are pruned, U the factor of `inverse_factor`.
    The error of a column is spread over the columns behind it.

    Args:
        weight: The weight.
        gram: (2 / rows) X^T X of the inputs.
        sparsity: Share of each block.
        damp: As of `inverse_factor`.
        block: Columns of a block.

    Source: Frantar and Alistarh, arXiv 2301.00774, algorithm 1.
    """
    U, dead = inverse_factor(gram, damp)
    W = weight.clone()
    W[:, dead] = 0
    for start in range(0, W.shape[1] if sparsity else 0, block):
        end = min(start + block, W.shape[1])
        part, own = W[:, start:end].clone(), U[start:end, start:end]
        scores = part.square() / own.diagonal().square()
        gone = scores <= scores.flatten().sort().values[int(scores.numel() * sparsity)]
        errors = torch.empty_like(part)
        for j in range(end - start):
            column = part[:, j].clone()
            W[:, start + j] = column.masked_fill(gone[:, j], 0)
            errors[:, j] = (column - W[:, start + j]) / own[j, j]
            part[:, j:] -= torch.outer(errors[:, j], own[j, j:])
        W[:, end:] -= errors @ U[start:end, end:]
    return W
