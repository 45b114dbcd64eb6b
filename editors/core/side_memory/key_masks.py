"""MEMOIR's memory: one second weight for all edits. A row sees the columns of the edit that it is most like.

    y = W x + D (x * mask_i)    for the edit i whose key has most in common with the row's,  y = W x  if that is little

(Wang et al. 2025, "MEMOIR: Lifelong Model Editing with Minimal Overwrite and Informed Retention for LLMs".) The key of
a row is the set of the k largest elements, by magnitude, of its mean input less a background mean. An edit's mask is
its key under a fixed permutation, so that columns are used evenly. The share of k that two keys have in common must be
at least `threshold`.

Example: k = 2 of 5 elements, keys {0, 3} of edit a and {1, 4} of edit b, threshold 0.5.

    row's key    {0, 3}   {0, 1}          {2, 4}   {2, 3}          {0, 2} at threshold 0.6
    shares       1, 0     0.5, 0.5        0, 0.5   0.5, 0          0.5, 0
    mask of      a        a, the first    b        a               none

Routing reads the whole row. So a row that is scored must end where it is read, and rows of a cache, one token each, are
routed by that token alone.

Legend: W, D (d_out, d_in); x (b, t, d_in); n edits; r rank of all changes together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from errata.editors.core.errors import LedgerError
from errata.editors.core.ledger.adapter import Adapter, Folded
from errata.editors.core.ledger.patch import LowRank
from errata.editors.core.side_memory.beside_map import (
    added_factors,
    check_site,
    multiplied,
    multipliers,
    require_rows,
)
from errata.editors.core.solve.bits import pack_bits, unpack_bits

NONE = -1  # the route of a row that keeps the map's own output


@dataclass(frozen=True, eq=False)
class KeyedUpdate(Adapter):
    """The record of one edit of n requests.

    Attributes:
        factors: What the edit adds to D: factors (d_out, r) and (r, d_in).
        keys: (n, ceil(d_in / 8)) uint8: the key of each request's prompt, as bits.
        masks: (n, ceil(d_in / 8)) uint8: the columns that it uses, as bits.
        background: (d_in,) mean input of unrelated text.
        top_k: Elements of a key.
        threshold: Least share in common.
        reads: Name of the map whose input x is; None for the record's own module.
    """

    factors: LowRank
    keys: Tensor
    masks: Tensor
    background: Tensor
    top_k: int
    threshold: float
    reads: str | None = None

    kind: ClassVar[str] = "memoir"
    acts_by_row: ClassVar[bool] = True

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        named = {"keys": self.keys, "masks": self.masks, "background": self.background}
        return {"U": self.factors.U, "V": self.factors.V, **named}

    @property
    def numbers(self) -> Mapping[str, Any]:
        read = {} if self.reads is None else {"reads": self.reads}
        return {"top_k": self.top_k, "threshold": self.threshold, **read}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Self:
        try:
            factors = LowRank(tensors["U"], tensors["V"])
            keys, masks, background = (tensors[name] for name in ("keys", "masks", "background"))
            width = (factors.shape[1] + 7) // 8
            if keys.shape != masks.shape or keys.shape[1:] != (width,) or background.shape != factors.V.shape[1:]:
                raise ValueError(f"keys {tuple(keys.shape)}, masks {tuple(masks.shape)}")
            top_k, threshold = int(numbers["top_k"]), float(numbers["threshold"])
            return cls(factors, keys, masks, background, top_k, threshold, numbers.get("reads"))
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"expected the parts of an edit of MEMOIR, got others: {error!r}") from error

    @classmethod
    def joined(cls, adapters: Sequence[Self]) -> Self:
        first = adapters[0]
        factors, keys, masks = _stacked(adapters, first.keys.device)
        return replace(first, factors=factors, keys=keys, masks=masks)

    @classmethod
    def folded(cls, adapters: Sequence[Self]) -> KeyedMemory:
        return KeyedMemory(adapters[0]).extended(adapters[1:])

    def check(self, module: nn.Module) -> None:
        check_site(module, self.factors.shape, self.reads)

    def norm(self) -> float:
        """Frobenius norm of the change."""
        return self.factors.norm()


def _stacked(records: Sequence[KeyedUpdate], device: torch.device) -> tuple[LowRank, Tensor, Tensor]:
    keys, masks = (torch.cat([getattr(r, name).to(device) for r in records]) for name in ("keys", "masks"))
    return added_factors([record.factors for record in records], device), keys, masks


@dataclass(frozen=True, eq=False)
class KeyedMemory(Folded):
    """The memory of one module after some edits, as one record of all of them. `extended` returns a new one."""

    record: KeyedUpdate

    kind: ClassVar[str] = "memoir"

    def extended(self, adapters: Sequence[KeyedUpdate]) -> KeyedMemory:
        if not adapters:
            return self
        held = self.record
        for adapter in adapters:
            if adapter.reads != held.reads:
                raise LedgerError(f"expected an edit that reads {held.reads}, as the others do, got {adapter.reads}")
            same = (adapter.top_k, adapter.threshold) == (held.top_k, held.threshold)
            if not same or not torch.equal(adapter.background.to(held.background), held.background):
                raise LedgerError(
                    "expected the top_k, threshold and background text of the module's other edits "
                    f"({held.top_k}, {held.threshold}), got others ({adapter.top_k}, {adapter.threshold})"
                )
        device = adapters[-1].keys.device
        factors, keys, masks = _stacked([held, *adapters], device)
        background = held.background.to(device)
        return KeyedMemory(replace(held, factors=factors, keys=keys, masks=masks, background=background))

    def to(self, device: torch.device) -> KeyedMemory:
        if self.record.keys.device == device:
            return self
        U, V = (factor.to(device) for factor in self.record.factors.tensors)
        moved = {name: getattr(self.record, name).to(device) for name in ("keys", "masks", "background")}
        return KeyedMemory(replace(self.record, factors=LowRank(U, V), **moved))

    @property
    def reads(self) -> str | None:  # type: ignore[override]
        """Name of the map whose input is read; None for the memory's own module."""
        return self.record.reads

    @cached_property
    def _keys(self) -> Tensor:
        return torch.stack([unpack_bits(bits, self.record.background.shape) for bits in self.record.keys])

    @cached_property
    def _masks(self) -> Tensor:
        return torch.stack([unpack_bits(bits, self.record.background.shape) for bits in self.record.masks])

    @cached_property
    def _matrices(self) -> tuple[Tensor, ...]:
        return multipliers(self.record.factors)

    def change(self, x: Tensor) -> Tensor:
        """Return D x, (..., d_out), in the dtype of the factors."""
        return multiplied(x, self._matrices)

    def route(self, x: Tensor) -> Tensor:
        """Return the request that each row of x (b, t, d_in) is most like, (b,); NONE if too little is in common."""
        keys = key_of(x.to(self.record.background).mean(1), self.record.background, self.record.top_k)
        shares = keys.float() @ self._keys.float().T
        best, index = (shares / self.record.top_k).max(1)
        return torch.where(best >= self.record.threshold - 1e-6, index, NONE)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x = args[0]
        require_rows("MEMOIR", module, x)
        route = self.route(x)
        if not bool((route != NONE).any()):
            return None
        masked = x * self._masks[route.clamp_min(0)][:, None]
        return torch.where((route != NONE)[:, None, None], (output + self.change(masked)).to(output.dtype), output)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.record.tensors

    @property
    def looks_ahead(self) -> bool:
        return True


def key_of(mean: Tensor, background: Tensor, top_k: int) -> Tensor:
    """Return the keys of rows with these mean inputs (b, d_in), as masks (b, d_in)."""
    chosen = (mean - background).abs().topk(top_k, dim=-1).indices
    return torch.zeros_like(mean, dtype=torch.bool).scatter_(-1, chosen, True)


def bits_of(masks: Tensor) -> Tensor:
    """Return masks (n, d_in) as bits, (n, ceil(d_in / 8))."""
    return torch.stack([pack_bits(mask) for mask in masks])
