"""Where a run keeps its files: a folder named by its configuration, written so that a kill at any moment loses nothing.

    with RunFolder.open("runs", settings) as folder:
        for record in folder.records("records.jsonl"): ...         # what an earlier, interrupted run left
        folder.append("records.jsonl", {"case": "12", ...})        # one line, on disk when the call returns
        folder.write_json("results.json", results)                 # whole or not at all
        folder.finish()                                            # the DONE file: the same command now does nothing

The folder's name is a readable slug and a digest of the whole configuration, so that two configurations never share a
folder, and no value of a configuration ever becomes a path.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.editors.core.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    import pandas as pd

DONE = "DONE"
SCHEMA_VERSION = 1  # of results.json
RECORDS = "records.jsonl"
RESULTS = "results.json"
# What a results.json is named by, and its parts that hold numbers.
_NAMES = ("editor", "model", "dataset", "protocol")
_PARTS = ("counts", "summary", "before", "papers", "collapse", "speed")
_SLUG_LENGTH = 60
_DIGEST_LENGTH = 12


def digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form: keys sorted, no white space."""
    text = json.dumps(encodable(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def slug(text: str, limit: int = _SLUG_LENGTH) -> str:
    """A file name made of letters, digits, `_`, `.` and `-`: no separator, no leading dot, never empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    cleaned = re.sub(r"[^A-Za-z0-9_.]+", "-", plain)
    cleaned = re.sub(r"\.{2,}", ".", cleaned).strip("-.")[:limit].strip("-.")
    return cleaned or "unnamed"


def encodable(value: Any) -> Any:
    """The value with everything that JSON cannot hold put as text: "inf", "-inf" and "nan", paths, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): encodable(entry) for key, entry in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Sequence | set | frozenset):
        return [encodable(entry) for entry in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numbers and arrays of torch and numpy
        return encodable(value.tolist())
    raise TypeError(f"expected a value that JSON can hold, got {type(value).__name__}")


def number(value: Any) -> float:
    """A number as read back from JSON, where inf and nan are text and a missing one is null."""
    return math.nan if value is None else float(value)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it: a reader sees the old or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Make a rename or a new file survive a power cut; Windows has no such call and needs none."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Attributes:
        path: The folder.
        key: Digest of the settings that decide the results.
    """

    path: Path
    key: str

    @classmethod
    def at(cls, out: str | Path, name: str, settings: Mapping[str, Any]) -> RunFolder:
        """The folder `out`/slug-digest for these settings; nothing is created yet."""
        key = digest(settings)
        return cls(Path(out) / f"{slug(name)}-{key[:_DIGEST_LENGTH]}", key)

    @contextmanager
    def opened(self) -> Iterator[RunFolder]:
        """Create the folder and hold it against a second process with the same command.

        Raises:
            ConfigError: another process holds it, or the folder cannot be made.
        """
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the folder {self.path} cannot be made: {error.strerror}; give another `out=`"
            ) from error
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"another process is at work in {self.path}; wait for it, or give another `out=`"
            ) from None
        try:
            yield self
        finally:
            lock.release()

    @property
    def done(self) -> bool:
        """Whether these settings have been carried out to the end."""
        marker = self.path / DONE
        return marker.is_file() and marker.read_text(encoding="ascii").strip() == self.key

    def finish(self) -> None:
        self.write_text(DONE, self.key + "\n")

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
        """Add one line to a file of records. It is on the disk when the call returns."""
        line = json.dumps(encodable(record), allow_nan=False) + "\n"
        with self.file(name).open("ab") as file:
            file.write(line.encode("ascii"))
            file.flush()
            os.fsync(file.fileno())

    def records(self, name: str) -> list[dict[str, Any]]:
        """The records written so far. A torn last line, as a kill leaves it, is cut off the file.

        Raises:
            DatasetError: a line before the last is no record; the file has been damaged by something else.
        """
        path = self.file(name)
        if not path.exists():
            return []
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())
        return read_records(path)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without a torn last line; nothing is written.

    Raises:
        DatasetError: there is no such file, or a line before the last is no record.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot be read: {error.strerror}", path=path) from error
    whole = content[: content.rfind(b"\n") + 1]
    return [_record(line, path, i) for i, line in enumerate(whole.splitlines(), 1)]


def _record(line: bytes, path: Path, place: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise DatasetError(
            "is no record: the file was damaged; move the folder away and run again", path=path, record=f"line {place}"
        )
    return record


def load_results(folder: str | Path) -> pd.DataFrame:
    """The results of every finished run in a folder and below it, as a table.

    Args:
        folder: A run's folder, or any folder above.

    Returns:
        One row a run. Columns: `run` (its folder), `editor`, `model`, `dataset`, `protocol`, then every number of
        results.json under its path, as in `summary.probability.reliability.mean`.

    Raises:
        ConfigError: no such folder, or a results.json that is not one.
    """
    import pandas as pd

    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"expected a folder of runs, got {str(root)!r}, which is none")
    rows = [_row(path) for path in sorted(root.rglob(RESULTS))]
    return pd.DataFrame(rows)


def read_results(path: Path) -> dict[str, Any]:
    """One results.json.

    Raises:
        ConfigError: not JSON, without the entries that every results.json has, or of another schema_version.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        version, names = results["schema_version"], results["names"]
        missing = [name for name in _NAMES if not isinstance(names[name], str)]
        missing += [name for name in _PARTS if not isinstance(results.get(name, {}), Mapping)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is no results file of errata: {error!r}") from error
    if version != SCHEMA_VERSION:
        raise ConfigError(f"{path} has schema_version {version!r}; this version of errata reads {SCHEMA_VERSION}")
    if missing:
        raise ConfigError(f"{path} is no results file of errata: {missing[0]!r} is not what it is there")
    return results


def _row(path: Path) -> dict[str, Any]:
    results = read_results(path)
    row: dict[str, Any] = {"run": str(path.parent), **{key: results["names"][key] for key in _NAMES}}
    for part in _PARTS:
        row.update(_flat(results.get(part, {}), part))
    return row


def _flat(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {key: leaf for name, entry in value.items() for key, leaf in _flat(entry, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {}
    return {path: number(value) if value in ("inf", "-inf", "nan") else value}
