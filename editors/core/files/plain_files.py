"""Read files that someone else may have written to do harm.

A pipe or a device is never opened: reading one may wait for ever, or never end. JSON that is nested too deeply and a
compressed file that is far larger than its size suggests are refused, so that work and memory stay bounded by the size
of the file.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any

GZIP = b"\x1f\x8b"
# Real text is compressed to a tenth, repeated records to a fiftieth; gzip reaches a thousandth.
_MOST_EXPANDED = 100
_FREE_BYTES = 1 << 22


def check_plain(path: str | Path) -> None:
    """Refuse a path that leads to something other than a plain file.

    Raises:
        OSError: It is a folder, a pipe, a socket or a device, or it is missing; `strerror` says so.
    """
    mode = Path(path).stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, and no plain file", str(path))


def read_bytes(path: str | Path) -> bytes:
    """Return the content of a plain file.

    Raises:
        OSError: As `check_plain`, or it cannot be read.
    """
    check_plain(path)
    return Path(path).read_bytes()


def parse_json(content: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is no JSON, or it is nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str | Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        OSError: As `read_bytes`.
        ValueError: As `parse_json`, or it is not UTF-8.
    """
    return parse_json(read_bytes(path).decode("utf-8"))


def decompress(content: bytes) -> bytes:
    """Return the bytes of a gzip file.

    Raises:
        ValueError: They are damaged, or more than a hundred times as long as the file.
    """
    most = _MOST_EXPANDED * len(content) + _FREE_BYTES
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            found = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"damaged gzip: {error}") from error
    if len(found) > most:
        raise ValueError(f"it holds more than {_MOST_EXPANDED} times its own size")
    return found
