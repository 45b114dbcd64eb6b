"""What results.json holds of a run of `protocol=compose`: its order, its steps, and the bits at the end."""

from __future__ import annotations

from typing import Any

from errata.benchmarks.bench.composition_log import END, GUARD, STEPS, UNTOUCHED
from errata.benchmarks.bench.preparation import PreparedRun


def composition_results(prepared: PreparedRun) -> dict[str, Any]:
    """Return {"composition": ...}; nothing of other protocols."""
    config = prepared.config
    if config.protocol.name != "compose":
        return {}
    found = {record["step"]: record for record in prepared.folder.records(STEPS)}
    between = {step: measured for step, measured in found.items() if step not in (UNTOUCHED, END, GUARD)}
    both = {step: found[step].get("forgetting") for step in (UNTOUCHED, END)}
    forgetting = {step: said for step, said in both.items() if said}
    return {
        "composition": {
            "order": config.compose.order,
            "end": config.compose.end,
            "compress": dict(config.compose.compress),
            "unlearn": dict(config.compose.unlearn),
            "steps": between,
            "average_bits": found[END]["average_bits"],
            **({"forgetting": forgetting} if forgetting else {}),
        }
    }
