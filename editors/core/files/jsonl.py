"""Append-only files of JSON lines, each with a digest, so that a change of any byte is noticed.

    append(path, {"case": "12", "nll": 0.5})    # {"case": "12", "nll": 0.5, "digest": "0f3a..."}
    recover(path)                               # the records before the first damaged line

A line is on the disk when `append` returns. It ends with the first 16 digits of the SHA-256 of the text before. A last
line without a line break is not damage: a kill during `append` leaves it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.editors.core.files.atomic import FileEnd, set_aside, truncate, write_atomically
from errata.editors.core.files.atomic import append as append_bytes
from errata.editors.core.files.plain_files import parse_json, read_bytes

logger = logging.getLogger(__name__)

DIGEST = "digest"
_DIGITS = 16
_TAIL = len(f', "{DIGEST}": ""}}') + _DIGITS


@dataclass(frozen=True)
class ReadLines:
    """The content of a file.

    Attributes:
        records: The records before the first damaged line, without their digests.
        ends: The offset in bytes at which each of these lines ends.
        damage: What is wrong with the next line; None if the file is not damaged.
    """

    records: list[dict[str, Any]]
    ends: list[int]
    damage: str | None


def append(path: Path, record: Mapping[str, Any], left: FileEnd | None = None) -> FileEnd:
    """Append one record to a file that this process left as `left` says, and return its end now.

    Raises:
        OtherWriterError: Another process has written to the file.
        OSError: It could not be written; the file is as it was.
        TypeError, ValueError: JSON cannot hold it.
    """
    return append_bytes(path, render(record), left)


def render(record: Mapping[str, Any]) -> bytes:
    """Return the line of a record, which must not be empty."""
    if not record or DIGEST in record:
        raise ValueError(f"expected a record that is not empty and has no field {DIGEST!r}, got {dict(record)!r}")
    # Without the closing brace: the digest becomes the last field, and covers all text before it.
    body = json.dumps(dict(record), allow_nan=False)[:-1].encode("ascii")
    return body + f', "{DIGEST}": "{_digest(body)}"}}\n'.encode("ascii")


def parse(line: bytes) -> dict[str, Any]:
    """Return the record of a line, with or without its line break.

    Raises:
        ValueError: `render` did not write this line.
    """
    line = line.removesuffix(b"\n")
    body = line[:-_TAIL]
    if line[-_TAIL:] != f', "{DIGEST}": "{_digest(body)}"}}'.encode("ascii"):
        raise ValueError("is not as it was written")
    return parse_json(body + b"}")


def read(path: Path) -> ReadLines:
    """Read a file; one that does not exist counts as empty.

    Raises:
        OSError: It cannot be read, or it is a pipe or a device.
    """
    lines = ReadLines([], [], None)
    if not path.exists():
        return lines
    content, start = read_bytes(path), 0
    while (end := content.find(b"\n", start) + 1) > 0:
        try:
            lines.records.append(parse(content[start:end]))
        except ValueError as error:
            return ReadLines(lines.records, lines.ends, f"line {len(lines.ends) + 1} {error}")
        lines.ends.append(end)
        start = end
    return lines


def recover(path: Path, fault: Callable[[Mapping[str, Any]], str | None] | None = None) -> list[dict[str, Any]]:
    """Return the records of a file, and repair the file so that it can be appended to.

    An incomplete last line is cut off. A damaged file is renamed to *.damaged with a warning, and the lines before the
    damage are written to a new file.

    Args:
        path: The file.
        fault: Called with every record in order; says what is wrong with one that does not belong here, which then
            counts as damaged.
    """
    lines = read(path)
    keep, reason = len(lines.records), lines.damage
    for index, record in enumerate(lines.records if fault else ()):
        if fault is not None and (found := fault(record)) is not None:
            keep, reason = index, f"line {index + 1} {found}"
            break
    if reason is not None:
        cut(path, lines, keep, reason)
    elif path.exists():
        truncate(path, lines.ends[-1] if lines.ends else 0)
    return lines.records[:keep]


def cut(path: Path, lines: ReadLines, keep: int, reason: str) -> None:
    """Rename a damaged file to *.damaged with a warning, and write its first `keep` lines to a new file."""
    good = path.read_bytes()[: lines.ends[keep - 1] if keep else 0]
    aside = set_aside(path)
    write_atomically(path, good)
    logger.warning("%s: %s; it is set aside as %s, and what is lost is computed again", path, reason, aside.name)


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:_DIGITS]
