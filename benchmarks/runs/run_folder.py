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
import logging
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from errata.editors.core.errors import ConfigError, DatasetError
from errata.editors.core.files import jsonl
from errata.editors.core.files.atomic import digest_of_file, set_aside, write_atomically

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

DONE = "DONE"
SCHEMA_VERSION = 1  # of results.json
RECORDS = "records.jsonl"
SECONDS = "seconds.jsonl"  # how long each edit and each scoring took, and the memory by then: what never repeats
RESULTS = "results.json"
CURVE = "curve.json"
# What a results.json is named by, and its parts that hold numbers.
_NAMES = ("editor", "model", "dataset", "protocol")
_PARTS = ("counts", "summary", "before", "papers", "collapse", "speed")
# What else is read of it by name.
_NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "config": ("seed", "confidence", "editor"),
        "digests": ("settings", "model", "cases"),
        "counts": ("edits", "failed", "disabling"),
        "summary": (),
        "before": (),
        "collapse": (
            *(f"{name}_{moment}" for name in ("perplexity", "fluency") for moment in ("before", "after")),
            *("perplexity_ratio", "perplexity_ratio_worst", "neighborhood_kl", "retention"),
        ),
        "speed": ("seconds_per_edit",),
        "versions": ("errata",),
        "machine": ("precision", "device"),
    }
)
DATA = (RESULTS, RECORDS, CURVE)  # of a bench: without one of these a finished run is no longer finished
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


def make_folder(path: Path) -> Path:
    """Make a folder, with those above it, where it is not there yet.

    Raises:
        ConfigError: it cannot be made: says why.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {path} cannot be made: {error.strerror}; give another `out=`") from error
    return path


def folder_of_runs(path: str | Path) -> Path:
    """The folder, once it is one.

    Raises:
        ConfigError: there is none.
    """
    if not Path(path).is_dir():
        raise ConfigError(f"expected a folder of runs, got {str(path)!r}, which is none")
    return Path(path)


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
        from filelock import FileLock, Timeout

        self._refuse_links()
        make_folder(self.path)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise ConfigError(
                f"another process is at work in {self.path}; wait for it, or give another `out=`"
            ) from None
        try:
            for left in self.path.rglob(".*.tmp"):  # by a process that was killed while it wrote
                left.unlink()
            yield self
        finally:
            lock.release()

    def _refuse_links(self) -> None:
        """Whoever appends to a link writes where it points to."""
        linked = next((path for path in (self.path, *self.path.rglob("*")) if path.is_symlink()), None)
        if linked is not None:
            raise ConfigError(f"{linked} is a link, and a run writes into its own folder alone; remove it")

    @property
    def done(self) -> bool:
        """Whether these settings have been carried out to the end, and the data of it are as they were written."""
        marker = self.path / DONE
        try:
            key, *stated = marker.read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            return False
        return key == self.key and not self._damaged(stated)

    def finish(self) -> None:
        """Mark the run as carried out, with the digests of its data."""
        self.write_text(DONE, "\n".join([self.key, *self._digests()]) + "\n")

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
        """The files of data of which the digest is not stated so."""
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
        """Add one line to a file of records. It is on the disk when the call returns."""
        jsonl.append(self.file(name), encodable(record))

    def records(self, name: str) -> list[dict[str, Any]]:
        """The records written so far, up to the first damaged one. A torn last line, as a kill leaves it, is cut off
        the file; a damaged file is set aside with a warning, and what stood before the damage goes into a new one."""
        return jsonl.recover(self.file(name))

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value that is made once: from its file, or made now and written. A damaged file is set aside with a
        warning, and its value made again."""
        path = self.file(name)
        found = jsonl.recover(path)
        if not found:
            write_atomically(path, jsonl.render({"value": encodable(make())}))
            found = jsonl.recover(path)
        return found[0]["value"]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without a torn last line; nothing is written.

    Raises:
        DatasetError: there is no such file, or a line before the last is not what was written.
    """
    if not path.exists():
        raise DatasetError("cannot be read: there is no such file", path=path)
    found = jsonl.read(path)
    if found.damage is not None:
        raise DatasetError(f"{found.damage}; run its command again, which makes it anew", path=path)
    return found.records


def _digest_if_readable(path: Path) -> str | None:
    try:
        return digest_of_file(path)
    except OSError:
        return None


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

    rows = [_row(path) for path in sorted(folder_of_runs(folder).rglob(RESULTS))]
    return pd.DataFrame(rows)


def read_results(path: Path) -> dict[str, Any]:
    """One results.json, with everything that reports and comparisons read of it.

    Raises:
        ConfigError: not JSON, without the entries that every results.json has, or of another schema_version.
    """
    results = _read_results(path)
    for part, names in _NEEDED.items():
        there = results.get(part)
        absent = [name for name in names if name not in there] if isinstance(there, Mapping) else [""]
        if absent:
            raise _no_results(path, f"{part}.{absent[0]}".rstrip("."))
    for part, kind in (("command", str), ("warnings", list)):
        if not isinstance(results.get(part), kind):
            raise _no_results(path, part)
    return results


def _no_results(path: Path, name: str) -> ConfigError:
    return ConfigError(f"{path} is no results file of errata: {name!r} is not what it is there")


def _read_results(path: Path) -> dict[str, Any]:
    """One results.json of which the names and numbers alone are looked at."""
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
        raise _no_results(path, missing[0])
    return results


def _row(path: Path) -> dict[str, Any]:
    results = _read_results(path)
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
