"""Whether there is room for the edits of methods whose updates are whole matrices, asked before the first is made.

A sequence keeps every edit, in memory for undoing it and on disk for going on. Single edits are kept as long as their
group is scored. FT-M on a model of Llama-3-8B's size keeps 235 MB per edit (one map of 4,096 x 14,336 in float32).
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.edit_protocol import is_sequence
from errata.benchmarks.runs import environment
from errata.benchmarks.runs.results import AT_ONCE
from errata.editors.core.errors import ConfigError, StorageWarning

# A run warns of what its edits will keep from this many bytes on.
_SAID_FROM = 2**30


def check_room(bench: Bench, folder: Path) -> None:
    """Say how much the edits of a run will keep, where that is much and known.

    Args:
        bench: The run, before its first edit.
        folder: Where a sequence writes its edits.

    Raises:
        ConfigError: Memory or disk has not as much left.
    """
    each = bench.editor.patch_bytes()
    if each is None:
        return
    config, edits = bench.config, len(bench.cases)
    is_kept = is_sequence(config.protocol.name)
    size = edits if config.protocol.name in AT_ONCE else config.batch_size
    count = -(-edits // size) if is_kept else min(size, edits)
    total = count * each
    said = f"{bench.editor.name} keeps whole matrices, {_size(each)} per patch; {count} at a time are {_size(total)}"
    advice = "give another batch_size, fewer n_edits, or a method with small updates, such as lora or memit"
    left = {"memory": environment.free_memory(bench.model)}
    if is_kept:
        written = 0 if bench.log is None else bench.log.nbytes
        left["disk"] = shutil.disk_usage(folder).free + written
    for place, free in left.items():
        if free is not None and total > free:
            raise ConfigError(f"{said}, and the {place} has {_size(free)} left; {advice}")
    if total >= _SAID_FROM:
        warnings.warn(said, StorageWarning, stacklevel=2)


def _size(count: int) -> str:
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.1f} {name}"
