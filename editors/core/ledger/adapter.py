"""What an edit adds to a model beside its weights: records that act in the forward pass of one module.

An `Adapter` is what ONE edit adds to one module, frozen, and written to disk by four things alone: `kind`, `tensors`,
`numbers` and `from_parts`. The records of a module, replayed in the order of the ledger, make one `Folded`, and that is
what the module's forward hook calls. Undoing one record replays the others, as undoing an update sums the others again.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import LedgerError

# kind -> (module, class), imported when it is first asked for. The modules lie in higher rooms, which build on this
# one. So they are named as text: a file that names a kind may be read before anything has imported its room.
_KINDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"grace": ("errata.editors.core.codebook.codebook", "Correction")}
)


class Adapter(ABC):
    """The record of one edit on one module. Immutable."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors by name."""

    @property
    @abstractmethod
    def numbers(self) -> Mapping[str, Any]:
        """Everything else, as JSON holds it."""

    @classmethod
    @abstractmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Self:
        """The record of these `tensors` and `numbers`; those of `self` give an equal one.

        Raises:
            LedgerError: parts that do not make a record.
        """

    @classmethod
    @abstractmethod
    def joined(cls, adapters: Sequence[Self]) -> Self:
        """One record that does what these do one after another."""

    @classmethod
    @abstractmethod
    def folded(cls, adapters: Sequence[Self]) -> Folded:
        """What these records, at least one, make together in this order.

        Raises:
            LedgerError: records that cannot share a module.
        """

    @abstractmethod
    def check(self, module: nn.Module) -> None:
        """Refuse a module that the record does not fit.

        Raises:
            LedgerError: says what was expected and what came.
        """

    def norm(self) -> float:
        """A size to report: the Frobenius norm of all its tensors."""
        return sum(float(tensor.double().norm()) ** 2 for tensor in self.tensors.values()) ** 0.5

    def owned(self) -> Self:
        """An equal record in memory of its own.

        Raises:
            LedgerError: numbers that JSON cannot hold.
        """
        try:
            numbers = json.loads(json.dumps(dict(self.numbers), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise LedgerError(f"expected numbers that JSON can hold of an adapter {self.kind}: {error}") from error
        whole = torch.contiguous_format
        return self.from_parts(
            {name: t.detach().clone(memory_format=whole) for name, t in self.tensors.items()}, numbers
        )


class Folded(ABC):
    """What the records of one module do together. Never changed once it is made, so that a ledger can go back to it."""

    kind: ClassVar[str]

    @abstractmethod
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor, /) -> Tensor | None:
        """As a forward hook of `module`: its new output, or None to leave it."""

    @abstractmethod
    def extended(self, adapters: Sequence[Any]) -> Self:
        """With more records of the same kind on top, at least one, on their device; `self` stays as it is.

        Raises:
            LedgerError: a record that cannot share the module with these.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """On another device; `self` where it is there."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """All that the forward pass reads, to be compared."""

    @property
    def held(self) -> Sequence[Tensor]:
        """All tensors that it keeps in memory, to be counted."""
        return list(self.tensors.values())

    @property
    def looks_ahead(self) -> bool:
        """Whether what a token of a row is given depends on tokens behind it. Nothing else in a decoder does that, so
        that who reads several things in one row, or fills it up, has to ask; see `hooks.looks_ahead`."""
        return False


def adapter_kind(name: str) -> type[Adapter]:
    """The class of records of this kind, to read them from files.

    Raises:
        LedgerError: there is none; names the nearest.
    """
    if name not in _KINDS:
        raise LedgerError(f"unknown kind of adapter {name!r}{did_you_mean(name, _KINDS)}")
    module, attribute = _KINDS[name]
    return getattr(importlib.import_module(module), attribute)
