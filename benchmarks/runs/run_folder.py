"""Where a run keeps its files: a folder named by its configuration, written so that a kill at any moment loses nothing.

    with RunFolder.open("runs", settings) as folder:
        for record in folder.records("records.jsonl"): ...         # what an earlier, interrupted run left
        folder.append("records.jsonl", {"case": "12", ...})        # one line, on disk when the call returns
        folder.write_json("results.json", results)                 # whole or not at all
        folder.finish()                                            # the DONE file: the same command now does nothing

The folder's name is a readable slug and a digest of the whole configuration, so that two configurations never share a
folder, and no value of a configuration ever becomes a path.

Every line carries the start of that digest, so that a file of another run is noticed; a line without it counts as the
run's own, as older versions wrote it. While the folder is held, each file of lines must be as this process left it.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errata.benchmarks.runs.json_values import digest, encodable
from errata.editors.core.errors import ConfigError
from errata.editors.core.files import jsonl, locks
from errata.editors.core.files.atomic import (
    FileEnd,
    digest_of_file,
    make_folder,
    other_writer,
    set_aside,
    write_atomically,
)
from errata.editors.core.files.plain_files import read_bytes

logger = logging.getLogger(__name__)

DONE = "DONE"
RECORDS = "records.jsonl"
SECONDS = "seconds.jsonl"  # how long each edit and each scoring took, and the memory by then: what never repeats
RESULTS = "results.json"
CURVE = "curve.json"
DATA = (RESULTS, RECORDS, CURVE)  # of a bench: without one of these a finished run is no longer finished
LOCK = ".lock"
RUN_FIELD = "run"  # of every line: the start of the run's key
_SLUG_LENGTH = 60
_DIGEST_LENGTH = 12


def slug(text: str, limit: int = _SLUG_LENGTH) -> str:
    """A file name made of letters, digits, `_`, `.` and `-`: no separator, no leading dot, never empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    cleaned = re.sub(r"[^A-Za-z0-9_.]+", "-", plain)
    cleaned = re.sub(r"\.{2,}", ".", cleaned).strip("-.")[:limit].strip("-.")
    return cleaned or "unnamed"


def folder_of_runs(path: str | Path) -> Path:
    """The folder, once it is one.

    Raises:
        ConfigError: there is none.
    """
    if not Path(path).is_dir():
        raise ConfigError(f"expected a folder of runs, got {str(path)!r}, which is none")
    return Path(path)


