"""Interfaces of adapters: edits that act in the forward pass of a module instead of changing weights.

An `Adapter` is the immutable record of what one edit adds to one module. It is saved and loaded through four members:
`kind`, `tensors`, `numbers` and `from_parts`. The records of a module, in the order of the ledger, make one `Folded`.
The module's forward hook calls it. Undoing a record folds the remaining ones again, as undoing an update sums again.
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

from errata.editors.core.errors import AlgebraError, LedgerError
from errata.editors.core.extensions import ExtensionPoint

# kind -> (module, class), imported when it is first asked for. The modules lie in higher rooms, which build on this
# one. So they are named as text: a file that names a kind may be read before anything has imported its room. Kinds of
# other packages come from entry points of GROUP.
_KINDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "affine": ("errata.editors.core.steering.affine", "Affine"),
        "grace": ("errata.editors.core.codebook.codebook", "Correction"),
        "coachhook": ("errata.editors.core.side_memory.hook_layers", "HookUpdate"),
        "memoir": ("errata.editors.core.side_memory.key_masks", "KeyedUpdate"),
        "wise": ("errata.editors.core.side_memory.shards", "ShardUpdate"),
        "context": ("errata.editors.core.contexts.context", "Context"),
    }
)

GROUP = "errata.adapters"


class Adapter(ABC):
    """The immutable record of one edit on one module."""

    kind: ClassVar[str]
    # Whether the output at a row depends on that row alone, so that rows of other edits may stand beside it.
    acts_by_row: ClassVar[bool] = False

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The record's tensors, by name."""

    @property
    @abstractmethod
    def numbers(self) -> Mapping[str, Any]:
        """Everything else that the record needs, as JSON values."""

    @classmethod
    @abstractmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Self:
        """Make a record from its `tensors` and `numbers`, as read from a file.

        Raises:
            LedgerError: The parts do not make a record.
        """

    @classmethod
    @abstractmethod
    def joined(cls, adapters: Sequence[Self]) -> Self:
        """Return one record that does what these do one after another."""

    @classmethod
    @abstractmethod
    def folded(cls, adapters: Sequence[Self]) -> Folded:
        """Return what one or more records do together, in this order.

        Raises:
            LedgerError: The records cannot share a module.
        """

    @abstractmethod
    def check(self, module: nn.Module) -> None:
        """Refuse a module that the record does not fit.

        Raises:
            LedgerError: It says what was expected and what came.
        """

    def norm(self) -> float:
        """Return a size to report: the Frobenius norm over all its tensors."""
        return sum(float(tensor.double().norm()) ** 2 for tensor in self.tensors.values()) ** 0.5

    def scaled(self, factor: float) -> Self:
        """Return a record that acts `factor` times as strongly. Here: refuse, since most adapters have no strength.

        Raises:
            AlgebraError: The kind of adapter cannot be scaled.
        """
        raise AlgebraError(
            f"an adapter of kind {self.kind!r} cannot be multiplied by {factor:g}: it acts in the forward pass and has "
            "no strength to change; scale edits that write weights, or make this edit again with other settings"
        )

    def copy(self) -> Self:
        """Return an equal record in new memory, which later changes to the caller's tensors cannot reach.

        Raises:
            LedgerError: JSON cannot hold the numbers.
        """
        try:
            numbers = json.loads(json.dumps(dict(self.numbers), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise LedgerError(f"adapter {self.kind}: expected `numbers` that JSON can hold: {error}") from error
        whole = torch.contiguous_format
        return self.from_parts(
            {name: t.detach().clone(memory_format=whole) for name, t in self.tensors.items()}, numbers
        )


class Folded(ABC):
    """What the records of one module do together. It is immutable, so that a ledger can return to an earlier one.

    Attributes:
        reads: Name of the module whose inputs stand for those of the records' own module; None for its own inputs. It
            must run before the records' module in every forward pass, on the same rows and positions.
        reads_layout: Whether that module is the decoder, and only the `RowLayout` of its calls is read.
    """

    kind: ClassVar[str]
    reads: str | None = None
    reads_layout: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor, /) -> Tensor | None:
        """Act as a forward hook of `module`: return its new output, or None to keep `output`.

        Of a module that gives a tuple, `output` is the first of it. `args` are (RowLayout,) with `reads_layout`.
        """

    @abstractmethod
    def extended(self, adapters: Sequence[Any]) -> Self:
        """Return this with one or more records of the same kind after it, on the records' device.

        Raises:
            LedgerError: A record cannot share the module with these.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """Return this on another device; `self` if it is there already."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors that the forward pass reads, for comparisons."""

    @property
    def kept_tensors(self) -> Sequence[Tensor]:
        """All tensors that it keeps in memory, for counting bytes."""
        return list(self.tensors.values())

    @property
    def looks_ahead(self) -> bool:
        """Whether the output at a token depends on later tokens of its row.

        Nothing else in a decoder does that. So code that packs several texts into one row, or pads a row, must check
        this first (`adapter_hooks.looks_ahead`).
        """
        return False


def adapter_kind(name: str) -> type[Adapter]:
    """Return the class of adapters of this kind, to read them from files.

    Raises:
        LedgerError: There is no such kind (it names the nearest), or another package's kind cannot be imported.
    """
    if name not in _KINDS:
        return _extensions().load(name)
    module, attribute = _KINDS[name]
    return getattr(importlib.import_module(module), attribute)


def check_registered(kind: type[Adapter]) -> None:
    """Refuse adapters that no file could give back, before one is written.

    Raises:
        LedgerError: Their kind is not registered, or is that of another class.
    """
    if kind.kind not in (*_KINDS, *_extensions().others()):
        place = f"{kind.__module__}:{kind.__qualname__}"
        raise LedgerError(
            f"adapters of kind {kind.kind!r} cannot be saved, because nothing could load them again; register the kind "
            f'in your package\'s pyproject.toml: [project.entry-points."{GROUP}"] {kind.kind} = "{place}"'
        )
    if (registered := adapter_kind(kind.kind)) is not kind:
        raise LedgerError(f"adapters of kind {kind.kind!r} cannot be saved: that is the kind of {registered!r}")


def _extensions() -> ExtensionPoint:
    return ExtensionPoint(
        GROUP,
        "kind of adapter",
        "a subclass of Adapter",
        lambda loaded: isinstance(loaded, type) and issubclass(loaded, Adapter),
        own=tuple(_KINDS),
        named_by="kind",
        error=LedgerError,
    )
