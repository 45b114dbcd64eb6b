"""Locks between processes, on file systems with and without flock.

    with locks.hold(folder / ".lock", patience=1.0): ...        # no other process is inside

The operating system releases a flock when its process dies. A file system without flock gets a file .NAME.owner, which
only one process can make; it names host and process, and its time is renewed every few seconds. Such a file counts as
left behind if its process has ended, or if another host has not renewed it for two minutes.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from errata.editors.core.errors import StorageWarning
from errata.editors.core.files.atomic import UNSUPPORTED
from errata.editors.core.files.plain_files import read_json

STALE_SECONDS = 120.0
_RENEW_SECONDS = 10.0
_POLL_SECONDS = 0.05


class LockHeldError(Exception):
    """Another process holds a lock; `owner` says which, where that is known. Callers turn it into their own error."""

    def __init__(self, owner: Owner | None) -> None:
        self.owner = owner
        super().__init__("" if owner is None else str(owner))


@dataclass(frozen=True)
class Owner:
    """The process that a file names.

    Attributes:
        host: Its machine.
        process: Its number there.
        started: When it started, in the units of the machine, to tell it from a later one of the same number.
    """

    host: str
    process: int
    started: str | None = None

    @classmethod
    def this(cls) -> Owner:
        """Return this process."""
        return cls(platform.node(), os.getpid(), _started(os.getpid()))

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """Return the process that a file names; None where it names none."""
        try:
            said = read_json(path)
            return cls(str(said["host"]), int(said["process"]), said.get("started"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return None

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether it is on this machine."""
        return self.host == platform.node()

    @property
    def has_ended(self) -> bool:
        """Whether it was a process of this machine, and is no more."""
        if not self.is_here or os.name != "posix":
            return False
        try:
            os.kill(self.process, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except OSError:  # of another user
            return False
        return self.started is not None and _started(self.process) not in (None, self.started)


def _started(process: int) -> str | None:
    """Return when a process started, in ticks since the machine did; None where no one says."""
    try:
        return (
            Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, IndexError):
        return None


def owner_file(lock: Path) -> Path:
    """Return the file that names the owner of a lock."""
    return lock.with_name(f"{lock.name}.owner")


@contextmanager
def hold(path: Path, patience: float = -1.0, *, named: bool = False) -> Iterator[None]:
    """Context manager that holds a lock. It makes the file of the lock with the permissions of the user's mask.

    Args:
        path: The file of the lock.
        patience: Seconds to wait for another process. Negative: without end.
        named: Name the owner also where flock works, so that others can tell where flock keeps no one out. A mark
            that another host has renewed lately gets a warning.

    Raises:
        LockHeldError: Another process holds the lock.
        OSError: The file of the lock cannot be made.
    """
    with _flock(path, patience) as is_locked:
        if is_locked and not named:
            yield
            return
        with _owned(owner_file(path), patience, is_locked=is_locked):
            yield


@contextmanager
def _flock(path: Path, patience: float) -> Iterator[bool]:
    """Hold a flock; gives False where the file system has none."""
    from filelock import FileLock, Timeout

    with suppress(FileExistsError):  # by ourselves: older versions of filelock take no notice of the mask
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
    lock, is_locked = FileLock(path, thread_local=False), True
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise LockHeldError(Owner.read(owner_file(path))) from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        message = f"the file system has no locks ({error.strerror}); files that name their owner take their place"
        warnings.warn(message, StorageWarning, stacklevel=2)
        is_locked = False
    try:
        yield is_locked
    finally:
        if is_locked:
            lock.release()


@contextmanager
def _owned(path: Path, patience: float, *, is_locked: bool) -> Iterator[None]:
    """Hold the file that names this process."""
    mine = json.dumps(asdict(Owner.this())).encode()
    deadline = time.monotonic() + patience
    while not _make(path, mine):
        if (left := _left_behind(path, is_locked=is_locked)) is not None:
            _remove(path, left)
        elif patience >= 0 and time.monotonic() > deadline:
            raise LockHeldError(Owner.read(path))
        else:
            time.sleep(_POLL_SECONDS)
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(path, ended), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        with suppress(OSError):
            if path.read_bytes() == mine:
                path.unlink()


def _make(path: Path, content: bytes) -> bool:
    """Make a file that is not there yet; False where it is."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    return True


def _left_behind(path: Path, *, is_locked: bool) -> bytes | None:
    """Return the content of a file whose owner is gone, or may be since this process holds the flock; else None."""
    try:
        content, age = path.read_bytes(), _age(path)
    except OSError:  # it has just been removed
        return None
    owner = Owner.read(path)
    if owner is None:
        return content if is_locked or age > STALE_SECONDS else None
    if owner.has_ended or (not owner.is_here and age > STALE_SECONDS):
        return content
    if owner.is_here or not is_locked:
        return None
    message = (
        f"{owner} has worked in {path.parent} until {age:.0f} seconds ago; if it still does, the locks of this file "
        "system do not reach other hosts: stop one of them"
    )
    warnings.warn(message, StorageWarning, stacklevel=2)
    return content


def clear_left_behind(lock: Path) -> None:
    """Remove the file that names a lock's owner if it names a process of this machine that has ended."""
    path = owner_file(lock)
    owner = Owner.read(path)
    if owner is not None and owner.has_ended:
        with suppress(OSError):  # another process may have removed it just now
            _remove(path, path.read_bytes())


def _age(path: Path) -> float:
    """Return how many seconds ago a file was renewed, by the clock of the file system where it gives one."""
    probe = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        probe.touch()
        now = probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
    return max(0.0, now - path.stat().st_mtime)


def _remove(path: Path, content: bytes) -> None:
    """Remove a file with this content. Another process may do the same, and have made a new one in the meantime."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        path.replace(aside)
        if aside.read_bytes() != content:
            os.link(aside, path)
        aside.unlink()


def _renew(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_RENEW_SECONDS):
        try:
            os.utime(path)
        except OSError:
            return


def is_held(path: Path) -> bool:
    """Return whether a process holds a lock, without waiting. Takes the lock for a moment where it is free."""
    from filelock import FileLock, Timeout

    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            pass
    except Timeout:
        return True
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            return False  # no process here can hold a lock that may not be written
    return _is_renewed(owner_file(path))


def _is_renewed(path: Path) -> bool:
    """Return whether a file names a process that is there, or one of another host that has renewed it lately."""
    owner = Owner.read(path)
    if owner is None or owner.has_ended:
        return False
    try:
        return owner.is_here or time.time() - path.stat().st_mtime < STALE_SECONDS
    except OSError:
        return False


def described(owner: Owner | None) -> str:
    """Return how a message calls the holder of a lock."""
    return "another process" if owner is None else f"another process ({owner})"
