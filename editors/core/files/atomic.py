"""Atomic writes: after a kill, a full disk or a power cut, a file is either complete or as it was before.

write_atomically(path, content)      # a reader sees the old file or the new one, never a part
append(path, content)                # on the disk when the call returns; after an error the file is as it was

A file system that cannot sync gets a StorageWarning, and the work goes on: a power cut may then lose the last files.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from errata.editors.core.errors import ConfigError, OtherWriterError, StorageWarning
from errata.editors.core.files.plain_files import check_plain

if TYPE_CHECKING:
    from torch import Tensor

# What a file system says that cannot do what was asked, as SMB, FUSE and some network folders do not.
UNSUPPORTED = tuple(
    getattr(errno, name) for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "ENOLCK") if hasattr(errno, name)
)
_TAIL = 32  # bytes


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
        try:
            temporary.replace(path)
        except FileNotFoundError:
            raise OtherWriterError(f"{temporary} is gone: another process works in this folder, too") from None
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


@dataclass(frozen=True)
class FileEnd:
    """How a file ends, to notice that another process has written to it.

    Attributes:
        size: Of the file in bytes.
        tail: Its last bytes.
    """

    size: int = 0
    tail: bytes = b""

    @classmethod
    def of(cls, path: Path) -> FileEnd:
        """Return the end of a file; one that does not exist is empty."""
        try:
            with path.open("rb", buffering=0) as file:
                return cls.of_open(file)
        except FileNotFoundError:
            return cls()

    @classmethod
    def of_open(cls, file: FileIO) -> FileEnd:
        """Return the end of an open file, and leave it there."""
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        return cls(size, file.read(_TAIL))

    def followed_by(self, content: bytes) -> FileEnd:
        """Return the end after `content` was appended."""
        return FileEnd(self.size + len(content), (self.tail + content)[-_TAIL:])


def append(path: Path, content: bytes, left: FileEnd | None = None) -> FileEnd:
    """Append bytes to a file and sync it. Make the file if it is missing.

    Args:
        path: The file.
        content: The bytes.
        left: How this process left the file; None if it does not know.

    Returns:
        The end of the file now.

    Raises:
        OtherWriterError: The file is not as this process left it. Nothing was written, or another process wrote at
            the same moment.
        OSError: As `write_atomically`. A part that was written is cut off again if the disk allows it. A part that a
            kill leaves must be cut off by the reader.
    """
    is_new = not path.exists()
    with path.open("a+b", buffering=0) as file:
        before = FileEnd.of_open(file)
        if left is not None and before != left:
            raise other_writer(path)
        try:
            _write_all(file, content)
            _sync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(before.size)
            raise
        after = before.followed_by(content)
        if left is not None and FileEnd.of_open(file) != after:
            raise other_writer(path)
    if is_new:
        sync_folder(path.parent)
    return after


def other_writer(path: Path) -> OtherWriterError:
    """Return the error for a file that is not as this process left it."""
    return OtherWriterError(
        f"{path} is not as this process left it: another process writes to it, too, although a lock should keep it "
        "out; stop one of them, and start this again"
    )


def truncate(path: Path, size: int) -> None:
    """Cut a file down to its first `size` bytes, if it is longer."""
    if path.stat().st_size > size:
        with path.open("r+b") as file:
            file.truncate(size)
            _sync(file.fileno())


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to *.damaged, so that a user can inspect it, and return the new path."""
    names = (f"{path.name}.damaged{number or ''}" for number in itertools.count())
    aside = next(free for name in names if not (free := path.with_name(name)).exists())
    path.replace(aside)
    sync_folder(path.parent)
    return aside


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex, as `sha256sum` prints it."""
    check_plain(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    with path.open("rb") as file:
        _sync(file.fileno())


def sync_folder(path: Path) -> None:
    """Make a rename or a new file survive a power cut. Windows has no such call and does not need it."""
    if os.name != "posix":
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder may be written and not listed
        _warn_of_durability("this folder may not be opened")
        return
    try:
        _sync(handle)
    finally:
        os.close(handle)


def _sync(handle: int) -> None:
    """Force an open file or folder to the disk, or warn where the file system cannot do that."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _warn_of_durability(f"fsync: {error.strerror}")


def _warn_of_durability(why: str) -> None:
    """Say that a power cut may lose files. The text is always the same, so that it is shown once."""
    message = f"the file system cannot force files to the disk ({why}); a power cut may lose the last ones"
    warnings.warn(message, StorageWarning, stacklevel=2)


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
