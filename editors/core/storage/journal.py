"""The journal of a run: a folder to which each edit is appended, and from which a ledger is refilled bit for bit.

    journal = Journal.open(folder, {"name": "gpt2-xl", "revision": None})
    ledger.extend(record.entry for record in journal.records() if record.entry)    # edits of an earlier run
    journal.append(entry, {}, ledger)                                              # on the disk when the call returns

    manifest.json       format and version, the model, SHA-256 of the base of every weight that an edit touches
    edits.jsonl         one line per edit, in the order of the sum: its id, requests and settings, and where its tensors
                        are, with their SHA-256
    edits-00000.blocks  the tensors (record_format.py)

A block is written before its line, and only the line makes it valid. So after a kill, everything behind the block of
the last line is cut off. A line without id and tensors stands for an edit that was not made, and holds only notes.

A folder that is written at once (edit_folder.py) has the same format. Its manifest also says how many lines there are,
so that a missing line is noticed. Nothing can be appended to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from errata.editors.core.errors import DamagedEditsError, LedgerError, OtherBaseError
from errata.editors.core.files import atomic, jsonl
from errata.editors.core.ledger.entry import Entry
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.storage import provenance, record_format
from errata.editors.core.storage.record_format import BLOCKS, EDITS, FILE_BYTES, MANIFEST, EditRecord


class Journal:
    """The edits in a folder. `Journal(folder)` reads them; `Journal.open(folder, model)` can also append.

    Only one process at a time may append; a second one is noticed.

    Raises:
        DamagedEditsError: The manifest is missing or damaged.
        LedgerError: This version cannot read the format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manifest = record_format.read_manifest(folder)
        try:
            self._lines = jsonl.read(self._edits)
        except OSError as error:
            raise DamagedEditsError(f"cannot be read: {error.strerror}", path=self._edits) from error
        self._next = len(self._lines.records)
        self._end = atomic.FileEnd()  # how this process left the file of lines

    @classmethod
    def open(cls, folder: Path, model: Mapping[str, Any], run: str | None = None) -> Journal:
        """Open a journal to append to it. Make the folder if it is missing, and cut off what a kill has left behind.

        Args:
            folder: The folder.
            model: A description of the model: name, revision, fingerprint, as values that JSON can hold.
            run: The key of the run that the journal belongs to. A journal without a key belongs to any.

        Raises:
            DamagedEditsError: The manifest is missing or damaged, or the journal is that of another run.
            LedgerError: This version cannot read the format; the folder holds edits of another model; the folder was
                written at once.
            OSError: The folder cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists() and not (folder / EDITS).exists():
            key = {} if run is None else {"run": run}
            record_format.write_manifest(folder, {"model": dict(model), "base": {}, **key})
        journal = cls(folder)
        if run is not None and journal._manifest.get("run", run) != run:
            raise DamagedEditsError(f"belongs to another run ({journal._manifest['run']})", path=folder / MANIFEST)
        if journal.model != dict(model):
            raise OtherBaseError(f"{folder} holds edits of {journal.model}, not of {dict(model)}; give another folder")
        if journal.is_whole:
            raise LedgerError(f"{folder} was written as a whole, and nothing can be appended; give another folder")
        journal._cut(journal._next, journal._lines.damage)
        return journal

    @property
    def model(self) -> dict[str, Any]:
        """The description of the model that the edits were made on."""
        return self._manifest["model"]

    @property
    def nbytes(self) -> int:
        """Bytes of the edits on the disk."""
        return sum(path.stat().st_size for path in (self._edits, *self._files()) if path.exists())

    @property
    def base(self) -> dict[str, str]:
        """The identity of the base of every weight that an edit changes, by name (provenance.py)."""
        return self._manifest["base"]

    @property
    def tokenizer(self) -> str | None:
        """Digest of the tokenizer that the edits were made with, or None if it is not known."""
        return self._manifest.get("tokenizer")

    def records(self) -> Iterator[EditRecord]:
        """Yield the edits in their order, with tensors in new memory.

        Raises:
            DamagedEditsError: A line or block is not as it was written; the edits before it have been yielded.
        """
        ends: dict[str, int] = {}
        for order, line in enumerate(self._lines.records):
            if (place := _block_place(line)) is not None:
                name, start, end = place
                if start < ends.get(name, 0):
                    reason = f"its block in {name} overlaps an earlier one"
                    raise DamagedEditsError(reason, path=self._edits, record=order)
                ends[name] = end
            yield record_format.record_of(self.folder, order, line)
        count = len(self._lines.records)
        if self._lines.damage is not None:
            raise DamagedEditsError(self._lines.damage, path=self._edits, record=count)
        if self._whole is not None and count != self._whole["records"]:
            reason = f"is missing: {self._whole['records']} records were written, {count} are there"
            raise DamagedEditsError(reason, path=self._edits, record=count)
        if self._whole is not None and atomic.digest_of_file(self._edits) != self._whole["sha256"]:
            raise DamagedEditsError("holds other records than its manifest states", path=self._edits)

    def recover(self, fault: Callable[[EditRecord], str | None] | None = None) -> Iterator[EditRecord]:
        """Yield the edits before the first damaged one, and remove the others from the journal with a warning.

        Args:
            fault: Says what is wrong with a record that does not belong here, which then counts as damaged.
        """
        count = 0
        try:
            for record in self.records():
                if fault is not None and (reason := fault(record)) is not None:
                    raise DamagedEditsError(reason, path=self._edits, record=count)
                yield record
                count += 1
        except DamagedEditsError as error:
            self._cut(count, str(error))

    def append(self, entry: Entry | None, notes: Mapping[str, Any], ledger: Ledger) -> None:
        """Append an edit, or notes about one that was not made. It is on the disk when the call returns.

        Args:
            entry: An entry of `ledger`; None for an edit that was not made.
            notes: Values that JSON can hold.
            ledger: The ledger, which knows the base of the edited weights.

        Raises:
            OtherWriterError: Another process has written to the journal.
            OSError: It could not be written; the journal is as it was.
        """
        order = self._next
        line: dict[str, Any] = {"order": order, "id": None, "notes": dict(notes)}
        if entry is not None:
            self._record_base(entry, ledger)
            path, block = self._open_file(), record_format.block_of(order, entry)
            # The block comes first. A kill before the line then leaves only bytes that no line refers to.
            end = atomic.append(path, block, atomic.FileEnd.of(path))
            line = record_format.line_of(order, entry, notes, path, end.size - len(block), block)
        self._end = jsonl.append(self._edits, line, self._end)
        self._next += 1

    def check(self, ledger: Ledger) -> None:
        """Refuse a model whose base weights are not those that the edits were made on.

        Raises:
            OtherBaseError: It names the weights.
        """
        provenance.check({}, self.base, ledger)

    @property
    def is_whole(self) -> bool:
        """Whether the folder was written at once, so that nothing can be appended."""
        return self._whole is not None

    @property
    def _whole(self) -> dict[str, Any] | None:
        """The number of records and the digest of their file, for a folder that was written at once; else None."""
        return self._manifest.get("edits")

    @property
    def _edits(self) -> Path:
        return self.folder / EDITS

    def _record_base(self, entry: Entry, ledger: Ledger) -> None:
        """Add the bases of the entry's weights to the manifest. This comes first: no edit may be without its base."""
        known = self._manifest["base"]
        touched = provenance.weight_identities(ledger, [entry], known)
        if touched.keys() - known.keys():
            self._manifest["base"] = {**known, **touched}
            record_format.write_manifest(self.folder, self._manifest)

    def _open_file(self) -> Path:
        """Return the file of blocks to append to: the last one, or a new one if that has reached its size."""
        files = self._files()
        if not files or files[-1].stat().st_size >= FILE_BYTES:
            return self.folder / BLOCKS.format(len(files))
        return files[-1]

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("edits-*.blocks"))

    def _cut(self, keep: int, damage: str | None) -> None:
        """Keep the first `keep` lines and their blocks only. `damage` describes the next line, if it is damaged."""
        if damage is not None:
            jsonl.cut(self._edits, self._lines, keep, damage)
        else:
            jsonl.recover(self._edits)
        kept = self._lines.records[:keep]
        # The last kept line of each file says where its blocks end.
        places = [place for line in kept if (place := _block_place(line)) is not None]
        sizes = {name: end for name, _, end in places}
        for path in self._files():
            if path.name in sizes:
                atomic.truncate(path, sizes[path.name])
            else:
                path.unlink()
        self._lines, self._next = jsonl.read(self._edits), keep
        self._end = atomic.FileEnd.of(self._edits)


def _block_place(line: Mapping[str, Any]) -> tuple[str, int, int] | None:
    """Return the file, start and end of a line's block; None if it has none, or does not say so."""
    try:
        return None if line["id"] is None else record_format.block_place(line)
    except (KeyError, TypeError, ValueError):
        return None
