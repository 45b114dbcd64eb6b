"""Edits in a folder, as a whole: saved, sent, checked, put on a model, taken apart.

    edit.save("darrieux")                        # errata.save_edits(model, "corrections") saves all that it carries
    edit = errata.load_edit("darrieux", model)   # the model carries it now; edit.undo() takes it off
    edits = Edits.read("corrections")            # without any model
    edits.without(["rome-3f0a"]).rewrite("corrections")

The folder has the format of a journal (journal.py), which can be read as well, and a README.md, the card of the edits.
It is written whole or not at all. Damage to any byte but those of the card is noticed. A sum of weights is repeated
from the very factors, in the same order: what is loaded has the bits of what was saved.

What methods remember of their own edits (AlphaEdit's keys, GRACE's codebook) lies in the edits and travels. What they
compute from the model and texts alone (second moments, projectors, context templates) and what they were trained to
(MEND) does not, and is needed for new edits only.
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
from errata.editors.core.files import atomic, jsonl
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
    """What a folder of edits holds.

    Attributes:
        entries: The edits, in the order of the sum.
        model: What is said of the model that they were made on: name, revision.
        base: By name, what is said of the untouched bytes of every weight that an edit touches (provenance.py).
        tokenizer: Digest of the tokenizer that they were made with, where it is known.
        notes: By an edit's id, what else was noted of it: scores, where they are known.
    """

    entries: tuple[Entry, ...]
    model: Mapping[str, Any]
    base: Mapping[str, str]
    tokenizer: str | None = None
    notes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ledger: Ledger,
        entries: Sequence[Entry] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        notes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Edits:
        """Of a ledger all edits, or some, which its model need not carry."""
        chosen = ledger.entries if entries is None else tuple(entries)
        tokenized = None if tokenizer is None else tokenizer_digest(tokenizer)
        return cls(
            chosen, provenance.source(ledger.model), provenance.marks(ledger, chosen, {}), tokenized, notes or {}
        )

    @classmethod
    def read(cls, folder: str | Path, *, revision: str | None = None) -> Edits:
        """The edits of a folder, or of a journal; tensors in fresh memory.

        Args:
            folder: The folder; where there is none, ORG/NAME of the Hub.
            revision: Branch, tag or commit on the Hub.

        Raises:
            DamagedEditsError: a file is missing or not what was written; names file and record.
            HubError: there is no folder, and the Hub does not have it.
        """
        path = _there(Path(folder))
        if hub.is_id(folder) and not path.exists():
            path = hub.fetched(str(folder), revision)
        journal = Journal(path)
        found = [(record.entry, record.notes) for record in journal.records() if record.entry is not None]
        notes = {entry.id: note for entry, note in found if note}
        edits = cls(tuple(entry for entry, _ in found), journal.model, journal.base, journal.tokenizer, notes)
        if twice := [id_ for id_, count in Counter(edits.ids).items() if count > 1]:
            raise DamagedEditsError(f"holds {twice[0]} more than once", path=Path(folder) / EDITS)
        return edits

    @staticmethod
    def are_in(folder: str | Path) -> bool:
        """Whether a folder holds edits, damaged or not."""
        return (_there(Path(folder)) / record_format.MANIFEST).is_file()

    # --- looking ----------------------------------------------------------------------------------------------------

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(entry.id for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def precision(self) -> str | None:
        """Of the weights that they touch, by what is said of the first; None where nothing is."""
        said = next(iter(self.base.values()), "").split()
        return said[0] if len(said) > 1 else None

    def find(self, name: str) -> Entry:
        """The edit of this id, or of a request with this id.

        Raises:
            LedgerError: there is none, or there are several.
        """
        named = [entry for entry in self.entries if entry.id == name or name in {r.id for r in entry.info.requests}]
        if len(named) != 1:
            raise LedgerError(f"{len(named) or 'none'} of the {len(self)} edits have the id {name!r}")
        return named[0]

    # --- choosing ---------------------------------------------------------------------------------------------------

    def only(self, ids: Collection[str]) -> Edits:
        """Some of the edits, in their order."""
        kept = tuple(entry for entry in self.entries if entry.id in ids)
        touched = {name for entry in kept for name in entry.patch.updates}
        modules = tuple(f"{module}." for entry in kept for module in entry.patch.adapters)
        marks = {name: mark for name, mark in self.base.items() if name in touched or name.startswith(modules)}
        return replace(self, entries=kept, base=marks, notes={id_: self.notes[id_] for id_ in ids if id_ in self.notes})

    def without(self, ids: Iterable[str]) -> Edits:
        """All but these, bit for bit as if those had never been made."""
        return self.only(set(self.ids) - set(ids))

    # --- onto a model -----------------------------------------------------------------------------------------------

    def check(self, model: nn.Module, tokenizer: Tokenizer | None = None) -> None:
        """Refuse a model that is not the one that they were made on; edits that it carries do not count.

        Raises:
            OtherBaseError: says in what it differs: id, revision, weights, tokenizer.
        """
        provenance.check(self.model, self.base, Ledger.of(model), tokenizer=tokenizer, tokenized=self.tokenizer)

    def apply_to(self, model: nn.Module, tokenizer: Tokenizer | None = None, *, force: bool = False) -> Ledger:
        """Put all of them on the model, on top of those that it carries: all or, on any error, none.

        Args:
            model: In the precision that they were made in.
            tokenizer: Looked at, if given, as the model is.
            force: Also on another model, as long as the shapes fit.

        Raises:
            OtherBaseError: as `check`.
            LedgerError: it carries one of them already.
            NumericalError: NaN or inf would result.
        """
        if not force:
            self.check(model, tokenizer)
        ledger = Ledger.of(model)
        ledger.extend(self.entries)
        return ledger

    # --- onto the disk ----------------------------------------------------------------------------------------------

    def write(self, folder: str | Path, *, place: str = "FOLDER") -> Path:
        """Write them into a new folder, or an empty one: whole or not at all.

        Args:
            folder: Where to.
            place: Where the card says that they can be loaded from.

        Raises:
            ExportError: the folder is there already.
            OSError: it cannot be written.
        """
        with new_folder(folder) as path:
            written = self._write_records(path)
            whole = {"records": len(self), "sha256": atomic.digest_of_file(written)}
            said = {"model": dict(self.model), "base": dict(self.base), "tokenizer": self.tokenizer, "edits": whole}
            record_format.write_manifest(path, said)
            reports = [(entry.info.method, entry.info.requests, self.notes.get(entry.id)) for entry in self.entries]
            (path / CARD).write_text(readme_card.text(self.model, self.base, reports, place), encoding="utf-8")
        return Path(folder)

    def rewrite(self, folder: str | Path) -> Path:
        """Write them in place of the edits that the folder holds, if any. Killed at any moment, it leaves the old edits
        or the new ones; by one process at a time (`hold`).

        Raises:
            ExportError: the folder holds something else.
            OSError: it cannot be written; the old edits are as they were.
        """
        check_replaceable(folder)
        target = Path(folder).resolve()
        new, old = target.with_name(f".{target.name}.new"), _aside(target)
        _sweep(new)
        if target.exists():
            _sweep(old)
        self.write(new)
        if target.exists():
            target.replace(old)
        new.replace(target)
        atomic.sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
        return Path(folder)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
        """Make a repository of the Hub hold these edits, in place of those that it holds. Arguments and errors as of
        `hub.push`; where the commit is shown is returned."""
        with TemporaryDirectory() as folder:
            written = self._without_places().write(Path(folder) / "edits", place=repo_id)
            return hub.push(written, repo_id, private=private, revision=revision)

    def _without_places(self) -> Edits:
        """The same edits, without where the model and the files of their configurations lie on this machine."""
        model = {**self.model, "name": provenance.without_place(self.model.get("name"))}
        entries = []
        for entry in self.entries:
            config = {what: provenance.without_place(said) for what, said in entry.info.config.items()}
            entries.append(replace(entry, info=replace(entry.info, config=config)))
        return replace(self, model=model, entries=tuple(entries))

    def _write_records(self, folder: Path) -> Path:
        """Blocks and lines; the file of lines."""
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
    """Hold a folder of edits, which need not be there yet, against others that would rewrite it meanwhile.

    Args:
        folder: Which; a lock is left beside it, .NAME.lock.
        patience: Seconds to wait for another process.

    Raises:
        LedgerError: another process holds it.
        OSError: no lock can be made beside it.
    """
    from filelock import FileLock, Timeout

    target = Path(folder).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(target.with_name(f".{target.name}.lock")).acquire(timeout=patience)
    except Timeout:
        raise LedgerError(f"another process is changing {folder}; wait for it, and start this again") from None
    with lock:
        yield


def check_replaceable(folder: str | Path) -> None:
    """Refuse a folder in which there is more than edits, or a journal, to which somebody adds.

    Raises:
        ExportError: names what there is.
        DamagedEditsError, LedgerError: its manifest cannot be read.
    """
    path = Path(folder)
    if path.is_file():
        raise ExportError(f"{path} is a file; name a folder")
    for each in sorted(path.iterdir()) if path.is_dir() else ():
        if not record_format.is_ours(each.name):
            raise ExportError(f"{path} holds {each.name}, which would be lost; name another folder")
    if Edits.are_in(path) and not Journal(_there(path)).is_whole:
        raise ExportError(f"{path} is the journal of a run, which goes on from it; name another folder")


def _aside(target: Path) -> Path:
    """Where the edits are while new ones take their place."""
    return target.with_name(f".{target.name}.old")


def _sweep(folder: Path) -> None:
    """Remove a folder, and what those have left of it that were killed while they wrote it."""
    if folder.parent.is_dir():
        for each in folder.parent.iterdir():
            if each == folder or (each.name.startswith(f".{folder.name}.") and each.suffix == ".tmp"):
                shutil.rmtree(each, ignore_errors=True)


def _there(folder: Path) -> Path:
    """The folder; between the two renames of a `rewrite` that was killed, the old edits."""
    target = folder.resolve()
    return _aside(target) if not target.exists() and _aside(target).is_dir() else folder
