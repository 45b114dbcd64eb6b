"""A long evaluation in parts: each is written down when it is done, and not done again by a run that goes on.

    parts = PartialResults(folder, stop, edits=4000)
    perplexity = parts.kept(partial(measure, model))       # from the file, or measured now and written down
    for group in groups:
        answers = parts.kept(partial(ask, group))          # in the same order every time

    parts.jsonl     {"edits", "value", "seconds"}, one line per part of the evaluation after `edits` edits

The parts of one evaluation are there until the next begins, or the run is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from errata.benchmarks.runs.json_values import encodable
from errata.benchmarks.runs.run_folder import RunFolder
from errata.benchmarks.runs.stopping import Stop

PARTS = "parts.jsonl"


class PartialResults:
    """The parts of one evaluation.

    Args:
        folder: The run's, held.
        stop: Asked before every part that has to be done.
        edits: How many the model carries; 0 is the untouched one. A text names another evaluation.
    """

    def __init__(self, folder: RunFolder, stop: Stop, edits: int | str) -> None:
        self._folder, self._stop, self._edits = folder, stop, edits
        found = folder.records(PARTS)
        if any(part["edits"] != edits for part in found):
            forget(folder)
            found = []
        self._done = iter(found)
        self.seconds = sum(part["seconds"] for part in found)

    def kept(self, make: Callable[[], Any]) -> Any:
        """The next part as plain values: as an earlier start has written it down, or as `make` makes it now.

        Raises:
            Stopped: before it is made.
        """
        part = next(self._done, None)
        if part is None:
            self._stop.check()
            started = time.perf_counter()
            part = {"edits": self._edits, "value": encodable(make()), "seconds": time.perf_counter() - started}
            self._folder.append(PARTS, part)
            self._stop.advanced()
            self.seconds += part["seconds"]
        return part["value"]


def forget(folder: RunFolder) -> None:
    """Remove what was written of parts."""
    folder.remove(PARTS)
