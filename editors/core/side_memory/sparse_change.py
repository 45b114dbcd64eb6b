"""A change of a matrix at the elements of a mask: the values there, and one bit per element that says where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errata.editors.core.errors import LedgerError
from errata.editors.core.solve.bits import pack_bits, unpack_bits


@dataclass(frozen=True, eq=False)
class SparseChange:
    """A change (d_out, d_in) that is zero outside of a mask.

    Attributes:
        values: (m,) the change at the elements of the mask, row by row.
        bits: (ceil(d_out d_in / 8),) uint8: the mask (bits.py); None: all elements.
        shape: (d_out, d_in).
    """

    values: Tensor
    bits: Tensor | None
    shape: tuple[int, int]

    @classmethod
    def of(cls, matrix: Tensor, mask: Tensor | None) -> SparseChange:
        """Return a matrix (d_out, d_in) at a mask of its elements, or all of it."""
        d_out, d_in = matrix.shape
        if mask is None:
            return cls(matrix.reshape(-1).clone(), None, (d_out, d_in))
        return cls(matrix[mask], pack_bits(mask), (d_out, d_in))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> SparseChange:
        """Read what `named` has named.

        Raises:
            LedgerError: The tensors are not such a change.
        """
        values, bits = tensors[f"values{name}"], tensors.get(f"bits{name}")
        count = shape[0] * shape[1]
        wanted = count
        if bits is not None:
            if bits.dtype != torch.uint8 or tuple(bits.shape) != ((count + 7) // 8,):
                raise LedgerError(f"expected bits ({(count + 7) // 8},) of uint8, got {tuple(bits.shape)}")
            wanted = int(unpack_bits(bits, shape).sum())
        if tuple(values.shape) != (wanted,):
            raise LedgerError(f"expected {wanted} values of a change {shape}, got {tuple(values.shape)}")
        return cls(values, bits, shape)

    def named(self, name: str) -> dict[str, Tensor]:
        """Return the tensors under names that end in `name`."""
        masked = {} if self.bits is None else {f"bits{name}": self.bits}
        return {f"values{name}": self.values, **masked}

    @property
    def mask(self) -> Tensor | None:
        """Which elements may change, (d_out, d_in); None: all."""
        return None if self.bits is None else unpack_bits(self.bits, self.shape)

    @property
    def matrix(self) -> Tensor:
        """The change as a matrix (d_out, d_in)."""
        if self.bits is None:
            return self.values.view(self.shape)
        return self.values.new_zeros(self.shape).masked_scatter_(unpack_bits(self.bits, self.shape), self.values)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that it keeps."""
        return [self.values] if self.bits is None else [self.values, self.bits]

    def has_mask_of(self, other: SparseChange) -> bool:
        """Return whether two changes have one mask."""
        if self.bits is None or other.bits is None:
            return self.bits is other.bits
        return self.bits is other.bits or torch.equal(self.bits, other.bits.to(self.bits.device))

    def plus(self, other: SparseChange) -> SparseChange:
        """Return the sum of two changes with one mask."""
        return replace(self, values=self.values + other.values.to(self.values))

    def to(self, device: torch.device) -> SparseChange:
        """Return the change on another device; `self` if it is there already."""
        if self.values.device == device:
            return self
        bits = None if self.bits is None else self.bits.to(device)
        return replace(self, values=self.values.to(device), bits=bits)


def added(changes: tuple[SparseChange, ...], other: SparseChange) -> tuple[SparseChange, ...]:
    """Return changes with one more. It is added to the last one if both have one mask, and kept beside it otherwise."""
    if changes and changes[-1].has_mask_of(other):
        return (*changes[:-1], changes[-1].plus(other))
    return (*changes, other)


def total(changes: tuple[SparseChange, ...]) -> Tensor:
    """Return the sum of changes as a matrix (d_out, d_in)."""
    first, *others = (change.matrix for change in changes)
    return sum(others, first)
