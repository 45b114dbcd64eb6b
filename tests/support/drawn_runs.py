"""Pictures and tables of runs in tests whose runs leave them out (the fixture `_nothing_drawn`)."""

from __future__ import annotations

from errata.benchmarks import bench
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.reports.report import read, write
from errata.benchmarks.runs.run_folder import RECORDS


def draw(settings: BenchConfig) -> None:
    """Write what a finished run shows of itself into its folder."""
    with bench.prepare(settings).folder.opened() as folder:
        write(folder, read(folder.path), folder.records(RECORDS))
