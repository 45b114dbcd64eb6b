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
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GZIP = b"\x1f\x8b"
# Real text is compressed to a tenth, repeated records to a fiftieth; gzip reaches a thousandth.
_MOST_EXPANDED = 100
_FREE_BYTES = 1 << 22
_NESTED = re.compile(r"(?:[\[{]\s*){300}")


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


def read_json_list(path: str | Path) -> list[Any]:
    """Return the entries of a JSON file that is a list, or of a file with one JSON object per line.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no JSON, no list, or empty.
    """
    file = Path(path)
    if file.suffix == ".json":
        entries = read_json(file)
    else:
        entries = [parse_json(line) for line in read_bytes(file).splitlines() if line.strip()]
    if not isinstance(entries, list) or not entries:
        raise ValueError("expected a list that is not empty")
    return entries


def compose_yaml(text: str) -> Any:
    """Return the root node of a YAML text, or None for an empty one. Nothing is made of tags.

    Raises:
        ValueError: It is nested too deeply, or its aliases repeat more than the text is long.
        yaml.YAMLError: It is no YAML.
    """
    from yaml import SafeLoader, compose

    if _NESTED.search(text):  # looked for first, since YAML reads such brackets in a time that grows with their square
        raise ValueError("it is nested too deeply")
    try:
        root = compose(text, Loader=SafeLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if root is not None and _expanded_size(root, {}) > len(text) + 1:
        raise ValueError("its aliases stand for more than the whole text is long")
    return root


def _expanded_size(node: Any, known: dict[int, float]) -> float:
    """Return how many nodes a node stands for if each alias is written out; infinity if it contains itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # while its parts are counted
        inner = () if node.id == "scalar" else node.value
        if node.id == "mapping":
            inner = [part for pair in node.value for part in pair]
        known[id(node)] = 1.0 + sum(_expanded_size(part, known) for part in inner)
    return known[id(node)]


def decompress(content: bytes) -> bytes:
    """Return the bytes of a gzip file.

    Raises:
        ValueError: They are damaged, or more than a hundred times as long as the file.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            return b"".join(bounded(lambda size: file.read(size), len(content)))
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"damaged gzip: {error}") from error


def bounded(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    """Yield what `read` gives until it gives nothing, but not more than a hundred times the size of the file.

    Args:
        read: Gives the next piece of at most this many bytes, such as `readline` of an open gzip file.
        size: Of the compressed file in bytes.

    Raises:
        ValueError: There is more.
    """
    left = _MOST_EXPANDED * size + _FREE_BYTES
    while piece := read(left + 1):
        left -= len(piece)
        if left < 0:
            raise ValueError(f"it holds more than {_MOST_EXPANDED} times its own size")
        yield piece
