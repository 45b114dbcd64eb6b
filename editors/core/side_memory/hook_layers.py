"""CoachHooK's layers: a changed copy of a linear map that acts at the tokens where it differs unusually much.

    m_t = || W_h x_t - W x_t ||,   z_t = (m_t - mean m) / std m,   output W_h x_t where z_t >= alpha,  else W x_t

(Li et al. 2024, "Consecutive Batch Model Editing with HooK Layers".) Each edit adds D to W_h, and may lower alpha, so
that each of its own prompts has a token in scope. std divides by one less than the tokens. Mean and std are over

    row       all tokens of the row, as in the authors' code
    prefix    the tokens up to t, so that later words do not change what an edit does

Example: norms of five tokens .1 .2 .1 3 .2. Over the row, z is 1.79 at the fourth. No token of T can have more than
(T - 1) / sqrt(T): 2.04 of six, 2.27 of seven. So an alpha of 2.2 is out of reach for six tokens or fewer. A row of one
token has no z, and generation with a cache gives the map's own output to every new token.

Legend: W, W_h, D (d_out, d_in); x (b, t, d_in); r rank of all D together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from errata.editors.core.errors import LedgerError
from errata.editors.core.ledger.adapter import Adapter, Folded
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.side_memory.beside_map import (
    added_factors,
    check_shape,
    multiplied,
    multipliers,
    require_rows,
)

Statistics = Literal["row", "prefix"]


@dataclass(frozen=True, eq=False)
class HookUpdate(Adapter):
    """The record of one edit at one map.

    Attributes:
        factors: D, what the edit adds to W_h.
        alpha: The z that the edit's own prompts reach, or the initial alpha if that is lower.
        statistics: What mean and std are over.
    """

    factors: LowRank
    alpha: float
    statistics: Statistics

    kind: ClassVar[str] = "coachhook"
    acts_by_row: ClassVar[bool] = True

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"U": self.factors.U, "V": self.factors.V}

    @property
    def numbers(self) -> Mapping[str, Any]:
        return {"alpha": self.alpha, "statistics": self.statistics}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Self:
        try:
            return cls(LowRank(tensors["U"], tensors["V"]), float(numbers["alpha"]), numbers["statistics"])
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"expected the parts of an edit of CoachHooK, got others: {error!r}") from error

    @classmethod
    def joined(cls, adapters: Sequence[Self]) -> Self:
        folded = cls.folded(adapters)
        return cls(folded.factors, folded.alpha, folded.statistics)

    @classmethod
    def folded(cls, adapters: Sequence[Self]) -> HookLayer:
        first = adapters[0]
        return HookLayer(first.factors, first.alpha, first.statistics).extended(adapters[1:])

    def check(self, module: nn.Module) -> None:
        check_shape(module, self.factors.shape)

    def norm(self) -> float:
        """Frobenius norm of D."""
        return self.factors.norm()


@dataclass(frozen=True, eq=False)
class HookLayer(Folded):
    """W_h - W of one map after some edits, and their alpha. It is immutable: `extended` returns a new one."""

    factors: LowRank
    alpha: float
    statistics: Statistics

    kind: ClassVar[str] = "coachhook"

    def extended(self, adapters: Sequence[HookUpdate]) -> HookLayer:
        if not adapters:
            return self
        if any(adapter.statistics != self.statistics for adapter in adapters):
            raise LedgerError(f"expected statistics={self.statistics}, as the module's other edits have them")
        device = adapters[-1].factors.U.device
        parts = [self.factors, *(adapter.factors for adapter in adapters)]
        return replace(
            self, factors=added_factors(parts, device), alpha=min(self.alpha, *(adapter.alpha for adapter in adapters))
        )

    def to(self, device: torch.device) -> HookLayer:
        U, V = self.factors.tensors
        return self if U.device == device else replace(self, factors=LowRank(U.to(device), V.to(device)))

    @cached_property
    def matrices(self) -> tuple[Tensor, ...]:
        """What an input is multiplied by."""
        return multipliers(self.factors)

    def change(self, x: Tensor) -> Tensor:
        """Return (W_h - W) x, (..., d_out), in the dtype of the factors."""
        return multiplied(x, self.matrices)

    def act(self, x: Tensor, output: Tensor) -> Tensor:
        """Return the output (b, t, d_out) with W_h at the tokens in scope."""
        change = self.change(x)
        inside = z_scores(change.norm(dim=-1), self.statistics) >= self.alpha  # never so at NaN
        return torch.where(inside[..., None], (output + change).to(output.dtype), output)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x = args[0]
        require_rows("CoachHooK", module, x)
        return None if x.shape[1] == 1 else self.act(x, output)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"U": self.factors.U, "V": self.factors.V, "alpha": torch.tensor([self.alpha], dtype=torch.float64)}

    @property
    def looks_ahead(self) -> bool:
        # With `prefix` no later token counts, but all earlier ones must be in the row, and not in a cache.
        return True


def z_scores(norms: Tensor, statistics: Statistics) -> Tensor:
    """Return the z of each token of rows (b, t), (b, t); NaN where the norms have no spread, or there is one token."""
    if norms.shape[1] == 1:
        return torch.full_like(norms, torch.nan)
    if statistics == "row":
        return (norms - norms.mean(1, keepdim=True)) / norms.std(1, keepdim=True)
    count = torch.arange(1, norms.shape[1] + 1, device=norms.device, dtype=norms.dtype)
    mean = norms.cumsum(1) / count
    squared = (norms.square().cumsum(1) - count * mean.square()).clamp_min(0)
    return (norms - mean) / (squared / (count - 1)).sqrt()