@dataclass
class _Hold:
    """Whether this process holds a folder, and how it left the files of lines there."""

    is_active: bool = False
    ends: dict[str, FileEnd] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Attributes:
        path: The folder.
        key: Digest of the settings that decide the results.
        data: The files without which a finished run is no longer finished.
    """

    path: Path
    key: str
    data: tuple[str, ...] = DATA
    _hold: _Hold = field(default_factory=lambda: _Hold(), compare=False, repr=False)

    @classmethod
    def at(cls, out: str | Path, name: str, settings: Mapping[str, Any], *, data: tuple[str, ...] = DATA) -> RunFolder:
        """The folder `out`/slug-digest for these settings; nothing is created yet."""
        key = digest(settings)
        return cls(Path(out) / f"{slug(name)}-{key[:_DIGEST_LENGTH]}", key, data)

    @contextmanager
    def opened(self, patience: float = 1.0) -> Iterator[RunFolder]:
        """Create the folder and hold it against a second process with the same command.

        Args:
            patience: Seconds to wait for one that holds it; `errata status` does for a moment. Negative: no end.

        Raises:
            ConfigError: another process holds it, the folder cannot be made, or it is or holds a link.
        """
        self._refuse_links()
        make_folder(self.path)
        try:
            with locks.hold(self.path / LOCK, patience, named=True):
                for left in self.path.rglob(".*.tmp"):  # by a process that was killed while it wrote
                    left.unlink(missing_ok=True)
                self._hold.is_active = True
                try:
                    yield self
                finally:
                    self._hold.is_active = False
                    self._hold.ends.clear()
        except locks.LockHeldError as error:
            raise ConfigError(
                f"{locks.described(error.owner)} is at work in {self.path}; wait for it, or give another `out=`"
            ) from None

    def _refuse_links(self) -> None:
        """Refuse links in the folder: appending to a link would write to the file that it points to."""
        linked = next((path for path in (self.path, *self.path.rglob("*")) if path.is_symlink()), None)
        if linked is not None:
            raise ConfigError(f"{linked} is a link, and a run writes into its own folder alone; remove it")

    @property
    def done(self) -> bool:
        """Whether these settings have been carried out to the end, and the data of it are as they were written."""
        marker = self.path / DONE
        try:
            key, *stated = read_bytes(marker).decode("ascii").splitlines()
        except (OSError, ValueError):
            return False
        return key == self.key and not self._damaged(stated)

    def finish(self) -> None:
        """Mark the run as carried out, with the digests of its data."""
        self.write_text(DONE, "\n".join([self.key, *self._digests()]) + "\n")

    def clear_left_behind(self) -> None:
        """Remove what a process left of its lock that was killed between the end of the run and its own."""
        locks.clear_left_behind(self.path / LOCK)

    def set_aside_damaged(self) -> None:
        """Rename files of a finished run that are not as they were written to *.damaged, with a warning, so that they
        are made again. Hold the lock."""
        marker = self.path / DONE
        if not marker.exists() or self.done:
            return
        for name in self._damaged(marker.read_bytes().decode("ascii", "replace").splitlines()[1:]):
            # Of records what stands before the damage is kept, see `records`.
            if (self.path / name).exists() and name != RECORDS:
                aside = set_aside(self.path / name)
                logger.warning("%s is not as it was written; it is set aside as %s", self.path / name, aside.name)
        marker.unlink()

    def _digests(self) -> list[str]:
        """A line for each file of data, as `sha256sum` writes it."""
        return [f"{_digest_if_readable(self.path / name)}  {name}" for name in self.data]

    def _damaged(self, stated: Sequence[str]) -> list[str]:
        """Return the files of data whose digest differs from the stated one."""
        return [line.split()[-1] for line in self._digests() if line not in stated]

    def write_json(self, name: str, value: Any) -> Path:
        return self.write_text(name, json.dumps(encodable(value), indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> Path:
        path = self.file(name)
        write_atomically(path, content)
        return path

    def file(self, name: str) -> Path:
        """A file of this folder. Names are ours, never a dataset's: a separator in one is our mistake."""
        if not name or Path(name).name != name or name.startswith("."):
            raise ValueError(f"expected a plain file name, got {name!r}")
        return self.path / name

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add one line to a file of records. It is on the disk when the call returns.

        Raises:
            OtherWriterError: another process has written to the file since this one read it or wrote to it.
        """
        line = {**encodable(record), RUN_FIELD: self._mark}
        end = jsonl.append(self.file(name), line, self._hold.ends.get(name) if self._hold.is_active else None)
        self._hold.ends[name] = end

    def records(
        self, name: str, fault: Callable[[Mapping[str, Any]], str | None] | None = None
    ) -> list[dict[str, Any]]:
        """The records written so far, up to the first damaged one or the first of another run. A torn last line, as a
        kill leaves it, is cut off the file; a damaged file is set aside with a warning, and what stood before the
        damage goes into a new one.

        Args:
            name: Of the file.
            fault: Says what is wrong with a record that this run cannot have written; called in order.

        Raises:
            OtherWriterError: another process has written to the file since this one read it or wrote to it.
        """
        path = self.file(name)
        self._check_unchanged(name)

        def of_another(record: Mapping[str, Any]) -> str | None:
            if record.get(RUN_FIELD, self._mark) != self._mark:
                return f"is of another run ({record[RUN_FIELD]})"
            return None if fault is None else fault(record)

        found = jsonl.recover(path, of_another)
        self._hold.ends[name] = FileEnd.of(path)
        return [{key: value for key, value in record.items() if key != RUN_FIELD} for record in found]

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self.file(name).unlink(missing_ok=True)
        self._hold.ends.pop(name, None)

    def keep(self, name: str, make: Callable[[], Any], fault: Callable[[Any], str | None] = lambda _: None) -> Any:
        """A JSON value that is made once: from its file, or made now and written. A damaged file, or one of another
        run, is set aside with a warning, and its value made again.

        Args:
            name: Of the file.
            make: Makes the value.
            fault: Says what is wrong with a value that this run cannot have written.
        """

        def wrong(record: Mapping[str, Any]) -> str | None:
            return fault(record["value"]) if "value" in record else "has no value"

        found = self.records(name, wrong)
        if not found:
            value = encodable(make())
            write_atomically(self.file(name), jsonl.render({"value": value, RUN_FIELD: self._mark}))
            self._hold.ends.pop(name, None)
            found = self.records(name)
        return found[0]["value"]

    def _check_unchanged(self, name: str) -> None:
        """Refuse a file of lines that another process has written to while this one holds the folder."""
        left = self._hold.ends.get(name) if self._hold.is_active else None
        if left is not None and FileEnd.of(self.file(name)) != left:
            raise other_writer(self.file(name))

    @property
    def _mark(self) -> str:
        """The start of the key, as it is in the folder's name."""
        return self.key[:_DIGEST_LENGTH]


def _digest_if_readable(path: Path) -> str | None:
    try:
        return digest_of_file(path)
    except OSError:
        return None
