"""The time that edits take, apart from costs that come once for a model: moments, contexts, factorisations.

clock = WorkClock()
with clock.one_off("moments"):
    ...                          # counted by its name, and not as work on an edit
clock()                          # seconds of work, for differences
clock.lap()                      # what has been spent since the last lap

`clock.watch` is called with the name of each one-off cost and each phase, and its context is held meanwhile. A run of
the bench measures memory in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

ONE_OFF = ("contexts", "moments", "factors")
"""Costs that come once for a model: texts before a prompt, second moments, and their factors or projectors."""
OF_SINGLE_METHODS = ("anchor", "background", "references")
"""Such costs of single methods: values of other facts (NAS), MEMOIR's background, COAR-Edit's references."""


@dataclass(frozen=True)
class Lap:
    """What was spent between two laps.

    Attributes:
        cpu_seconds: CPU time of all threads of the process, one-off costs left out.
        one_off: Wall time in seconds of the one-off costs, by name.
    """

    cpu_seconds: float
    one_off: Mapping[str, float]


class WorkClock:
    """A clock that stands still during one-off costs."""

    def __init__(self) -> None:
        self._apart, self._cpu_apart = 0.0, 0.0
        self._one_off: dict[str, float] = {}
        self._last_cpu = self._cpu()
        self._depth = 0
        self.watch: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext()

    def __call__(self) -> float:
        """Return seconds of wall time, one-off costs left out."""
        return time.perf_counter() - self._apart

    def _cpu(self) -> float:
        return time.process_time() - self._cpu_apart

    @contextmanager
    def one_off(self, name: str) -> Iterator[None]:
        """Count the body as a one-off cost of this name; a cost inside another one belongs to that one."""
        started, cpu = time.perf_counter(), time.process_time()
        self._depth += 1
        try:
            with self.watch(name):
                yield
        finally:
            self._depth -= 1
            if not self._depth:
                spent = time.perf_counter() - started
                self._apart += spent
                self._cpu_apart += time.process_time() - cpu
                self._one_off[name] = self._one_off.get(name, 0.0) + spent

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name a part of the work for `watch`; it counts as work."""
        with self.watch(name):
            yield

    def start(self) -> None:
        """Begin the first lap, without what has been spent before; one-off costs stay in it."""
        self._last_cpu = self._cpu()

    def lap(self) -> Lap:
        """Return what has been spent since the last lap or `start`."""
        now = self._cpu()
        found = Lap(now - self._last_cpu, self._one_off)
        self._last_cpu, self._one_off = now, {}
        return found
