"""A run of `errata bench`: from its configuration to its results.

from errata.benchmarks import bench
folder = bench.run(bench.BenchConfig.of(values))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.benchmarks.bench.config import BenchConfig
    from errata.benchmarks.bench.execution import carry_out, run
    from errata.benchmarks.bench.preparation import PreparedRun, prepare

__all__ = ("BenchConfig", "PreparedRun", "carry_out", "prepare", "run")

_HOME = (
    ("BenchConfig", "config"),
    ("PreparedRun", "preparation"),
    ("carry_out", "execution"),
    ("prepare", "preparation"),
    ("run", "execution"),
)


def __getattr__(name: str) -> object:
    for public, module in _HOME:
        if name == public:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}")
