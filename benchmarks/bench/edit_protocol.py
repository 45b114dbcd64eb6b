"""Protocols of other packages: how edits follow each other, registered by entry points of `errata.protocols`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from errata.benchmarks.runs.results import SEQUENCES
from errata.editors.core.extensions import ExtensionPoint

# Takes Bench, Baseline, ids and Write. Their files stand above this one, which the configuration needs.
Run = Callable[[Any, Any, Collection[str], Any], None]
NAMES = ("single", *SEQUENCES)


@dataclass(frozen=True)
class EditProtocol:
    """A protocol of another package.

    Attributes:
        run: Makes and scores the edits of a bench. Its arguments are the `Bench`, the `Baseline` of the untouched
            model, the ids of the cases that an interrupted run has recorded, and `write`, which takes each new record
            with its seconds. `single` and `sequential` of errata.benchmarks.bench.protocols are two such functions.
        is_sequence: Whether the edits are on the model together. Then no prompt is edited twice, probes that mention
            another edit's subject are left out, and the run keeps the log of a sequence.
    """

    run: Run
    is_sequence: bool = False


ADDED = ExtensionPoint(
    "errata.protocols",
    "protocol",
    "an EditProtocol",
    lambda loaded: isinstance(loaded, EditProtocol),
    own=NAMES,
)


def is_sequence(name: str) -> bool:
    """Return whether the edits of a protocol follow each other on one model.

    Raises:
        ConfigError: There is no such protocol, or another package's cannot be imported.
    """
    return name in SEQUENCES or (name not in NAMES and ADDED.load(name).is_sequence)
