"""A folder of tensors by name, shared by many processes: an entry is whole or absent, and damage is noticed.

An entry NAME is one safetensors file and a manifest beside it:

    NAME-<first digits of its SHA-256>.safetensors
    NAME.json       {"file": ..., "sha256": ..., "meta": {...}, "digest": SHA-256 of the manifest itself}

Both are written to a temporary name, flushed to the disk and renamed; the manifest comes last, so an entry exists from
the moment of its second rename on. Neither file ever changes afterwards: another content has another name. Readers need
no lock. Writers hold the entry's lock, which the operating system takes from a process that dies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from errata.editors.core.errors import StatisticsError
from errata.editors.core.files.atomic import digest_of_file, set_aside, sync_file, sync_folder, write_tensors

logger = logging.getLogger(__name__)

ENVIRONMENT = "ERRATA_CACHE"
_WAIT_SECONDS = 60.0


class DamagedEntryError(StatisticsError):
    """An entry is there, but it is not what was written."""


@dataclass(frozen=True)
class CachedTensors:
    """What was stored under one name. The tensors are freshly allocated."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def cache_folder(cache_dir: str | Path | None = None, *, what: str = "moments") -> Path:
    """`cache_dir`, or else the folder of the environment variable ERRATA_CACHE, or else ~/.cache/errata/WHAT."""
    chosen = cache_dir or os.environ.get(ENVIRONMENT) or Path("~/.cache/errata") / what
    return Path(chosen).expanduser().resolve()


class TensorCache:
    """The entries of one folder, which is made if it is missing. Names are digests in hex, with a prefix at most.

    Raises:
        StatisticsError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StatisticsError(
                f"the cache folder {folder} cannot be made ({error}); pass cache_dir, or set {ENVIRONMENT}"
            ) from error

    def load(self, name: str) -> CachedTensors | None:
        """The entry, once its bytes have been found to be those written; None where there is none.

        Raises:
            DamagedEntryError: a byte differs, or the file of the tensors is missing.
            StatisticsError: a file cannot be read, which says nothing of its bytes.
        """
        while (content := self._content(name)) is not None:
            try:
                return self._read(name, content)
            except DamagedEntryError:
                # A writer may have put another content in its place meanwhile, and removed the old one.
                if content == self._content(name):
                    raise
        return None

    def _content(self, name: str) -> bytes | None:
        """The manifest's bytes; None where there is none."""
        try:
            return self._manifest_path(name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(self._manifest_path(name), error) from error

    def _read(self, name: str, content: bytes) -> CachedTensors:
        """The entry that a manifest is of."""
        manifest = self._checked(name, content)
        path = self.folder / manifest["file"]
        try:
            if digest_of_file(path) != manifest["sha256"]:
                raise DamagedEntryError(f"{path} does not have the SHA-256 that its manifest states")
            return CachedTensors(_load_tensors(path), manifest["meta"])
        except FileNotFoundError as error:
            raise DamagedEntryError(f"{path} is missing, but has a manifest") from error
        except OSError as error:
            raise _unreadable(path, error) from error

    def described(self, prefix: str) -> dict[str, dict[str, Any]]:
        """What the manifests of all entries whose names begin so say of them, by name; damaged ones are left out."""
        found = {}
        for path in sorted(self.folder.glob(f"{prefix}*.json")):
            try:
                found[path.stem] = self._checked(path.stem, path.read_bytes())["meta"]
            except (OSError, DamagedEntryError) as error:
                logger.warning("%s; it is not looked at", error)
        return found

    def recovered(self, name: str) -> CachedTensors | None:
        """As `load`, but a damaged entry is set aside with a warning and counts as absent. Hold the entry's lock.

        Raises:
            StatisticsError: a file cannot be read.
        """
        try:
            return self.load(name)
        except DamagedEntryError as error:
            logger.warning("%s; it is set aside as *.damaged and computed again", error)
            self.set_aside(name)
            return None

    def store(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write or replace an entry; a reader sees the old one or the new one. Hold the entry's lock.

        Raises:
            OSError: the disk is full, or read-only. The old entry is as it was.
        """
        temporary = self.folder / f"{name}.{os.getpid()}.tmp"
        try:
            write_tensors(temporary, tensors)
            sha256 = digest_of_file(temporary)
            manifest: dict[str, Any] = {"file": _data_name(name, sha256), "sha256": sha256, "meta": dict(meta)}
            self._install(temporary, manifest["file"])
            temporary.write_bytes(_rendered(manifest))
            self._install(temporary, f"{name}.json")
        finally:
            temporary.unlink(missing_ok=True)
        self._sweep(name, keep=manifest["file"])

    def remove(self, name: str) -> None:
        """Delete an entry, if there is one. Hold its lock."""
        self._manifest_path(name).unlink(missing_ok=True)
        self._sweep(name, keep=None)

    def set_aside(self, name: str) -> None:
        """Rename what there is of an entry to *.damaged, where it can be looked at. Hold its lock."""
        for path in (self._manifest_path(name), *self.folder.glob(f"{name}-*.safetensors")):
            if path.exists():
                set_aside(path)

    @contextmanager
    def locked(self, names: Sequence[str]) -> Iterator[None]:
        """Hold the locks of several entries against all other processes and threads; waits as long as it takes."""
        from filelock import FileLock, Timeout

        with ExitStack() as held:
            # Everybody takes them in one order: nobody can wait for somebody who waits for him.
            for name in sorted(set(names)):
                lock = FileLock(self.folder / f"{name}.lock")
                while True:
                    try:
                        held.enter_context(lock.acquire(timeout=_WAIT_SECONDS))
                        break
                    except Timeout:
                        logger.info("another process works on %s; waiting for it", self.folder / name)
            yield

    def _manifest_path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _checked(self, name: str, content: bytes) -> dict[str, Any]:
        path = self._manifest_path(name)
        try:
            manifest = json.loads(content)
            del manifest["digest"]
            # Byte for byte: even a blank too many has come from somewhere.
            if content == _rendered(manifest) and manifest["file"] == _data_name(name, manifest["sha256"]):
                return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedEntryError(f"{path} is no manifest: {type(error).__name__}: {error}") from error
        raise DamagedEntryError(f"{path} is not as it was written")

    def _install(self, temporary: Path, name: str) -> None:
        sync_file(temporary)
        temporary.replace(self.folder / name)
        sync_folder(self.folder)

    def _sweep(self, name: str, keep: str | None) -> None:
        """Remove older data of the entry, and what a writer that died has left."""
        for path in (*self.folder.glob(f"{name}-*.safetensors"), *self.folder.glob(f"{name}.*.tmp")):
            if path.name != keep:
                path.unlink(missing_ok=True)


def _unreadable(path: Path, error: OSError) -> StatisticsError:
    return StatisticsError(f"{path} cannot be read: {error}; make it readable, or name another cache folder")


def _data_name(name: str, sha256: str) -> str:
    return f"{name}-{sha256[:16]}.safetensors"


def _rendered(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as it stands in its file, its own digest in it."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "digest": digest}, indent=1).encode()


def _load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # The clone is not idle: loaded tensors can lie at odd addresses, where products give other bits.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedEntryError(f"{path} is no safetensors file: {error}") from error
