"""Commands of sweeps, and runs that are at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from errata.benchmarks.runs import run_status
from errata.benchmarks.runs.run_folder import RunFolder


@contextmanager
def at_work(folder: RunFolder, *, edits: int = 4) -> Iterator[None]:
    """A run, as `bench.carry_out` marks it."""
    with folder.opened(), run_status.marked(folder, command="errata bench x", names={}, edits=edits):
        yield
