"""How edits follow each other, and what is recorded of each.

A protocol takes a `Bench` (what is edited and asked), the `Baseline` (what the untouched model says) and the cases that
an earlier, interrupted run has recorded; it hands every new record to `write` as soon as it is complete.

    single      every edit by itself on the untouched model, scored, undone (single_edits.py)
    sequential  edits on top of each other, in batches; all edits so far are scored at checkpoints (sequences.py)
    batch       all edits at once, scored
    dial        all edits at once, scored at many strengths (strengths.py)
    league      all edits at once, scored at the largest strength whose damage is below a cap
    compose     all edits at once, before or behind a compression or an unlearning (composition.py)

Another package adds a protocol as an `EditProtocol` (edit_protocol.py).

Records depend on nothing but the configuration: batches are cut by the index of a case, so that a resumed run computes
the same batches as one that was never killed. Seconds are written separately, since they never repeat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from errata.benchmarks.bench.composition import compose
from errata.benchmarks.bench.edit_protocol import ADDED
from errata.benchmarks.bench.sequences import batch, sequential
from errata.benchmarks.bench.single_edits import single
from errata.benchmarks.bench.strengths import dial, league
from errata.evaluate.probes import Case

if TYPE_CHECKING:
    from errata.benchmarks.bench.edit_protocol import Run


PROTOCOLS: Mapping[str, Run] = MappingProxyType(
    {"single": single, "sequential": sequential, "batch": batch, "dial": dial, "league": league, "compose": compose}
)


def protocol(name: str) -> Run:
    """Return the function that carries out a protocol of this package or of another.

    Raises:
        ConfigError: There is no such protocol (it names the nearest), or another package's cannot be imported.
    """
    return PROTOCOLS[name] if name in PROTOCOLS else ADDED.load(name).run


def order_of_edits(name: str, cases: Sequence[Case], records: Sequence[Mapping[str, Any]]) -> Sequence[Case]:
    """Return the cases in the order of their edits. Another package's protocol may edit them in any order.

    Args:
        name: The protocol.
        cases: In the order of the dataset.
        records: Of the edits that were made.
    """
    if name in PROTOCOLS:
        return cases
    made = {record["case"] for record in records}
    return sorted(cases, key=lambda case: case.id not in made)
