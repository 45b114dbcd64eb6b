"""Files of JSON lines that only grow, in which damage to any byte is noticed.

    append(path, {"case": "12", "nll": 0.5})    # {"case": "12", "nll": 0.5, "digest": "0f3a..."}
    recovered(path)                             # the records up to the first damaged line

A line is on the disk when `append` returns. Each ends in the first 16 digits of the SHA-256 of what stands before; a
last line without its end is what a kill leaves, and no damage.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.editors.core.files.atomic import append as append_bytes
from errata.editors.core.files.atomic import set_aside, truncate, write_atomically

logger = logging.getLogger(__name__)

DIGEST = "digest"
_DIGITS = 16
_TAIL = len(f', "{DIGEST}": ""}}') + _DIGITS


@dataclass(frozen=True)
class ReadLines:
    """What a file holds.

    Attributes:
        records: Those of the whole lines before the first damaged one, without their digests.
        ends: Where each of them ends, in bytes.
        damage: What is wrong with the line behind them; None where nothing is.
    """

    records: list[dict[str, Any]]
    ends: list[int]
    damage: str | None


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one record.

    Raises:
        OSError: it could not be written; the file is as it was.
        TypeError, ValueError: JSON cannot hold it.
    """
    append_bytes(path, render(record))


def render(record: Mapping[str, Any]) -> bytes:
    """The line of a record, which must not be empty."""
    if not record or DIGEST in record:
        raise ValueError(f"expected a record that is not empty and has no field {DIGEST!r} of its own")
    body = json.dumps(dict(record), allow_nan=False)[:-1].encode("ascii")
    return body + f', "{DIGEST}": "{_digest(body)}"}}\n'.encode("ascii")


def parse(line: bytes) -> dict[str, Any]:
    """The record of a line, with or without the line's end.

    Raises:
        ValueError: not what `render` wrote.
    """
    line = line.removesuffix(b"\n")
    body = line[:-_TAIL]
    if line[-_TAIL:] != f', "{DIGEST}": "{_digest(body)}"}}'.encode("ascii"):
        raise ValueError("is not as it was written")
    return json.loads(body + b"}")


def read(path: Path) -> ReadLines:
    """What there is in a file; nothing where there is no file."""
    found = ReadLines([], [], None)
    if not path.exists():
        return found
    content, start = path.read_bytes(), 0
    while (end := content.find(b"\n", start) + 1) > 0:
        try:
            found.records.append(parse(content[start:end]))
        except ValueError as error:
            return ReadLines(found.records, found.ends, f"line {len(found.ends) + 1} {error}")
        found.ends.append(end)
        start = end
    return found


def recover(path: Path) -> list[dict[str, Any]]:
    """The records of a file, which is afterwards fit to be appended to.

    A torn last line is cut off. From a damaged line on nothing is kept: the file is set aside as *.damaged, with a
    warning, and what stood before goes into a new one.
    """
    found = read(path)
    if found.damage is not None:
        cut(path, found, len(found.records), found.damage)
    elif path.exists():
        truncate(path, found.ends[-1] if found.ends else 0)
    return found.records


def cut(path: Path, found: ReadLines, keep: int, reason: str) -> None:
    """Set a damaged file aside, with a warning, and put its first `keep` lines into a new one."""
    good = path.read_bytes()[: found.ends[keep - 1] if keep else 0]
    aside = set_aside(path)
    write_atomically(path, good)
    logger.warning("%s: %s; it is set aside as %s, and what is lost is computed again", path, reason, aside.name)


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:_DIGITS]
