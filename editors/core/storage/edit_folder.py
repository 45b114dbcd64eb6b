"""A folder of edits that is written at once: to save edits, share them, check them and apply them to a model.

    edit.save("darrieux")                        # errata.save_edits(model, "corrections") saves all of a model's edits
    edit = errata.load_edit("darrieux", model)   # the model carries it now; edit.undo() undoes it
    edits = Edits.read("corrections")            # without any model
    edits.without(["rome-3f0a"]).rewrite("corrections")

The folder has the format of a journal (journal.py), and a README.md card. `Edits.read` reads journals, too. A folder is
written completely or not at all, and damage to any byte except those of the card is noticed. Loading sums the same
factors in the same order, so that the loaded weights have the bits of the saved ones.

The folder includes what methods remember of their edits (AlphaEdit's keys, GRACE's codebook). It does not include what
they compute from the model and texts (second moments, projectors, context templates), nor trained networks (MEND).
Those are needed only for new edits.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from errata.editors.core.errors import DamagedEditsError, ExportError, LedgerError
from errata.editors.core.files import atomic, jsonl, locks
from errata.editors.core.ledger.entry import Entry
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.model.digests import tokenizer_digest
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.storage import hub, provenance, readme_card, record_format
from errata.editors.core.storage.journal import Journal
from errata.editors.core.storage.merged_export import new_folder
from errata.editors.core.storage.record_format import BLOCKS, CARD, EDITS, FILE_BYTES


@dataclass(frozen=True)
class Edits:
    """The content of a folder of edits.

    Attributes:
        entries: The edits, in the order of the sum.
        model: Name and revision of the model that they were made on.
        base: Identity of the base of every weight that an edit changes, by name (provenance.py).
        tokenizer: Digest of the tokenizer that they were made with, if it is known.
        notes: Other information about the edits by id, such as scores.
    """

    entries: tuple[Entry, ...]
    model: Mapping[str, Any]
    base: Mapping[str, str]
    tokenizer: str | None = None
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return what is in the folder, without the factors of the edits."""
        return f"Edits of {self.model.get('name')}: {', '.join(entry.id for entry in self.entries) or 'none'}"

    @classmethod
    def of(
        cls,
        ledger: Ledger,
        entries: Sequence[Entry] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Edits:
        """Return all edits of a ledger, or the given entries, which its model need not carry now."""
        chosen = ledger.entries if entries is None else tuple(entries)
        made_with = None if tokenizer is None else tokenizer_digest(tokenizer)
        return cls(
            chosen,
            provenance.source(ledger.model),
            provenance.weight_identities(ledger, chosen, {}),
            made_with,
            notes or {},
        )

    @classmethod
    def read(cls, folder: str | Path, *, revision: str | None = None) -> Edits:
        """Read the edits of a folder or of a journal, with tensors in new memory.

        Args:
            folder: The folder; if it does not exist, ORG/NAME of the Hub.
            revision: Branch, tag or commit on the Hub.

        Raises:
            DamagedEditsError: A file is missing or has changed; it names file and record.
            HubError: There is no such folder, and the Hub does not have it.
        """
        path = _readable_folder(Path(folder))
        if hub.is_id(folder) and not path.exists():
            path = hub.fetch(str(folder), revision)
        journal = Journal(path)
        made = [(record.entry, record.notes) for record in journal.records() if record.entry is not None]
        notes = {entry.id: note for entry, note in made if note}
        edits = cls(tuple(entry for entry, _ in made), journal.model, journal.base, journal.tokenizer, notes)
        if twice := [id_ for id_, count in Counter(edits.ids).items() if count > 1]:
            raise DamagedEditsError(f"holds {twice[0]} more than once", path=Path(folder) / EDITS)
        return edits

    @staticmethod
    def are_in(folder: str | Path) -> bool:
        """Return whether a folder holds edits, damaged or not."""
        return (_readable_folder(Path(folder)) / record_format.MANIFEST).is_file()

    # --- looking ----------------------------------------------------------------------------------------------------

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(entry.id for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def precision(self) -> str | None:
        """Precision of the edited weights, from the identity of the first; None if it does not state one."""
        identity = next(iter(self.base.values()), "").split()
        return identity[0] if len(identity) > 1 else None

    def find(self, name: str) -> Entry:
        """Return the edit with this id, or the edit of a request with this id.

        Raises:
            LedgerError: There is none, or there are several.
        """
        named = [entry for entry in self.entries if entry.id == name or name in {r.id for r in entry.info.requests}]
        if len(named) != 1:
            raise LedgerError(f"{len(named) or 'none'} of the {len(self)} edits have the id {name!r}")
        return named[0]

    # --- choosing ---------------------------------------------------------------------------------------------------

    def only(self, ids: Collection[str]) -> Edits:
        """Return the edits with these ids, in their order."""
        kept = tuple(entry for entry in self.entries if entry.id in ids)
        touched = {name for entry in kept for name in entry.patch.updates}
        modules = tuple(f"{module}." for entry in kept for module in entry.patch.adapters)
        base = {name: value for name, value in self.base.items() if name in touched or name.startswith(modules)}
        return replace(self, entries=kept, base=base, notes={id_: self.notes[id_] for id_ in ids if id_ in self.notes})

    def without(self, ids: Iterable[str]) -> Edits:
        """Return all edits but these, bit for bit as if these had never been made."""
        return self.only(set(self.ids) - set(ids))

    # --- onto a model -----------------------------------------------------------------------------------------------

    def check(self, model: nn.Module, tokenizer: Tokenizer | None = None) -> None:
        """Refuse a model other than the one that they were made on. Edits that it carries now do not matter.

        Raises:
            OtherBaseError: It lists the differences: id, revision, weights, tokenizer.
        """
        provenance.check(self.model, self.base, Ledger.of(model), tokenizer=tokenizer, made_with=self.tokenizer)

    def apply_to(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        force: bool = False,
        max_norm_ratio: float | None = None,
    ) -> Ledger:
        """Apply all edits to the model, after those that it carries: all of them or, on any error, none.

        Args:
            model: The model, in the precision that the edits were made in.
            tokenizer: Checked like the model, if given.
            force: Accept another model if the shapes fit.
            max_norm_ratio: Refuse an update whose norm exceeds this many times its weight's; None: each edit has the
                limit that it was made with.

        Returns:
            The model's ledger.

        Raises:
            OtherBaseError: As `check`.
            LedgerError: The model carries one of them already.
            NumericalError: NaN or inf would result, or an update's norm is too large.
        """
        if not force:
            self.check(model, tokenizer)
        ledger = Ledger.of(model)
        ledger.extend(self.entries, max_norm_ratio=max_norm_ratio)
        return ledger

    # --- onto the disk ----------------------------------------------------------------------------------------------

    def write(self, folder: str | Path, *, load_from: str = "FOLDER") -> Path:
        """Write the edits into a new or empty folder, completely or not at all.

        Args:
            folder: The folder.
            load_from: Folder or id of the Hub that the card names in its example.

        Returns:
            The folder.

        Raises:
            ExportError: The folder exists already.
            OSError: It cannot be written.
        """
        with new_folder(folder) as path:
            written = self._write_records(path)
            whole = {"records": len(self), "sha256": atomic.digest_of_file(written)}
            manifest = {"model": dict(self.model), "base": dict(self.base), "tokenizer": self.tokenizer, "edits": whole}
            record_format.write_manifest(path, manifest)
            reports = [(entry.info.method, entry.info.requests, self.notes.get(entry.id)) for entry in self.entries]
            card = readme_card.folder_card(self.model, self.base, reports, load_from)
            (path / CARD).write_text(card, encoding="utf-8")
        return Path(folder)

    def rewrite(self, folder: str | Path) -> Path:
        """Write the edits in place of those that the folder holds, if any.

        A kill at any moment leaves the old edits or the new ones. Only one process at a time may do this (`hold`).

        Returns:
            The folder.

        Raises:
            ExportError: The folder holds other files.
            OSError: It cannot be written; the old edits are as they were.
        """
        check_replaceable(folder)
        target = Path(folder).resolve()
        new, old = target.with_name(f".{target.name}.new"), _old_path(target)
        _remove_leftovers(new)
        if target.exists():
            _remove_leftovers(old)
        self.write(new)
        if target.exists():
            target.replace(old)  # between these two renames, `_readable_folder` finds the old edits
        new.replace(target)
        atomic.sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
        return Path(folder)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
        """Upload these edits to a repository of the Hub, in place of the edits there.

        Arguments and errors are those of `hub.push`.

        Returns:
            The URL of the commit.
        """
        with TemporaryDirectory() as folder:
            written = self._without_local_paths().write(Path(folder) / "edits", load_from=repo_id)
            return hub.push(written, repo_id, private=private, revision=revision)

    def _without_local_paths(self) -> Edits:
        """Return the same edits without this machine's folders, in the model's name and in configurations."""
        model = {**self.model, "name": provenance.without_folders(self.model.get("name"))}
        entries = []
        for entry in self.entries:
            config = {key: provenance.without_folders(value) for key, value in entry.info.config.items()}
            entries.append(replace(entry, info=replace(entry.info, config=config)))
        return replace(self, model=model, entries=tuple(entries))

    def _write_records(self, folder: Path) -> Path:
        """Write all blocks and lines, and return the file of lines."""
        files, start = 0, 0
        records = folder / EDITS
        with records.open("wb") as out:
            for order, entry in enumerate(self.entries):
                path = folder / BLOCKS.format(files)
                block = record_format.block_of(order, entry)
                with path.open("ab") as file:
                    file.write(block)
                line = record_format.line_of(order, entry, self.notes.get(entry.id, {}), path, start, block)
                out.write(jsonl.render(line))
                files, start = (files, start + len(block)) if start + len(block) < FILE_BYTES else (files + 1, 0)
        return records


@contextmanager
def hold(folder: str | Path, patience: float = 1.0) -> Iterator[None]:
    """Lock a folder of edits, which need not exist yet, so that no other process rewrites it in the meantime.

    Args:
        folder: The folder. The file of the lock, .NAME.lock, stays beside it.
        patience: Seconds to wait for another process.

    Raises:
        LedgerError: Another process holds the lock.
        OSError: The lock cannot be made.
    """
    target = Path(folder).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locks.hold(target.with_name(f".{target.name}.lock"), patience):
            yield
    except locks.LockHeldError as error:
        holder = locks.described(error.owner)
        raise LedgerError(f"{holder} is changing {folder}; wait for it, and start this again") from None


def check_replaceable(folder: str | Path) -> None:
    """Refuse a folder with files other than edits, and a journal, to which a run may still append.

    Raises:
        ExportError: It names the file or says that this is a journal.
        DamagedEditsError, LedgerError: The manifest cannot be read.
    """
    path = Path(folder)
    if path.is_file():
        raise ExportError(f"expected a folder, but {path} is a file; name a folder")
    for each in sorted(path.iterdir()) if path.is_dir() else ():
        if not record_format.is_ours(each.name):
            raise ExportError(f"{path} holds {each.name}, which would be lost; name another folder")
    if Edits.are_in(path) and not Journal(_readable_folder(path)).is_whole:
        raise ExportError(f"{path} is the journal of a run, which continues from it; name another folder")


def _old_path(target: Path) -> Path:
    """Return the name that the old edits have for a moment during a `rewrite`."""
    return target.with_name(f".{target.name}.old")


def _remove_leftovers(folder: Path) -> None:
    """Remove a folder, and the temporary folders from processes that were killed while writing it."""
    if folder.parent.is_dir():
        for each in folder.parent.iterdir():
            if each == folder or (each.name.startswith(f".{folder.name}.") and each.suffix == ".tmp"):
                shutil.rmtree(each, ignore_errors=True)


def _readable_folder(folder: Path) -> Path:
    """Return the folder or, if a `rewrite` was killed between its two renames, the folder of the old edits."""
    target = folder.resolve()
    return _old_path(target) if not target.exists() and _old_path(target).is_dir() else folder
