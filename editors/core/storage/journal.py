"""Edits on disk: a folder that only grows, from which a ledger is filled again bit for bit.

    journal = Journal.at(folder, {"name": "gpt2-xl", "revision": None})
    ledger.extend(record.entry for record in journal.records() if record.entry)    # what is there already
    journal.append(entry, {}, ledger)                                              # on the disk when the call returns

    manifest.json       format and version, the model, SHA-256 of the base of every weight that an edit touches
    edits.jsonl         a line an edit, in the order of the sum: its id, what was asked and how it was made, and where
                        its tensors are, with their SHA-256
    edits-00000.blocks  the tensors (record_format.py)

A block is written before its line, and the line makes it count: what a kill leaves behind the last line is cut off.
A line can also stand for an edit that was not made; it has no id and no tensors, only notes.

A folder that is written as a whole (edit_folder.py) is the same, and says in its manifest how many lines it has: it
grows no more, and misses none unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from errata.editors.core.errors import DamagedEditsError, LedgerError
from errata.editors.core.files import atomic, jsonl
from errata.editors.core.ledger.entry import Entry
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.storage import provenance, record_format
from errata.editors.core.storage.record_format import BLOCKS, EDITS, FILE_BYTES, MANIFEST, EditRecord


class Journal:
    """The edits in a folder. `Journal(folder)` reads them; `Journal.at(folder, model)` can be appended to, by one
    writer at a time.

    Raises:
        DamagedEditsError: no manifest, or a damaged one.
        LedgerError: a format that this version cannot read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manifest = record_format.read_manifest(folder)
        self._lines = jsonl.read(self._edits)
        self._next = len(self._lines.records)

    @classmethod
    def at(cls, folder: Path, model: Mapping[str, Any]) -> Journal:
        """The journal of a folder, which is made if it is missing, without what a kill has left of an edit.

        Args:
            folder: Where it is.
            model: What to say of the model: name, revision, fingerprint. Values that JSON holds.

        Raises:
            DamagedEditsError, LedgerError: as above, and where the folder holds edits of another model.
            OSError: it cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists() and not (folder / EDITS).exists():
            record_format.write_manifest(folder, {"model": dict(model), "base": {}})
        journal = cls(folder)
        if journal.model != dict(model):
            raise LedgerError(f"{folder} holds edits of {journal.model}, not of {dict(model)}; give another folder")
        if journal.is_whole:
            raise LedgerError(f"{folder} was written as a whole and grows no more; give another folder")
        journal._cut(journal._next, journal._lines.damage)
        return journal

    @property
    def model(self) -> dict[str, Any]:
        """What is said of the model."""
        return self._manifest["model"]

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return sum(path.stat().st_size for path in (self._edits, *self._files()) if path.exists())

    @property
    def base(self) -> dict[str, str]:
        """By name, what is said of the untouched bytes of every weight that an edit touches (provenance.py)."""
        return self._manifest["base"]

    @property
    def tokenizer(self) -> str | None:
        """Digest of the tokenizer that the edits were made with, where it is known."""
        return self._manifest.get("tokenizer")

    def records(self) -> Iterator[EditRecord]:
        """The edits so far, in their order; tensors in fresh memory.

        Raises:
            DamagedEditsError: a line or block is not what was written; those before it have been given out.
        """
        for order, line in enumerate(self._lines.records):
            yield record_format.record_of(self.folder, order, line)
        found = len(self._lines.records)
        if self._lines.damage is not None:
            raise DamagedEditsError(self._lines.damage, path=self._edits, record=found)
        if self._whole is not None and found != self._whole["records"]:
            what = f"is missing: {self._whole['records']} records were written, {found} are there"
            raise DamagedEditsError(what, path=self._edits, record=found)
        if self._whole is not None and atomic.digest_of_file(self._edits) != self._whole["sha256"]:
            raise DamagedEditsError("holds records of another time than its manifest", path=self._edits)

    def recovered(self) -> Iterator[EditRecord]:
        """As `records`, but from a damaged one on all are given up, with a warning."""
        found = 0
        try:
            for record in self.records():
                yield record
                found += 1
        except DamagedEditsError as error:
            self._cut(found, str(error))

    def append(self, entry: Entry | None, notes: Mapping[str, Any], ledger: Ledger) -> None:
        """Add an edit, or notes of one that was not made. On the disk when the call returns.

        Args:
            entry: As the ledger holds it.
            notes: Values that JSON holds.
            ledger: Which holds it, and the untouched bytes of its weights.

        Raises:
            OSError: it could not be written; the journal is as it was.
        """
        order = self._next
        line: dict[str, Any] = {"order": order, "id": None, "notes": dict(notes)}
        if entry is not None:
            self._cover(entry, ledger)
            path, block = self._open_file(), record_format.block_of(order, entry)
            line = record_format.line_of(order, entry, notes, path, atomic.append(path, block), block)
        jsonl.append(self._edits, line)
        self._next += 1

    def check(self, ledger: Ledger) -> None:
        """Refuse a model whose weights are not those that the edits were made on.

        Raises:
            OtherBaseError: says which.
        """
        provenance.check({}, self.base, ledger)

    @property
    def is_whole(self) -> bool:
        """Whether it was written as a whole, and grows no more."""
        return self._whole is not None

    @property
    def _whole(self) -> dict[str, Any] | None:
        """Of a folder that was written as a whole: how many records it has, and the digest of their file."""
        return self._manifest.get("edits")

    @property
    def _edits(self) -> Path:
        return self.folder / EDITS

    def _cover(self, entry: Entry, ledger: Ledger) -> None:
        """See that the manifest names the base of every weight that the entry touches, or acts beside."""
        known = self._manifest["base"]
        touched = provenance.marks(ledger, [entry], known)
        if touched.keys() - known.keys():
            self._manifest["base"] = {**known, **touched}
            record_format.write_manifest(self.folder, self._manifest)

    def _open_file(self) -> Path:
        """The file of blocks that grows."""
        files = self._files()
        if not files or files[-1].stat().st_size >= FILE_BYTES:
            return self.folder / BLOCKS.format(len(files))
        return files[-1]

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("edits-*.blocks"))

    def _cut(self, keep: int, damage: str | None) -> None:
        """Keep the first `keep` lines and their blocks, and nothing else."""
        if damage is not None:
            jsonl.cut(self._edits, self._lines, keep, damage)
        else:
            jsonl.recover(self._edits)
        kept = self._lines.records[:keep]
        sizes = {line["file"]: line["start"] + line["bytes"] for line in kept if line["id"] is not None}
        for path in self._files():
            if path.name in sizes:
                atomic.truncate(path, sizes[path.name])
            else:
                path.unlink()
        self._lines, self._next = jsonl.read(self._edits), keep
