"""Affine adapters: a fixed affine change of a module's output, at some or all positions of a row.

    y' = y + U (V y) + b

    b alone                                 adds a direction (activation addition, CAA, inference-time intervention)
    U = -r, V = r^T, b = 0                  removes the direction r of length 1 (directional ablation)
    U = -r, V = r^T, b = p r + a r          moves what is along r to a fixed value (affine concept editing)
    b (n, d), one row per token             adds a row to each of n tokens (activation addition of a prompt)

Two of them one after another are one again, so that any number of edits of a module act as one change:

    y'' = y + [U1 + U2 V2 U1, U2] [V1; V2] y + (b1 + U2 V2 b1 + b2)

They can stand at any module that gives hidden states: a linear map, or a whole block, whose states may be the first of
a tuple. Added to the output of a down projection, b is the bias of that map. Added to the output of a block, U V sees
the residual stream, as affine concept editing needs it.

Legend: d width of the output; r rank; b rows and t tokens of a batch where a shape is meant; n tokens of a prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from errata.editors.core.errors import AlgebraError, ArchitectureError, ErrataError, LedgerError
from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.adapter import Adapter, Folded
from errata.editors.core.ledger.row_layout import RowLayout
from errata.editors.core.model.parts import features
from errata.editors.core.steering.positions import EVERYWHERE, Where


@dataclass(frozen=True, eq=False)
class Change:
    """One affine change at the same positions.

    Attributes:
        b: (d,) what is added; (n, d) for the place `prefix`, a row per token.
        U: (d, r), None without a product.
        V: (r, d), None without a product.
        where: The positions.
    """

    b: Tensor
    U: Tensor | None = None
    V: Tensor | None = None
    where: Where = EVERYWHERE

    def __post_init__(self) -> None:
        d, is_prefix = self.b.shape[-1], self.where.place == "prefix"
        if self.b.ndim != 1 + is_prefix or not self.b.numel():
            raise LedgerError(f"expected b {'(n, d)' if is_prefix else '(d,)'}, got {tuple(self.b.shape)}")
        if self.U is None and self.V is None:
            return
        if is_prefix or self.U is None or self.V is None:
            raise LedgerError("expected both U and V or neither, and neither of a prefix")
        if self.U.ndim != 2 or tuple(self.V.shape) != (self.U.shape[1], d) or len(self.U) != d:
            shapes = f"{tuple(self.U.shape)} and {tuple(self.V.shape)}"
            raise LedgerError(f"expected U (d, r) and V (r, d) with d = {d}, got {shapes}")

    @property
    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Its tensors by name."""
        for name in ("b", "U", "V"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor

    def to(self, device: torch.device) -> Change:
        """Return it on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.parts})

    def in_dtype(self, dtype: torch.dtype) -> Change:
        """Return it in a precision."""
        return replace(self, **{name: tensor.to(dtype) for name, tensor in self.parts})

    def scaled(self, factor: float) -> Change:
        """Return a change that adds `factor` times as much."""
        return replace(self, b=self.b * factor)

    def then(self, later: Change) -> Change | None:
        """Return what the two do one after another as one; None if they act at other positions."""
        if later.where != self.where or later.b.shape != self.b.shape:
            return None
        if later.b.dtype != self.b.dtype:
            widest = torch.promote_types(later.b.dtype, self.b.dtype)
            return self.in_dtype(widest).then(later.in_dtype(widest))
        with arithmetic.plain_arithmetic(self.b.device.type):
            b = self.b + later.b
            if later.U is None or later.V is None:
                return replace(self, b=b)
            b = b + later.U @ (later.V @ self.b)
            if self.U is None or self.V is None:
                return replace(later, b=b)
            U = torch.cat([self.U + later.U @ (later.V @ self.U), later.U], dim=1)
            V = torch.cat([self.V, later.V], dim=0)
            if U.shape[1] >= U.shape[0]:  # as many numbers as the product, or more
                U, V = U @ V, torch.eye(U.shape[0], dtype=U.dtype, device=U.device)
            return replace(later, b=b, U=U, V=V)

    def act(self, y: Tensor, layout: RowLayout) -> Tensor:
        """Return the changed states (b, t, d), or (b t, d) of a change at all tokens.

        Raises:
            ArchitectureError: The states do not say which tokens belong to one row, and the change has to know.
        """
        if self.where.place == "all":
            return self._moved(y)
        if y.ndim != 3:
            raise ArchitectureError(
                f"a change at positions {self.where.place!r} needs states (rows, tokens, width), got {tuple(y.shape)}; "
                "steer the output of a block"
            )
        rows, t, _ = y.shape
        if not self.where.acts_in(t):
            return y
        if self.where.place == "prefix":
            index = self.where.rows_of_prefix(len(self.b), rows, t, layout, y.device)
            added = y + self.b.to(y.dtype)[index.clamp_min(0)]
            return torch.where((index >= 0)[..., None], added, y)
        inside = self.where.inside(rows, t, layout, y.device)
        moved = self._moved(y)
        return moved if inside is None else torch.where(inside[..., None], moved, y)

    def _moved(self, y: Tensor) -> Tensor:
        if self.U is None or self.V is None:
            return y + self.b.to(y.dtype)
        wide = y.to(torch.promote_types(self.b.dtype, y.dtype))
        change = linear(linear(wide, self.V.to(wide.dtype)), self.U.to(wide.dtype)) + self.b.to(wide.dtype)
        return (wide + change).to(y.dtype)


@dataclass(frozen=True, eq=False)
class Affine(Adapter):
    """The record of one edit at one module.

    Attributes:
        changes: What it does, one after another; several if they act at other positions.
        reads: Name of the decoder, which positions that depend on the row are read from; None where none do.
    """

    changes: tuple[Change, ...]
    reads: str | None = None

    kind: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        if not self.changes or len({change.b.shape[-1] for change in self.changes}) != 1:
            raise LedgerError(f"expected one or more changes of one width, got {len(self.changes)}")
        if self.reads is None and any(change.where.needs_layout for change in self.changes):
            place = next(change.where.place for change in self.changes if change.where.needs_layout)
            raise LedgerError(
                f"positions {place!r} are read from the decoder's arguments; expected its name as `reads`"
            )

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {f"{i}.{name}": tensor for i, change in enumerate(self.changes) for name, tensor in change.parts}

    @property
    def numbers(self) -> Mapping[str, Any]:
        return {"where": [change.where.plain for change in self.changes], "reads": self.reads}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Self:
        try:
            changes = tuple(
                Change(tensors[f"{i}.b"], tensors.get(f"{i}.U"), tensors.get(f"{i}.V"), Where.of(where))
                for i, where in enumerate(numbers["where"])
            )
            return cls(changes, numbers["reads"])
        except (KeyError, TypeError, ValueError, ErrataError) as error:
            raise LedgerError(f"expected the parts of an affine change, got others: {error!r}") from error

    @classmethod
    def joined(cls, adapters: Sequence[Self]) -> Self:
        folded = cls.folded(adapters)
        return cls(folded.changes, folded.reads)

    @classmethod
    def folded(cls, adapters: Sequence[Self]) -> AffineMap:
        first = adapters[0]
        return AffineMap(first.changes, first.reads).extended(adapters[1:])

    def check(self, module: nn.Module) -> None:
        width, sizes = self.changes[0].b.shape[-1], features(module)
        # Of a block only its weights say which width it may have.
        fits = sizes[0] == width if sizes else any(width in parameter.shape for parameter in module.parameters())
        if not fits:
            has = f"{sizes[0]} outputs" if sizes else "no weight of that size"
            raise LedgerError(
                f"expected a module with outputs of width {width}, got {type(module).__name__} with {has}"
            )

    def scaled(self, factor: float) -> Self:
        if any(change.U is not None for change in self.changes):
            raise AlgebraError(
                f"this affine change removes a direction, and cannot be multiplied by {factor:g}: its opposite and its "
                "multiples are not defined; make the edit again with another strength"
            )
        return replace(self, changes=tuple(change.scaled(factor) for change in self.changes))


@dataclass(frozen=True, eq=False)
class AffineMap(Folded):
    """What the records of one module do together. It is immutable: `extended` returns a new one."""

    changes: tuple[Change, ...]
    reads: str | None = None

    kind: ClassVar[str] = "affine"
    reads_layout: ClassVar[bool] = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG002
        layout = args[0] if self.reads is not None else RowLayout()
        for change in self.changes:
            output = change.act(output, layout)
        return output

    def extended(self, adapters: Sequence[Affine]) -> AffineMap:
        found = self
        for adapter in adapters:
            found = found._followed_by(adapter)
        return found

    def _followed_by(self, adapter: Affine) -> AffineMap:
        device = adapter.changes[0].b.device
        if adapter.changes[0].b.shape[-1] != self.changes[0].b.shape[-1]:
            raise LedgerError("expected affine changes of one width at one module")
        if None not in (self.reads, adapter.reads) and self.reads != adapter.reads:
            raise LedgerError(f"expected positions that are read from {self.reads}, got {adapter.reads}")
        changes = [change.to(device) for change in self.changes]
        for change in adapter.changes:
            both = changes[-1].then(change)
            changes[-1:] = [both] if both is not None else [changes[-1], change]
        return AffineMap(tuple(changes), self.reads or adapter.reads)

    def to(self, device: torch.device) -> AffineMap:
        if self.changes[0].b.device == device:
            return self
        return replace(self, changes=tuple(change.to(device) for change in self.changes))

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {f"{i}.{name}": tensor for i, change in enumerate(self.changes) for name, tensor in change.parts}

    @property
    def looks_ahead(self) -> bool:
        return any(change.where.looks_ahead for change in self.changes)
