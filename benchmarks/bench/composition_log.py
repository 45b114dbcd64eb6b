"""What a run of `protocol=compose` writes down as it goes, and finds again when it was killed.

    steps.jsonl    what the model is after each step, one line per step: {"step", ...}

A step that is there is not measured again. The steps themselves are done again: the same text gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from errata.benchmarks.runs.json_values import encodable
from errata.benchmarks.runs.run_folder import RunFolder
from errata.benchmarks.runs.stopping import Stop

STEPS = "steps.jsonl"
UNTOUCHED, END, GUARD = "untouched", "end", "guard"  # lines that are no step between


class StepLog:
    """The steps of one run.

    Args:
        folder: The run's folder, opened.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def kept(self, step: str, make: Callable[[], Mapping[str, Any]], stop: Stop) -> dict[str, Any]:
        """Return what was measured behind a step, measured once.

        Raises:
            Stopped: Before it is measured.
        """
        found = self._read()
        if step not in found:
            stop.check()
            self._folder.append(STEPS, {"step": step, **encodable(make())})
            # Read back, so that a run that goes on and one that was never stopped have the same values.
            found = self._read()
            stop.advanced()
        return found[step]

    def _read(self) -> dict[str, dict[str, Any]]:
        return {record["step"]: record for record in self._folder.records(STEPS, _no_step)}


def _no_step(record: Mapping[str, Any]) -> str | None:
    return None if isinstance(record.get("step"), str) else "does not say behind which step it was measured"
