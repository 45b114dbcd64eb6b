"""Real disks and many users: without fsync, without locks, and with folders that belong to someone else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.editors.core.errors import StorageWarning
from errata.editors.core.files import atomic, locks
from errata.editors.core.files.tensor_cache import TensorCache, UnwritableCacheError
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.moments.second_moments import second_moments
from errata.editors.core.storage.edit_folder import Edits, hold

TEXTS = [f"{'The capital ' * (1 + n % 5)}of land {n} is Oslen." for n in range(8)]


def failing(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# --- fsync --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_without_fsync_files_are_written_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        atomic.write_atomically(tmp_path / "whole", b"content")
        atomic.append(tmp_path / "lines", b"one\n")
        atomic.append(tmp_path / "lines", b"two\n")
        TensorCache(tmp_path).store("ab", {"x": torch.ones(3)}, {})
    assert (tmp_path / "whole").read_bytes() == b"content"
    assert (tmp_path / "lines").read_bytes() == b"one\ntwo\n"
    # All say the same, so that each console shows it once.
    assert {(one.category, str(one.message)) for one in caught} == {
        (
            StorageWarning,
            f"the file system cannot force files to the disk (fsync: {os.strerror(number)}); a power cut may lose the "
            "last ones",
        )
    }


def test_a_full_disk_is_still_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        atomic.write_atomically(tmp_path / "whole", b"content")
    assert not list(tmp_path.iterdir())


# --- locks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_without_flock_a_file_that_names_its_owner_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", failing(number))
    path = tmp_path / "x.lock"
    with pytest.warns(StorageWarning, match="no locks"), locks.hold(path):
        assert locks.is_held(path)
        assert locks.Owner.read(locks.owner_file(path)) == locks.Owner.this()
        with pytest.raises(locks.LockHeldError), locks.hold(path, 0.1):
            pass
    assert not locks.is_held(path)
    with pytest.warns(StorageWarning), hold(tmp_path / "edits"), TensorCache(tmp_path).lock(["b", "a"]):
        pass
    assert not list(tmp_path.glob("*.owner")) + list(tmp_path.glob("*.tmp"))


def test_a_killed_owner_loses_its_lock_and_a_process_of_the_same_number_does_not_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "x.lock"
    code = (
        "import fcntl, os, sys; from errata.editors.core.files import locks\n"
        "def no(*_): raise OSError(37, 'No locks available')\n"
        "fcntl.flock = no\n"
        f"with locks.hold(locks.Path({str(path)!r})): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert locks.owner_file(path).exists()
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with pytest.warns(StorageWarning), locks.hold(path, 5.0):
        pass
    mine = locks.Owner.this()
    if mine.started is not None:
        assert locks.Owner(mine.host, mine.process, "1").has_ended
    assert not mine.has_ended


def test_lock_files_have_the_mode_that_the_user_s_mask_allows(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with TensorCache(tmp_path).lock(["ab"]), hold(tmp_path / "edits"):
            pass
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("*.lock")} == {0o664}


# --- other users --------------------------------------------------------------------------------------------------


def test_in_a_cache_of_another_user_moments_are_computed_and_not_kept(
    make_tiny: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny("gpt2")
    expected = second_moments(model, tiny_tokenizer, [1], TEXTS, cache_dir=tmp_path / "own")
    second_moments(model, tiny_tokenizer, [0], TEXTS, cache_dir=tmp_path / "shared")
    before = {path: path.read_bytes() for path in (tmp_path / "shared").iterdir()}
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if "shared" in str(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = second_moments(model, tiny_tokenizer, [0, 1], TEXTS, cache_dir=tmp_path / "shared")
    (one,) = [warning for warning in caught if warning.category is StorageWarning]
    assert "ERRATA_CACHE" in str(one.message)
    assert "not kept" in str(one.message)
    assert torch.equal(found.matrices[1], expected.matrices[1])
    assert found.meta["computed"] == [1]  # the other user's are read
    assert {path: path.read_bytes() for path in (tmp_path / "shared").iterdir()} == before
    with pytest.raises(UnwritableCacheError, match="ERRATA_CACHE"), TensorCache(tmp_path / "shared").lock(["ab"]):
        pass


def test_folders_of_edits_are_written_without_fsync_and_locks(
    make_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    model = make_tiny("gpt2")
    with pytest.warns(StorageWarning), hold(tmp_path / "edits"):
        Edits.of(Ledger.of(model)).rewrite(tmp_path / "edits")
    assert len(Edits.read(tmp_path / "edits")) == 0
