"""What results.json holds of a run over strengths: its points, and the strength that each league admits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from errata.benchmarks.bench.preparation import PreparedRun
from errata.benchmarks.bench.strength_log import STRENGTHS, TRIALS, written_rise
from errata.benchmarks.runs.json_values import number
from errata.evaluate.strengths import strongest


def strength_results(prepared: PreparedRun) -> dict[str, Any]:
    """Return {"dial": ...} or {"league": ...}; nothing of other protocols."""
    name, folder = prepared.config.protocol.name, prepared.folder
    if name not in ("dial", "league"):
        return {}
    trials = {record["strength"]: record for record in folder.records(TRIALS)}
    points = {record["strength"]: record for record in folder.records(STRENGTHS)}
    fixed = next((record["fixed"] for record in trials.values()), None)
    measured = next((record["rise"] for record in trials.values() if record["rise"] is not None), None)
    said = {"fixed": fixed, "text": None if measured is None else {key: measured[key] for key in ("tokens", "rows")}}
    if name == "dial":
        return {"dial": {**said, "points": [points[strength] for strength in sorted(points)]}}
    config = prepared.config.league
    steps = config.steps if fixed is None else 1
    entries = []
    for cap in config.caps:
        found = strongest(lambda strength: written_rise(trials[strength]), cap, steps=steps, margin=config.margin)
        entries.append({"cap": cap, **points[found]})
    if prepared.loaded.canonical is not None:
        said["canonical"] = {"untouched": points[0.0]["canonical"], "full": points[1.0].get("canonical")}
    return {
        "league": {
            **said,
            "steps": steps,
            "margin": config.margin,
            "entries": entries,
            "trials": [trials[c] for c in sorted(trials)],
        }
    }


def strength_warnings(found: Mapping[str, Any]) -> list[str]:
    """Return what a reader has to know of the strengths in a results.json."""
    said = found.get("dial") or found.get("league")
    if said is None:
        return []
    warnings = []
    if said["fixed"] is not None:
        warnings.append(f"the edit has no strengths between 0 and 1: {said['fixed']}")
    for entry in found.get("league", {}).get("entries", ()):
        error = number(entry["rise"]["error"])
        if not error < entry["cap"]:
            warnings.append(
                f"league {entry['cap']:g}: at strength {entry['strength']:g} the rise has a standard error of "
                f"{error:.1g}, which is not below the cap; give more text (collapse.n_texts, league.tokens)"
            )
    return [*warnings, *_not_monotone(found.get("league", {}).get("trials", ()))]


def _not_monotone(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say where a larger strength does clearly less damage than a smaller one, so that halving may have missed it."""
    known = [(trial["strength"], written_rise(trial)) for trial in trials]
    rises = [(strength, rise) for strength, rise in known if rise is not None and math.isfinite(rise.value)]
    for (low, less), (high, more) in itertools.pairwise(rises):
        if more.value < less.value - 2 * math.hypot(less.error, more.error):
            return [f"the loss falls from strength {low:g} to {high:g}: a larger strength may be admitted, too"]
    return []
