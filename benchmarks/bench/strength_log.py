"""What a run over strengths writes down as it goes, and finds again when it was killed.

    trials.jsonl       the loss on general text at each strength that was tried
    strengths.jsonl    the scores at each strength that is reported

Both are lines with a `strength`. A strength that is there is not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from errata.benchmarks.runs.json_values import number
from errata.benchmarks.runs.run_folder import RunFolder
from errata.benchmarks.runs.stopping import Stop
from errata.evaluate.general_text import LossRise

TRIALS, STRENGTHS = "trials.jsonl", "strengths.jsonl"


class StrengthLog:
    """The strengths of one run.

    Args:
        folder: The run's folder, opened.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._found = {name: _by_strength(folder, name) for name in (TRIALS, STRENGTHS)}

    def trial(self, strength: float, measure: Callable[[], Mapping[str, Any]], stop: Stop) -> dict[str, Any]:
        """Return the loss at a strength, measured once."""
        return self._kept(TRIALS, strength, measure, stop)

    def point(self, strength: float, score: Callable[[], Mapping[str, Any]], stop: Stop) -> dict[str, Any]:
        """Return the scores at a strength, measured once."""
        return self._kept(STRENGTHS, strength, score, stop)

    def _kept(self, name: str, strength: float, make: Callable[[], Mapping[str, Any]], stop: Stop) -> dict[str, Any]:
        found = self._found[name]
        if strength not in found:
            stop.check()
            self._folder.append(name, {"strength": strength, **make()})
            # Read back, so that a run that goes on and one that was never stopped have the same values.
            self._found[name] = found = _by_strength(self._folder, name)
            stop.advanced()
        return found[strength]


def written_rise(trial: Mapping[str, Any]) -> LossRise | None:
    """Return the rise that a trial has written down; None where there was none to measure."""
    said = trial["rise"]
    if said is None:
        return None
    # Numbers that JSON lacks are written as texts.
    loss, untouched, value, error = (number(said[name]) for name in ("loss", "untouched", "value", "error"))
    return LossRise(loss, untouched, value, error, said["tokens"], said["rows"])


def _by_strength(folder: RunFolder, name: str) -> dict[float, dict[str, Any]]:
    return {record["strength"]: record for record in folder.records(name, _no_strength)}


def _no_strength(record: Mapping[str, Any]) -> str | None:
    return None if isinstance(record.get("strength"), int | float) else "does not say at which strength it was measured"
