"""`python tests/support/coverage_by_room.py coverage.json`: the share of lines that the tests ran, per room.

The file is what `pytest --cov=errata --cov-report=json:coverage.json` writes; `make coverage` does both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path


def rows(report: dict[str, dict[str, dict[str, dict[str, int]]]]) -> Iterator[tuple[str, int, int]]:
    """Yield every folder with its lines that ran and its lines, and the whole library last."""
    counted: dict[str, tuple[int, int]] = {}
    for path, said in report["files"].items():
        lines = said["summary"]
        for folder in (f"{Path(path).parent.as_posix().removeprefix('src/')}/", "all"):
            ran, there = counted.get(folder, (0, 0))
            counted[folder] = (ran + lines["covered_lines"], there + lines["num_statements"])
    last = counted.pop("all", (0, 0))
    yield from ((folder, *counted[folder]) for folder in sorted(counted))
    yield ("all", *last)


def main(path: str) -> None:
    for folder, ran, lines in rows(json.loads(Path(path).read_text(encoding="utf-8"))):
        sys.stdout.write(f"{folder:<28}{ran:>7} of {lines:>6} lines{100 * ran / max(1, lines):>8.1f} %\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
