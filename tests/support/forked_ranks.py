"""Two ranks of one run as forks of the process that runs the tests."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import ForkedProcess

from errata.editors.core import ranks

COUNT = 2


def in_ranks(base: Path, work: Callable[[int], Any]) -> list[Any]:
    """Return what each rank makes of its number; a rank that fails gives its exit code instead, as an int."""
    base.mkdir()

    def start(number: int) -> Callable[[], None]:
        def join() -> None:
            with ranks.joined(f"file://{base}/group", number, COUNT):
                found = work(number)
                (base / f"{number}.pkl").write_bytes(pickle.dumps(found))

        return join

    begun = [ForkedProcess(start(number), base / str(number)) for number in range(COUNT)]
    codes = [process.wait() for process in begun]
    return [
        pickle.loads((base / f"{number}.pkl").read_bytes()) if code == 0 else code for number, code in enumerate(codes)
    ]
