"""What a compression fixes of a weight: which elements are 0, or the grid that they lie on.

An edit that is made after a compression does not respect it. `project` puts a weight back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.editors.core.solve.quantising import BitGrid

PLAIN_BITS, ZERO_BITS = 16, 1
"""What an element counts in average bits, as in composable-interventions: one that is kept, one that is pruned."""
_SCALE_BITS = 32  # of scale and zero point together, for each row and group


class Kept(ABC):
    """What is fixed of one weight (d_out, d_in)."""

    @abstractmethod
    def project(self, weight: Tensor) -> Tensor:
        """Return the nearest weight that the compression allows."""

    @abstractmethod
    def bits(self) -> float:
        """Return the average bits of an element of a weight that the compression allows."""

    def holds(self, weight: Tensor) -> bool:
        """Return whether a weight is one that the compression allows, up to rounding."""
        return torch.allclose(self.project(weight), weight, rtol=1e-5, atol=1e-7 * float(weight.abs().max()))


@dataclass(frozen=True)
class Zeros(Kept):
    """Elements that are 0: those where `mask` (d_out, d_in) is True."""

    mask: Tensor

    def project(self, weight: Tensor) -> Tensor:
        return weight.masked_fill(self.mask.to(weight.device), 0)

    def bits(self) -> float:
        share = float(self.mask.double().mean())
        return ZERO_BITS * share + PLAIN_BITS * (1 - share)


@dataclass(frozen=True)
class OnGrid(Kept):
    """Elements that lie on a grid of a few bits, once each column is multiplied by its entry of `columns` (d_in,).

    What divides the columns stands in another weight of a deployed model, and so takes no bits.
    """

    grid: BitGrid
    columns: Tensor | None = None

    def project(self, weight: Tensor) -> Tensor:
        if self.columns is None:
            return self.grid.nearest(weight)
        return self.grid.nearest(weight * self.columns) / self.columns

    @property
    def steps(self) -> Tensor:
        """How far apart neighbouring points are for each element, (d_out, d_in)."""
        steps = self.grid.scale[:, self.grid.group]
        return steps if self.columns is None else steps / self.columns

    def bits(self) -> float:
        groups, columns = self.grid.scale.shape[1], len(self.grid.group)
        return self.grid.bits + _SCALE_BITS * groups / columns
