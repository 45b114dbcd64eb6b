"""A cache folder of tensors by name, which many processes can share and which notices damage.

An entry NAME is one safetensors file and a manifest beside it:

    NAME-<first digits of its SHA-256>.safetensors
    NAME.json       {"file": ..., "sha256": ..., "meta": {...}, "digest": SHA-256 of the manifest itself}

Both are written to a temporary name, flushed to the disk and renamed. The manifest comes last, so that an entry exists
from the second rename on, and is always complete. The file of tensors never changes, since its name depends on its
content. So readers need no lock. Writers hold the entry's lock, which the operating system releases if they die.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from errata.editors.core.errors import StatisticsError
from errata.editors.core.files import locks
from errata.editors.core.files.atomic import digest_of_file, set_aside, sync_file, sync_folder, write_tensors
from errata.editors.core.files.plain_files import parse_json, read_bytes

logger = logging.getLogger(__name__)

ENVIRONMENT = "ERRATA_CACHE"
_WAIT_SECONDS = 60.0


class DamagedEntryError(StatisticsError):
    """An entry exists, but its bytes are not those that were written."""


class UnwritableCacheError(StatisticsError):
    """This process may not write to the cache folder, which may be another user's."""


@dataclass(frozen=True)
class CachedTensors:
    """What was stored under one name. The tensors are in new memory."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


EntryFault = Callable[[CachedTensors], str | None]


def cache_folder(cache_dir: str | Path | None = None, *, what: str = "moments") -> Path:
    """Return `cache_dir`, else the folder in the environment variable ERRATA_CACHE, else ~/.cache/errata/WHAT."""
    chosen = cache_dir or os.environ.get(ENVIRONMENT) or Path("~/.cache/errata") / what
    return Path(chosen).expanduser().resolve()


class TensorCache:
    """The entries of one folder, which is made if it is missing. Names are hex digests, with an optional prefix.

    Raises:
        StatisticsError: The folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StatisticsError(
                f"the cache folder {folder} cannot be made ({error}); pass cache_dir, or set {ENVIRONMENT}"
            ) from error

    def load(self, name: str, fault: EntryFault | None = None) -> CachedTensors | None:
        """Read an entry and check its digests; return None if there is no entry.

        Args:
            name: Of the entry.
            fault: Says what is wrong with an entry that holds other things than its name says, which then counts as
                damaged.

        Raises:
            DamagedEntryError: A byte differs, or the file of the tensors is missing.
            StatisticsError: A file cannot be read, which says nothing about its bytes.
        """
        while (content := self._content(name)) is not None:
            try:
                entry = self._read(name, content)
                if fault is not None and (reason := fault(entry)) is not None:
                    raise DamagedEntryError(f"{self._manifest_path(name)} {reason}")
                return entry
            except DamagedEntryError:
                # Another process may have replaced the entry in the meantime. Then read the new one.
                if content == self._content(name):
                    raise
        return None

    def _content(self, name: str) -> bytes | None:
        """Return the manifest's bytes, or None if there is no manifest."""
        try:
            return read_bytes(self._manifest_path(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(self._manifest_path(name), error) from error

    def _read(self, name: str, content: bytes) -> CachedTensors:
        """Read the entry that a manifest describes."""
        manifest = self._parse_manifest(name, content)
        path = self.folder / manifest["file"]
        try:
            if digest_of_file(path) != manifest["sha256"]:
                raise DamagedEntryError(f"{path} does not have the SHA-256 that its manifest states")
            return CachedTensors(_load_tensors(path), manifest["meta"])
        except FileNotFoundError as error:
            raise DamagedEntryError(f"{path} is missing, but has a manifest") from error
        except OSError as error:
            raise _unreadable(path, error) from error

    def describe(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Return `meta` of all entries with this prefix, by name. Damaged manifests are left out with a warning."""
        metas = {}
        for path in sorted(self.folder.glob(f"{prefix}*.json")):
            try:
                metas[path.stem] = self._parse_manifest(path.stem, read_bytes(path))["meta"]
            except (OSError, DamagedEntryError) as error:
                logger.warning("%s; it is ignored", error)
        return metas

    def recover(self, name: str, fault: EntryFault | None = None) -> CachedTensors | None:
        """Read an entry as `load` does, but set a damaged one aside with a warning and return None.

        The caller must hold the entry's lock.

        Raises:
            StatisticsError: A file cannot be read.
        """
        try:
            return self.load(name, fault)
        except DamagedEntryError as error:
            logger.warning("%s; it is set aside as *.damaged and computed again", error)
            try:
                self.set_aside(name)
            except PermissionError as refused:  # another user's file
                raise self._unwritable(refused) from refused
            return None

    def store(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write or replace an entry. A reader sees the old entry or the new one. The caller must hold its lock.

        Raises:
            OSError: The disk is full or read-only. The old entry is as it was.
        """
        temporary = self.folder / f"{name}.{os.getpid()}.tmp"
        try:
            write_tensors(temporary, tensors)
            sha256 = digest_of_file(temporary)
            manifest: dict[str, Any] = {"file": _data_name(name, sha256), "sha256": sha256, "meta": dict(meta)}
            self._install(temporary, manifest["file"])
            temporary.write_bytes(_render(manifest))
            self._install(temporary, f"{name}.json")
        finally:
            temporary.unlink(missing_ok=True)
        self._remove_leftovers(name, keep=manifest["file"])

    def remove(self, name: str) -> None:
        """Delete an entry, if there is one. The caller must hold its lock."""
        # First the manifest, so that no reader finds one without its tensors.
        self._manifest_path(name).unlink(missing_ok=True)
        self._remove_leftovers(name, keep=None)

    def set_aside(self, name: str) -> None:
        """Rename the files of an entry to *.damaged, so that a user can inspect them. The caller must hold its lock."""
        for path in (self._manifest_path(name), *self.folder.glob(f"{name}-*.safetensors")):
            if path.exists():
                set_aside(path)

    @contextmanager
    def lock(self, names: Sequence[str]) -> Iterator[None]:
        """Context manager that holds the locks of several entries. It waits until they are free, however long.

        Raises:
            UnwritableCacheError: The files of the locks cannot be made or opened.
        """
        with ExitStack() as held:
            # All processes take the locks in the same order. So two of them never wait for each other.
            for name in sorted(set(names)):
                while True:
                    try:
                        held.enter_context(locks.hold(self.folder / f"{name}.lock", _WAIT_SECONDS))
                        break
                    except OSError as error:
                        raise self._unwritable(error) from error
                    except locks.LockHeldError:
                        logger.info("another process works on %s; waiting for it", self.folder / name)
            yield

    def _unwritable(self, error: OSError) -> UnwritableCacheError:
        return UnwritableCacheError(
            f"the cache folder {self.folder} cannot be written ({error}); set {ENVIRONMENT} to a folder of your own, "
            "or make this one and its files writable for your group"
        )

    def _manifest_path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _parse_manifest(self, name: str, content: bytes) -> dict[str, Any]:
        path = self._manifest_path(name)
        try:
            manifest = parse_json(content)
            del manifest["digest"]
            # Compare all bytes: an additional blank, too, means that something else has written to the file.
            is_ours = re.fullmatch("[0-9a-f]{64}", manifest["sha256"]) and isinstance(manifest["meta"], dict)
            if is_ours and content == _render(manifest) and manifest["file"] == _data_name(name, manifest["sha256"]):
                return manifest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedEntryError(f"{path} is no manifest: {type(error).__name__}: {error}") from error
        raise DamagedEntryError(f"{path} is not as it was written")

    def _install(self, temporary: Path, name: str) -> None:
        sync_file(temporary)
        temporary.replace(self.folder / name)
        sync_folder(self.folder)

    def _remove_leftovers(self, name: str, keep: str | None) -> None:
        """Remove older data of the entry, and temporary files of writers that died."""
        for path in (*self.folder.glob(f"{name}-*.safetensors"), *self.folder.glob(f"{name}.*.tmp")):
            if path.name != keep:
                path.unlink(missing_ok=True)


def _unreadable(path: Path, error: OSError) -> StatisticsError:
    return StatisticsError(f"{path} cannot be read: {error}; make it readable, or name another cache folder")


def _data_name(name: str, sha256: str) -> str:
    return f"{name}-{sha256[:16]}.safetensors"


def _render(manifest: Mapping[str, Any]) -> bytes:
    """Return the content of the manifest's file, which includes its digest."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "digest": digest}, indent=1).encode()


def _load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # The clone is necessary: loaded tensors may be at odd addresses, where products give other bits.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedEntryError(f"{path} is no safetensors file: {error}") from error
