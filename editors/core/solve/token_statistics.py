"""Mean and spread of vectors that come in blocks, in a form that can be merged and so taken apart again by a ledger.

Two blocks of n and m vectors have, together, by the formulas of Chan, Golub and LeVeque (1979):

    e = mean_2 - mean_1,    mean = mean_1 + m e / (n + m),    S = S_1 + S_2 + n m / (n + m) e^2

S (d,) sums the squared deviations from the mean. The scatter matrix, if it is kept, follows the same rule with e e^T.
Merging is associative, so the statistics of any set of edits are a merge of what each edit keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of n vectors, in float64.

    Attributes:
        count: n.
        mean: (d,) mean.
        squares: (d,) sum of squared deviations from the mean, S.
        scatter: (k, k) sum of the outer products of the deviations of the last k entries; None if it is not kept.
    """

    count: int
    mean: Tensor
    squares: Tensor
    scatter: Tensor | None = None

    @classmethod
    def of(cls, vectors: Tensor, *, unbiased: bool = False, scatter: int = 0) -> TokenStatistics:
        """Return the statistics of one block of vectors (n, d).

        Args:
            vectors: The vectors.
            unbiased: Count S as n times the unbiased variance, which is n / (n - 1) times too much. A single vector has
                no variance, and counts with S = 0.
            scatter: Number of last entries to keep the scatter matrix of.
        """
        z = vectors.double()
        n, mean = len(z), z.mean(dim=0)
        deviations = z - mean
        squares = deviations.square().sum(dim=0)
        if unbiased and n > 1:
            squares = squares * (n / (n - 1))
        last = deviations[:, z.shape[1] - scatter :]
        return cls(n, mean, squares, last.T @ last if scatter else None)

    def merged(self, other: TokenStatistics | None) -> TokenStatistics:
        """Return the statistics of both together."""
        if other is None:
            return self
        n, m = self.count, other.count
        e = other.mean - self.mean
        squares = self.squares + other.squares + n * m / (n + m) * e.square()
        scatter = None
        if self.scatter is not None and other.scatter is not None:
            last = e[len(e) - len(self.scatter) :]
            scatter = self.scatter + other.scatter + n * m / (n + m) * torch.outer(last, last)
        return TokenStatistics(n + m, self.mean + m / (n + m) * e, squares, scatter)

    def to(self, device: torch.device) -> TokenStatistics:
        """Return these on another device."""
        scatter = None if self.scatter is None else self.scatter.to(device)
        return TokenStatistics(self.count, self.mean.to(device), self.squares.to(device), scatter)

    def deviation(self, eps: float) -> Tensor:
        """Return the standard deviation (d,), sqrt(S / (n - 1 + eps))."""
        return (self.squares / (self.count - 1 + eps)).sqrt()

    def tensors(self, prefix: str, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Return the statistics as tensors, by names that begin with the prefix.

        Args:
            prefix: Begins the names.
            rows: The vectors (n, k) of the scatter matrix. If they are fewer than k, they are kept in place of it, less
                their mean. Both are kept in float32, since they are large.
        """
        named = {"count": self.mean.new_tensor([self.count]), "mean": self.mean, "squares": self.squares}
        if self.scatter is not None and rows is not None and len(rows) < len(self.scatter):
            named["rows"] = (rows.double() - rows.double().mean(dim=0)).float()
        elif self.scatter is not None:
            named["scatter"] = self.scatter.float()
        return {f"{prefix}.{name}": tensor for name, tensor in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> TokenStatistics | None:
        """Return what `tensors` of this prefix hold; None if there are none."""
        if f"{prefix}.count" not in tensors:
            return None
        count, mean, squares = (tensors[f"{prefix}.{name}"] for name in ("count", "mean", "squares"))
        rows, scatter = tensors.get(f"{prefix}.rows"), tensors.get(f"{prefix}.scatter")
        if rows is not None:
            scatter = rows.double().T @ rows.double()
        return cls(int(count), mean, squares, None if scatter is None else scatter.double())


def whitening(statistics: TokenStatistics, eps: float, floor: float) -> tuple[Tensor, float]:
    """Return C^-1/2 (k, k) of the last k entries, C = scatter / (n - k - 1 + eps), and how much of it is the floor.

    Args:
        statistics: With a scatter matrix.
        eps: Added to the divisor.
        floor: Eigenvalues below this count as this.

    Returns:
        The matrix, and the share of eigenvalues below the floor.
    """
    assert statistics.scatter is not None
    k = len(statistics.scatter)
    values, vectors = torch.linalg.eigh(statistics.scatter / (statistics.count - k - 1 + eps))
    share = float((values < floor).double().mean())
    return (vectors * values.clamp_min(floor).rsqrt()) @ vectors.T, share
