"""Datasets, the testbed, runs of the bench, and reports of them.

from errata.benchmarks import bench, counterfact, easyedit, world, zsre
world.cases()                           # the bundled testbed's cases
counterfact.load("counterfact.json")    # the cases of a file in the original format
bench.run(bench.BenchConfig.of(values)) # one run; returns its folder
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.benchmarks import bench
    from errata.benchmarks.datasets import counterfact, easyedit, world, zsre

__all__ = ("bench", "counterfact", "easyedit", "world", "zsre")

_DATASETS = ("counterfact", "easyedit", "world", "zsre")


def __getattr__(name: str) -> object:
    if name in _DATASETS:
        return import_module(f"errata.benchmarks.datasets.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}")
