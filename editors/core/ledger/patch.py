"""What an edit adds to a model: one update per parameter, kept as factors where it has low rank; and, where it is no
change of weights, records that act in the forward pass of a module (adapter.py).

Shapes: every update is written (d_out, d_in), whichever way round the model stores the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from errata.editors.core.errors import NumericalError
from errata.editors.core.ledger.adapter import Adapter


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
    """The updates of one edit by parameter name, and its adapters by module name. Immutable: a patch in a ledger is
    what its replay adds."""

    updates: Mapping[str, Update]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    def norms(self) -> dict[str, float]:
        """Frobenius norm of each update, and of each adapter what it says of its size."""
        parts: dict[str, Update | Adapter] = {**self.updates, **self.adapters}
        return {name: part.norm() for name, part in parts.items()}

    @property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """Every tensor, behind the name of its parameter or module."""
        found = [(name, tensor) for name, update in self.updates.items() for tensor in update.tensors]
        return found + [(name, tensor) for name, record in self.adapters.items() for tensor in record.tensors.values()]

    def check_finite(self) -> None:
        """Refuse NaN and inf.

        Raises:
            NumericalError: names the parameter or module.
        """
        for name, tensor in self.tensors:
            if not bool(torch.isfinite(tensor).all()):
                raise NumericalError(f"the update of {name} holds NaN or inf; the edit is refused")


def merge(patches: Sequence[Patch]) -> Patch:
    """One patch that adds what all of them add: factors side by side where all have low rank, else dense; the records
    of a module one after another."""
    updates: dict[str, Update] = {}
    for name in dict.fromkeys(name for patch in patches for name in patch.updates):
        updates[name] = _sum([patch.updates[name] for patch in patches if name in patch.updates])
    adapters: dict[str, Adapter] = {}
    for name in dict.fromkeys(name for patch in patches for name in patch.adapters):
        records = [patch.adapters[name] for patch in patches if name in patch.adapters]
        adapters[name] = type(records[0]).joined(records)
    return Patch(updates, adapters)


def _sum(parts: Sequence[Update]) -> Update:
    """On the first one's device: the others may lie elsewhere, where they were loaded or the model has moved."""
    first = parts[0].tensors[0]
    factors = [part for part in parts if isinstance(part, LowRank)]
    if len(factors) == len(parts):
        U, V = ([getattr(part, side).to(first.device) for part in factors] for side in "UV")
        return LowRank(torch.cat(U, dim=1), torch.cat(V, dim=0))
    matrices = [part.matrix(first.dtype, first.device) for part in parts]
    return Dense(sum(matrices[1:], matrices[0]))
