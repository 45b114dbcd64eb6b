"""Edits on disk: a folder that only grows, from which a ledger is filled again bit for bit.

    journal = Journal.at(folder, {"name": "gpt2-xl", "revision": None})
    ledger.extend(record.entry for record in journal.records() if record.entry)    # what is there already
    journal.append(entry, {}, ledger)                                              # on the disk when the call returns

    manifest.json       format and version, the model, SHA-256 of the base of every weight that an edit touches
    edits.jsonl         a line an edit, in the order of the sum: its id, what was asked and how it was made, and where
                        its tensors are, with their SHA-256
    edits-00000.blocks  the tensors: blocks one after another, each a safetensors file in itself. Named in it are
                        ORDER/update/PARAMETER/U (d_out, r), .../V (r, d_in) or .../delta (d_out, d_in),
                        ORDER/adapter/MODULE/NAME and ORDER/state/NAME

A block is written before its line, and the line makes it count: what a kill leaves behind the last line is cut off.
Blocks, and not a file an edit: thousands of small files are what the file systems of clusters are worst at. Every byte
is covered by a digest, since safetensors does not notice changed ones. Nothing here runs code.

A line can also stand for an edit that was not made; it has no id and no tensors, only notes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from errata.editors.core import durable, fold, lines
from errata.editors.core.adapter import Adapter, adapter_kind
from errata.editors.core.entry import Entry
from errata.editors.core.errors import LedgerError
from errata.editors.core.export import tensor_digest
from errata.editors.core.ledger import Ledger
from errata.editors.core.patch import Dense, LowRank, Patch, Update

FORMAT, VERSION = "errata edits", 1
MANIFEST, EDITS = "manifest.json", "edits.jsonl"
# A file of blocks is closed once it has grown to this many bytes.
FILE_BYTES = 1 << 30


class DamagedJournalError(LedgerError):
    """A journal is there, but it is not what was written."""


@dataclass(frozen=True)
class Record:
    """One line: an edit, or what is noted of one that was not made; and whatever else its writer noted."""

    order: int
    entry: Entry | None
    notes: Mapping[str, Any]


class Journal:
    """The edits in a folder. `Journal(folder)` reads them; `Journal.at(folder, model)` can be appended to, by one
    writer at a time.

    Raises:
        DamagedJournalError: no manifest, or a damaged one.
        LedgerError: a format that this version cannot read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._manifest = _read_manifest(folder / MANIFEST)
        self._lines = lines.read(self._edits)
        self._next = len(self._lines.records)

    @classmethod
    def at(cls, folder: Path, model: Mapping[str, Any]) -> Journal:
        """The journal of a folder, which is made if it is missing, without what a kill has left of an edit.

        Args:
            folder: Where it is.
            model: What to say of the model: name, revision, fingerprint. Values that JSON holds.

        Raises:
            DamagedJournalError, LedgerError: as above, and where the folder holds edits of another model.
            OSError: it cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists() and not (folder / EDITS).exists():
            _write_manifest(folder, {"format": FORMAT, "version": VERSION, "model": dict(model), "base": {}})
        journal = cls(folder)
        if journal.model != dict(model):
            raise LedgerError(f"{folder} holds edits of {journal.model}, not of {dict(model)}; give another folder")
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

    def records(self) -> Iterator[Record]:
        """The edits so far, in their order; tensors in fresh memory.

        Raises:
            DamagedJournalError: a line or block is not what was written; those before it have been given out.
        """
        for order, line in enumerate(self._lines.records):
            yield self._record(order, line)
        if self._lines.damage is not None:
            raise DamagedJournalError(f"{self._edits}: {self._lines.damage}")

    def recovered(self) -> Iterator[Record]:
        """As `records`, but from a damaged one on all are given up, with a warning."""
        found = 0
        try:
            for record in self.records():
                yield record
                found += 1
        except DamagedJournalError as error:
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
            block = self._append_block(_tensors(order, entry))
            line |= {"id": entry.id, "meta": dict(entry.meta), **_parts(entry), **block}
        lines.append(self._edits, line)
        self._next += 1

    def check(self, ledger: Ledger) -> None:
        """Refuse a model whose weights are not those that the edits were made on.

        Raises:
            LedgerError: names the weight.
        """
        for name, digest in self._manifest["base"].items():
            if tensor_digest(ledger.base(name)) != digest:
                raise LedgerError(f"{self.folder} holds edits of a model with another {name}; load that model")

    @property
    def _edits(self) -> Path:
        return self.folder / EDITS

    def _cover(self, entry: Entry, ledger: Ledger) -> None:
        """See that the manifest names the base of every weight that the entry touches, or acts beside."""
        known, names = self._manifest["base"], list(entry.patch.updates)
        for module in entry.patch.adapters:
            names += [f"{module}.{name}" for name, _ in ledger.model.get_submodule(module).named_parameters()]
        new = {name: tensor_digest(ledger.base(name)) for name in names if name not in known}
        if new:
            self._manifest["base"] = {**known, **new}
            _write_manifest(self.folder, self._manifest)

    def _append_block(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        from safetensors.torch import save

        content = save(dict(tensors))
        path = self._open_file()
        start = durable.append(path, content)
        sha256 = hashlib.sha256(content).hexdigest()
        return {"file": path.name, "start": start, "bytes": len(content), "sha256": sha256}

    def _open_file(self) -> Path:
        """The file of blocks that grows."""
        files = self._files()
        if not files or files[-1].stat().st_size >= FILE_BYTES:
            return self.folder / f"edits-{len(files):05}.blocks"
        return files[-1]

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("edits-*.blocks"))

    def _record(self, order: int, line: Mapping[str, Any]) -> Record:
        try:
            entry = None if line["id"] is None else self._entry(order, line)
            return Record(order, entry, line["notes"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedJournalError(f"{self._edits}: line {order + 1} is no edit: {error!r}") from error

    def _entry(self, order: int, line: Mapping[str, Any]) -> Entry:
        tensors = self._block(line)
        updates = {name: _update(tensors, f"{order}/update/{name}", kind) for name, kind in line["updates"].items()}
        adapters = {name: _adapter(tensors, order, name, said) for name, said in line["adapters"].items()}
        state = {name: tensors[f"{order}/state/{name}"] for name in line["state"]}
        return Entry(line["id"], Patch(updates, adapters), line["meta"], order, state)

    def _block(self, line: Mapping[str, Any]) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.folder / Path(line["file"]).name
        try:
            with path.open("rb") as file:
                file.seek(line["start"])
                content = file.read(line["bytes"])
        except OSError as error:
            raise DamagedJournalError(f"{path} cannot be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != line["sha256"]:
            raise DamagedJournalError(f"{path}: the block at {line['start']} does not have the SHA-256 that is stated")
        try:
            return {name: fold.fresh(tensor) for name, tensor in load(content).items()}
        except SafetensorError as error:
            raise DamagedJournalError(f"{path}: the block at {line['start']} is no safetensors: {error}") from error

    def _cut(self, keep: int, damage: str | None) -> None:
        """Keep the first `keep` lines and their blocks, and nothing else."""
        if damage is not None:
            lines.cut(self._edits, self._lines, keep, damage)
        else:
            lines.recovered(self._edits)
        kept = self._lines.records[:keep]
        sizes = {line["file"]: line["start"] + line["bytes"] for line in kept if line["id"] is not None}
        for path in self._files():
            if path.name in sizes:
                durable.truncate(path, sizes[path.name])
            else:
                path.unlink()
        self._lines, self._next = lines.read(self._edits), keep


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = lines.parsed(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedJournalError(f"{path} cannot be read: {error}") from error
    found = manifest.get("format"), manifest.get("version")
    if found != (FORMAT, VERSION):
        raise LedgerError(f"{path} is in the format {found}; this version of errata reads {(FORMAT, VERSION)}")
    return manifest


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    durable.write_atomically(folder / MANIFEST, lines.rendered(manifest))


def _tensors(order: int, entry: Entry) -> dict[str, Tensor]:
    """What is written of an entry, by name."""
    found = {f"{order}/state/{name}": tensor for name, tensor in entry.state.items()}
    for name, update in entry.patch.updates.items():
        parts = {"U": update.U, "V": update.V} if isinstance(update, LowRank) else {"delta": update.delta}
        found |= {f"{order}/update/{name}/{part}": tensor for part, tensor in parts.items()}
    for name, adapter in entry.patch.adapters.items():
        found |= {f"{order}/adapter/{name}/{part}": tensor for part, tensor in adapter.tensors.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def _parts(entry: Entry) -> dict[str, Any]:
    """What a line says of an entry's tensors."""
    patch = entry.patch
    return {
        "updates": {
            name: "low_rank" if isinstance(update, LowRank) else "dense" for name, update in patch.updates.items()
        },
        "adapters": {
            name: {"kind": adapter.kind, "numbers": dict(adapter.numbers), "tensors": list(adapter.tensors)}
            for name, adapter in patch.adapters.items()
        },
        "state": list(entry.state),
    }


def _adapter(tensors: Mapping[str, Tensor], order: int, name: str, said: Mapping[str, Any]) -> Adapter:
    parts = {part: tensors[f"{order}/adapter/{name}/{part}"] for part in said["tensors"]}
    return adapter_kind(said["kind"]).from_parts(parts, said["numbers"])


def _update(tensors: Mapping[str, Tensor], name: str, kind: str) -> Update:
    if kind == "low_rank":
        return LowRank(tensors[f"{name}/U"], tensors[f"{name}/V"])
    return Dense(tensors[f"{name}/delta"])
