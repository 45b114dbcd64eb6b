"""What a ledger gives to the outside: single edits, folders, repositories of the Hub, adapters, models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from errata.editors.core.errors import LedgerError

if TYPE_CHECKING:
    from errata.editors.core.editor import Edit
    from errata.editors.core.ledger.entry import Entry
    from errata.editors.core.ledger.ledger import Ledger
    from errata.editors.core.model.tokens import Tokenizer
    from errata.editors.core.storage.lora_export import LoraExport


class Outward(ABC):
    """Base class of the ledger: what it can do with its entries without changing them."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The model."""

    @property
    @abstractmethod
    def entries(self) -> tuple[Entry, ...]:
        """In the order of the sum."""

    def edit(self, id: str) -> Edit:  # noqa: A002
        """One entry as an edit, to be undone or saved by itself.

        Raises:
            LedgerError: there is none of this id.
        """
        from errata.editors.core.editor import Edit

        entry = next((entry for entry in self.entries if entry.id == id), None)
        if entry is None:
            raise LedgerError(f"no entry {id!r} among the {len(self.entries)} of this ledger")
        return Edit.of(entry, self.model)

    def save(self, folder: str | Path, *, tokenizer: Tokenizer | None = None) -> Path:
        """Write all entries into a folder, which `errata.load_ledger` puts on the same model. As `Edit.save`."""
        from errata.editors.core.storage.edit_folder import Edits

        return Edits.of(self._ledger, tokenizer=tokenizer).write(folder)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
        """Make a repository of the Hub hold all entries. As `Edit.push_to_hub`."""
        from errata.editors.core.storage.edit_folder import Edits

        return Edits.of(self._ledger).push_to_hub(repo_id, private=private, revision=revision)

    def export_lora(self, folder: str | Path, *, rank: int | None = None) -> LoraExport:
        """Write all entries as one LoRA adapter, which PEFT loads. As `Edit.export_lora`."""
        from errata.editors.core.storage.lora_export import write_lora

        return write_lora(self.model, self.entries, folder, rank=rank)

    def export_merged(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> Path:
        """Write the model with all entries, which transformers loads. As `Edit.export_merged`."""
        from errata.editors.core.storage.merged_export import write_merged

        return write_merged(self.model, self.entries, folder, tokenizer)

    @property
    def _ledger(self) -> Ledger:
        from errata.editors.core.ledger.ledger import Ledger

        return Ledger.of(self.model)
