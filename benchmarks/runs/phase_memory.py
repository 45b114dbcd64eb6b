"""The most memory that each phase of a run has in use: loading, the untouched model, edits, evaluation.

memory = PhaseMemory()
with memory.phase("edits"):
    ...
    with memory.phase("moments"):       # counted by its own name, and not as one of the edits
        ...
memory.peaks                            # {"edits": bytes, "moments": bytes}

A phase's peak holds what was there before it too, such as the model's weights. On a GPU it counts the bytes of tensors,
on Linux without one the resident bytes of the process. Other systems tell no peak of a part of a process's life.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from errata.benchmarks.runs import environment


class PhaseMemory:
    """The peaks of one process.

    Attributes:
        peaks: Bytes by the name of the phase.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._open: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context manager around a phase; one inside another interrupts it."""
        self._note()
        self._open.append(name)
        try:
            yield
        finally:
            self._note()
            self._open.pop()

    def _note(self) -> None:
        """Note the peak of the innermost phase so far, and begin a new one."""
        peak = environment.take_peak_memory()
        if peak is not None and self._open:
            name = self._open[-1]
            self.peaks[name] = max(peak, self.peaks.get(name, 0))
