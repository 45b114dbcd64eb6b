"""The patch of an edit: one update per parameter, and adapters for edits that do not change weights (adapter.py).

An update of low rank is kept as its factors.
Shapes: every update is (d_out, d_in), even where the model stores the weight transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from errata.editors.core.errors import NumericalError
from errata.editors.core.ledger.adapter import Adapter
from errata.editors.core.solve.bits import pack_bits, unpack_bits


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
        """Return the update as a (d_out, d_in) matrix, multiplied out in `dtype`."""
        return self.U.to(device, dtype) @ self.V.to(device, dtype)

    def norm(self) -> float:
        """Return the Frobenius norm, from the r x r Gram matrices: ||UV||^2 = tr((U^T U)(V V^T))."""
        U, V = self.U.double(), self.V.double()
        # Rounding may make the squared norm of a tiny update negative.
        return float(((U.T @ U) * (V @ V.T)).sum().clamp_min(0).sqrt())


@dataclass(frozen=True)
class Dense:
    """The update `delta` (d_out, d_in) itself, for methods whose updates have full rank; (d,) for a vector."""

    delta: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.delta.shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.delta,)

    def matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.delta.to(device, dtype)

    def norm(self) -> float:
        return float(self.delta.double().norm())


@dataclass(frozen=True)
class Masked:
    """The update U @ V at some elements, and zero elsewhere: one bit per element in place of the matrix.

    Attributes:
        U: (d_out, r).
        V: (r, d_in).
        bits: (ceil(d_out d_in / 8),) uint8: whether an element counts, row by row, the lowest bit first.
    """

    U: Tensor
    V: Tensor
    bits: Tensor

    def __post_init__(self) -> None:
        LowRank(self.U, self.V)  # checks their shapes
        wanted = (self.shape[0] * self.shape[1] + 7) // 8
        if self.bits.dtype != torch.uint8 or tuple(self.bits.shape) != (wanted,):
            raise ValueError(f"expected bits ({wanted},) of uint8, got {tuple(self.bits.shape)} of {self.bits.dtype}")

    @classmethod
    def of(cls, factors: LowRank, mask: Tensor) -> Masked:
        """Return the factors where `mask` (d_out, d_in) is true."""
        return cls(factors.U, factors.V, pack_bits(mask))

    @property
    def shape(self) -> tuple[int, int]:
        return self.U.shape[0], self.V.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.U, self.V, self.bits

    @property
    def mask(self) -> Tensor:
        """Which elements count, (d_out, d_in)."""
        return unpack_bits(self.bits, self.shape)

    def matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the update as a (d_out, d_in) matrix, multiplied out in `dtype`."""
        return LowRank(self.U, self.V).matrix(dtype, device) * self.mask.to(device)

    def norm(self) -> float:
        return float(self.matrix(torch.float64, self.U.device).norm())


Update = LowRank | Dense | Masked


@dataclass(frozen=True)
class Patch:
    """The updates of one edit by parameter name, and its adapters by module name.

    It is immutable, since an undo of another entry adds it again.
    """

    updates: Mapping[str, Update]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    def norms(self) -> dict[str, float]:
        """Return the Frobenius norm of each update, and the `norm` of each adapter, by parameter or module name."""
        parts: dict[str, Update | Adapter] = {**self.updates, **self.adapters}
        return {name: part.norm() for name, part in parts.items()}

    @property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """Every tensor with the name of its parameter or module, as (name, tensor)."""
        pairs = [(name, tensor) for name, update in self.updates.items() for tensor in update.tensors]
        return pairs + [(name, tensor) for name, record in self.adapters.items() for tensor in record.tensors.values()]

    def check_finite(self) -> None:
        """Refuse NaN and inf.

        Raises:
            NumericalError: It names the parameter or module.
        """
        for name, tensor in self.tensors:
            if not bool(torch.isfinite(tensor).all()):
                raise NumericalError(f"the update of {name} holds NaN or inf and is refused; load the model in float32")


def compacted(update: Update) -> Update:
    """Return factors multiplied out if they hold more numbers than the matrix."""
    if isinstance(update, LowRank):
        (d_out, d_in), first = update.shape, update.U
        if first.shape[1] * (d_out + d_in) > d_out * d_in:
            return Dense(update.matrix(first.dtype, first.device))
    return update


def merge(patches: Sequence[Patch]) -> Patch:
    """Return one patch that does what all patches do together.

    The factors of a weight are put side by side if all have low rank; else their sum is dense. The adapters of a module
    become one that applies them one after another.
    """
    updates: dict[str, Update] = {}
    for name in dict.fromkeys(name for patch in patches for name in patch.updates):
        updates[name] = summed([patch.updates[name] for patch in patches if name in patch.updates])
    adapters: dict[str, Adapter] = {}
    for name in dict.fromkeys(name for patch in patches for name in patch.adapters):
        records = [patch.adapters[name] for patch in patches if name in patch.adapters]
        adapters[name] = type(records[0]).joined(records)
    return Patch(updates, adapters)


def summed(parts: Sequence[Update]) -> Update:
    """Return the sum on the device of the first update; others may be elsewhere if the model has moved since."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0].tensors[0]
    factors = [part for part in parts if isinstance(part, LowRank)]
    if len(factors) == len(parts):
        # U1 V1 + U2 V2 = [U1 U2] [V1; V2]: exact, without a (d_out, d_in) matrix.
        U, V = ([getattr(part, side).to(first.device) for part in factors] for side in "UV")
        return LowRank(torch.cat(U, dim=1), torch.cat(V, dim=0))
    matrices = [part.matrix(first.dtype, first.device) for part in parts]
    return Dense(sum(matrices[1:], matrices[0]))
