"""Reading and writing the plain files of a testbed's folder. Equal contents give equal bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).with_name("model")
"""The folder of the testbed that comes with the package."""


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path) -> Any:
    """The JSON value of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a JSON value."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def write_lines(path: Path, texts: Iterable[str]) -> None:
    """Write `{"text": ...}` lines, compressed without a time stamp."""
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode(), mtime=0))


def read_lines(path: Path) -> list[str]:
    """The texts of a file written by `write_lines`."""
    return [json.loads(line)["text"] for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
