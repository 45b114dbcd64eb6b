"""Atomic writes: after a kill, a full disk or a power cut, a file is either complete or as it was before.

write_atomically(path, content)      # a reader sees the old file or the new one, never a part
append(path, content)                # on the disk when the call returns; after an error the file is as it was
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from torch import Tensor

from errata.editors.core.errors import ConfigError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it.

    Raises:
        OSError: The disk is full, read-only or broken. The old file is as it was.
    """
    with replace_whole(path) as temporary, temporary.open("wb") as file:
        file.write(content)


@contextmanager
def replace_whole(path: Path) -> Iterator[Path]:
    """Context manager that gives a temporary path to write a file to, then syncs it and renames it to `path`.

    After an error the old file is as it was.
    """
    # In the same folder: a rename between file systems is not atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the user's mask.

    Raises:
        OSError: As `write_atomically`.
    """
    from safetensors.torch import save_file

    path.touch()  # takes the mask's permissions; safetensors makes files that only their owner can read
    mode = path.stat().st_mode
    save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    path.chmod(mode)


def append(path: Path, content: bytes) -> int:
    """Append bytes to a file and sync it. Make the file if it is missing.

    Returns:
        The offset of the new bytes.

    Raises:
        OSError: As `write_atomically`. A part that was written is cut off again if the disk allows it. A part that a
            kill leaves must be cut off by the reader.
    """
    is_new = not path.exists()
    with path.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            _write_all(file, content)
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(start)
            raise
    if is_new:
        sync_folder(path.parent)
    return start


def truncate(path: Path, size: int) -> None:
    """Cut a file down to its first `size` bytes, if it is longer."""
    if path.stat().st_size > size:
        with path.open("r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to *.damaged, so that a user can inspect it, and return the new path."""
    names = (f"{path.name}.damaged{number or ''}" for number in itertools.count())
    aside = next(free for name in names if not (free := path.with_name(name)).exists())
    path.replace(aside)
    sync_folder(path.parent)
    return aside


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a rename or a new file survive a power cut. Windows has no such call and does not need it."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_all(file: FileIO, content: bytes) -> None:
    rest = memoryview(content)
    # An unbuffered `write` may write only a part, for example on a full disk.
    while rest:
        rest = rest[file.write(rest) :]


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
