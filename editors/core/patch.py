"""What an edit adds to a model: one update per parameter, kept as factors where it has low rank.

Shapes: every update is written (d_out, d_in), whichever way round the model stores the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.editors.core.errors import NumericalError


@dataclass(frozen=True)
class LowRank:
    """The update U @ V, with U (d_out, r) and V (r, d_in)."""

    U: Tensor
    V: Tensor

    def __post_init__(self) -> None:
        if self.U.ndim != 2 or self.V.ndim != 2 or self.U.shape[1] != self.V.shape[0]:
            raise ValueError(
                f"expected U (d_out, r) and V (r, d_in), got {tuple(self.U.shape)} and {tuple(self.V.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.U.shape[0], self.V.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.U, self.V

    def matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The update as a (d_out, d_in) matrix, multiplied out in `dtype`."""
        return self.U.to(device, dtype) @ self.V.to(device, dtype)

    def norm(self) -> float:
        """Frobenius norm, from the r x r Gram matrices: ||UV||^2 = tr((U^T U)(V V^T))."""
        U, V = self.U.double(), self.V.double()
        return float(((U.T @ U) * (V @ V.T)).sum().clamp_min(0).sqrt())


@dataclass(frozen=True)
class Dense:
    """The update `delta` (d_out, d_in) itself, for methods whose updates have full rank."""

    delta: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape[0], self.delta.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.delta,)

    def matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.delta.to(device, dtype)

    def norm(self) -> float:
        return float(self.delta.double().norm())


Update = LowRank | Dense


@dataclass(frozen=True)
class Patch:
    """The updates of one edit by parameter name. Immutable: a patch in a ledger is what its replay adds."""

    updates: Mapping[str, Update]

    def norms(self) -> dict[str, float]:
        """Frobenius norm of each update."""
        return {name: update.norm() for name, update in self.updates.items()}

    def check_finite(self) -> None:
        """Refuse NaN and inf.

        Raises:
            NumericalError: names the parameter.
        """
        for name, update in self.updates.items():
            if not all(bool(torch.isfinite(tensor).all()) for tensor in update.tensors):
                raise NumericalError(f"the update of {name} holds NaN or inf; the edit is refused")


def merged(patches: Sequence[Patch]) -> Patch:
    """One patch that adds what all of them add: factors side by side where all have low rank, else dense."""
    updates: dict[str, Update] = {}
    for name in dict.fromkeys(name for patch in patches for name in patch.updates):
        parts = [patch.updates[name] for patch in patches if name in patch.updates]
        factors = [part for part in parts if isinstance(part, LowRank)]
        if len(factors) == len(parts):
            updates[name] = LowRank(torch.cat([p.U for p in factors], dim=1), torch.cat([p.V for p in factors], dim=0))
        else:
            first = parts[0].tensors[0]
            updates[name] = Dense(
                sum(
                    (p.matrix(first.dtype, first.device) for p in parts[1:]), parts[0].matrix(first.dtype, first.device)
                )
            )
    return Patch(updates)
