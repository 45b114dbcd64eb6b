"""The folder of a run that several processes carry out together (editors/core/ranks.py).

Only the first rank writes into the run's folder. Each of the others works in a copy of it, made before the run goes on
and removed in the end. So all ranks start from the same state, and all else that knows of folders knows of no ranks.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errata.benchmarks.runs.run_folder import LOCK, RunFolder
from errata.editors.core import ranks


@contextmanager
def opened(folder: RunFolder, patience: float) -> Iterator[RunFolder]:
    """Context manager that holds the folder in which this rank works; with one rank, the folder itself.

    Args:
        folder: The run's, on a disk that all ranks see.
        patience: See `RunFolder.opened`.

    Raises:
        ConfigError: See `RunFolder.opened`.
    """
    if ranks.rank() == 0:
        with folder.opened(patience) as held:
            held.set_aside_damaged()
            ranks.wait()  # the others copy it
            ranks.wait()
            yield held
            ranks.wait()  # the first has written everything
        return
    ranks.wait()
    with tempfile.TemporaryDirectory(prefix="errata-rank-") as scratch:
        copy = Path(scratch) / folder.path.name
        shutil.copytree(folder.path, copy, ignore=shutil.ignore_patterns(f"{LOCK}*"))
        ranks.wait()
        with RunFolder(copy, folder.key, folder.data).opened(patience) as held:
            yield held
            ranks.wait()
