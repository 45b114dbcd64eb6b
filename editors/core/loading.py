"""The edits that a model carries, to the disk and back: one of them, or all together.

    errata.save_edits(model, "corrections")                   # all edits that the model carries
    ledger = errata.load_ledger("corrections", model)         # on another day: the same bits
    edit = errata.load_edit("corrections", model, id="a1")    # or one of them
    errata.edit_of(model, edit.id).undo()
    errata.export_lora(model, "adapter")                      # all of them as one LoRA adapter, for PEFT and vLLM

An `Edit` has methods of the same names for itself alone.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from errata.editors.core.edit import Edit
from errata.editors.core.errors import LedgerError
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.storage.edit_folder import Edits
from errata.editors.core.storage.lora_export import LoraExport, write_lora
from errata.editors.core.storage.merged_export import write_merged


def load_edit(
    folder: str | Path,
    model: nn.Module,
    tokenizer: Tokenizer | None = None,
    *,
    id: str | None = None,  # noqa: A002
    revision: str | None = None,
    force: bool = False,
    max_norm_ratio: float | None = None,
    apply: bool = True,
) -> Edit:
    """Apply a saved edit to a model, on top of those that it carries.

    Args:
        folder: A folder as `Edit.save` writes it; where there is none, ORG/NAME of the Hub.
        model: The model that the edit was made on, in the same precision.
        tokenizer: If given, it is checked as the model is.
        id: The id of the edit or of its request, where the folder holds several.
        revision: Branch, tag or commit on the Hub.
        force: Accept another model too, as long as the shapes fit.
        max_norm_ratio: Refuse an update whose norm exceeds this many times its weight's; None: the limit that the edit
            was made with.
        apply: False: return the edit without applying it, to calculate with it. The model is still checked.

    Returns:
        The edit, applied; `undo()` restores the weights.

    Raises:
        LedgerError: the folder holds several edits and no `id` is given, or the model carries this edit already.
        DamagedEditsError, HubError: as `Edits.read`.
        OtherBaseError, NumericalError: as `Edits.apply_to`. On any error the model is as before.
    """
    edits = Edits.read(folder, revision=revision)
    if id is not None:
        edits = edits.only({edits.find(id).id})
    if len(edits) != 1:
        raise LedgerError(f"{folder} holds {len(edits)} edits; say which by id=, or load all with errata.load_ledger")
    edit = Edit.of(edits.entries[0], model)  # first: if the record is no edit, the model is not touched
    if apply:
        edits.apply_to(model, tokenizer, force=force, max_norm_ratio=max_norm_ratio)
    elif not force:
        edits.check(model, tokenizer)
    return edit


def load_ledger(
    folder: str | Path,
    model: nn.Module,
    tokenizer: Tokenizer | None = None,
    *,
    revision: str | None = None,
    force: bool = False,
    max_norm_ratio: float | None = None,
) -> Ledger:
    """Apply all edits of a folder to a model, on top of those that it carries. Arguments and errors as `load_edit`.

    Returns:
        The model's ledger. Its `clear()` undoes all edits of the model, and `errata.edit_of(model, id)` is one of them.
    """
    edits = Edits.read(folder, revision=revision)
    return edits.apply_to(model, tokenizer, force=force, max_norm_ratio=max_norm_ratio)


def edit_of(model: nn.Module, id: str) -> Edit:  # noqa: A002
    """Return one of the edits that a model carries, to be undone, saved or exported by itself.

    Args:
        model: The model.
        id: Of the edit, as `Edit.id` and `Entry.id` have it.

    Raises:
        LedgerError: the model carries no edit of this id.
    """
    entries = Ledger.of(model).entries
    entry = next((entry for entry in entries if entry.id == id), None)
    if entry is None:
        raise LedgerError(f"no entry {id!r} among the {len(entries)} of this ledger")
    return Edit.of(entry, model)


def save_edits(model: nn.Module, folder: str | Path, *, tokenizer: Tokenizer | None = None) -> Path:
    """Write all edits that a model carries into a folder, which `errata.load_ledger` applies to the same model.

    Args:
        model: The model.
        folder: A new folder, or an empty one.
        tokenizer: If given, loading can tell whether it is another.

    Returns:
        The folder.

    Raises:
        ExportError: the folder is there already; nothing is written.
    """
    return Edits.of(Ledger.of(model), tokenizer=tokenizer).write(folder)


def push_to_hub(model: nn.Module, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Make a repository of the Hub hold all edits that a model carries, in place of those that it holds.

    Args:
        model: The model.
        repo_id: ORG/NAME of the repository; it is created if it is missing.
        private: Whether a new repository is private; None: as the account has it.
        revision: A branch that exists; None: main.

    Returns:
        The address of the commit.

    Raises:
        ExportError: the repository holds something else than edits.
        HubError: the Hub cannot be reached or refuses to be written.
    """
    return Edits.of(Ledger.of(model)).push_to_hub(repo_id, private=private, revision=revision)


def export_lora(model: nn.Module, folder: str | Path, *, rank: int | None = None) -> LoraExport:
    """Write all edits that a model carries as one LoRA adapter, which PEFT loads. Needs no PEFT.

    Args:
        model: A model of transformers.
        folder: A new folder, or an empty one.
        rank: Cut updates of a higher rank down to this one; the errors are in what is returned. None: keep them whole,
            or refuse above 512.

    Raises:
        ExportError: no adapter can hold the edits, or the folder is there already; nothing is written.
    """
    return write_lora(model, Ledger.of(model).entries, folder, rank=rank)


def export_merged(model: nn.Module, folder: str | Path, tokenizer: Tokenizer | None = None) -> Path:
    """Write a model with all edits that it carries as `save_pretrained` does, and the tokenizer if given.

    Args:
        model: A model of transformers.
        folder: A new folder, or an empty one.
        tokenizer: Written beside the model.

    Returns:
        The folder.

    Raises:
        ExportError: an edit is no change of weights, or the folder is there already; nothing is written.
    """
    return write_merged(model, Ledger.of(model).entries, folder, tokenizer)
