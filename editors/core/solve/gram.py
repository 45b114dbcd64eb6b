"""Sum x x^T over very many vectors x (a Gram matrix), quickly and without losing digits. It works on tensors only.

X^T X is symmetric, so only its upper panels are computed:

    panel i = rows [i b, (i + 1) b) from column i b on        (b, d - i b)

Products are summed in the working precision over a block of a few thousand vectors, and the blocks in float64. So the
rounding error stays that of one block, however long the sum.

Shapes: d length of a vector, b rows of a panel, t vectors added at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Thin panels compute fewer entries below the diagonal; thick ones keep the many cores of a GPU busy.
_PANEL_ROWS = {"cpu": 256, "cuda": 1024}


class GramSum:
    """Running sum of x x^T over vectors x of length d.

    Attributes:
        rows: Number of vectors in the sum.
        pending: How many of them are still in the block sum only.
        totals: Upper panels of the sum of finished blocks, in float64.
        block: Upper panels of the block sum, in the working precision; zero while nothing is pending.
    """

    def __init__(self, d: int, *, dtype: torch.dtype, device: torch.device | str, block_rows: int = 8192) -> None:
        """Make an empty sum.

        Args:
            d: Length of a vector.
            dtype: Working precision of products and block sums, float32 or float64.
            device: Where the sum lives; vectors must be there too.
            block_rows: Vectors of a block.
        """
        self.d, self.block_rows, self.rows, self.pending = d, block_rows, 0, 0
        step = _PANEL_ROWS.get(torch.device(device).type, 512)
        self._starts = range(0, d, step)
        shapes = [(min(step, d - start), d - start) for start in self._starts]
        self.block = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.totals = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]

    def add(self, X: Tensor) -> None:
        """Add the vectors in the rows of X (t, d)."""
        if X.ndim != 2 or X.shape[1] != self.d:
            raise ValueError(f"expected X (t, {self.d}), got {tuple(X.shape)}")
        X = X.to(self.block[0].dtype)
        for start, panel in zip(self._starts, self.block, strict=True):
            panel.addmm_(X[:, start : start + len(panel)].T, X[:, start:])
        self.rows += len(X)
        self.pending += len(X)
        if self.pending >= self.block_rows:
            self.flush()

    def flush(self) -> None:
        """Add the block sum to the total, and empty it."""
        for total, panel in zip(self.totals, self.block, strict=True):
            total.add_(panel)
            panel.zero_()
        self.pending = 0

    def restore(self, totals: Sequence[Tensor], rows: int, block: Sequence[Tensor] = (), pending: int = 0) -> None:
        """Continue from the state of another sum, with the same bits. Without pending vectors, `block` may be empty."""
        for total, saved in zip(self.totals, totals, strict=True):
            total.copy_(saved)
        for panel in self.block:
            panel.zero_()
        for panel, saved in zip(self.block, block, strict=bool(pending)):
            panel.copy_(saved)
        self.rows, self.pending = rows, pending

    def mean(self, dtype: torch.dtype) -> Tensor:
        """Return (1 / rows) sum x x^T, an exactly symmetric (d, d) tensor in `dtype` on the CPU."""
        self.flush()
        C = torch.empty(self.d, self.d, dtype=dtype)
        for start, total in zip(self._starts, self.totals, strict=True):
            panel = (total / self.rows).to("cpu", dtype)
            # The diagonal block holds both triangles, which are equal only up to rounding: mirror the upper one.
            square = panel[:, : len(panel)]
            square.copy_(square.triu() + square.triu(1).T)
            C[start : start + len(panel), start:] = panel
            C[start:, start : start + len(panel)] = panel.T
        return C


def relative_change(before: Sequence[Tensor], rows_before: int, after: Sequence[Tensor], rows_after: int) -> float:
    """Return ||A / m - B / n||_F / ||B / n||_F for two sums A and B of x x^T over m and n vectors.

    The sums are given as their upper panels, `before` and `after`, the counts as `rows_before` and `rows_after`.
    """
    difference = norm = 0.0
    for a, b in zip(before, after, strict=True):
        mean = b / rows_after
        difference += _square_norm(a.to(b.device) / rows_before - mean)
        norm += _square_norm(mean)
    return (difference / norm) ** 0.5 if norm else 0.0


def _square_norm(panel: Tensor) -> float:
    """Return a panel's part of the squared norm of the matrix: all to the right of the diagonal block counts twice."""
    return float(2 * panel.square().sum() - panel[:, : len(panel)].square().sum())
