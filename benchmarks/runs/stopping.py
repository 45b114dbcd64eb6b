"""A clean stop: a run that is told to stop leaves the search at hand and ends behind the last edit written down.

    stop = Stop()
    stop.limit(minutes=55)
    with stop.on_sigterm():                # a second SIGTERM ends at once
        bench.run(config, stop=stop)       # raises Stopped between two edits

    stop.request("preempted")              # from anywhere: a thread, a signal handler, a launcher's checkpoint()

Nothing depends on it: a run that is killed goes on as well, behind the last edit that it wrote down.

A limit counts from where its Stop is made, and is heeded once the start has written a step down: an edit, or a part of
an evaluation. However short it is, every start gets further than the one before, and the run comes to its end.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """A run was told to stop and has; the same command goes on with it. Not an ErrataError: nothing is wrong."""


class Stop:
    """Whether to stop, and why. Its clock starts when it is made."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._started = time.monotonic()
        self._minutes = math.inf
        self._has_advanced = False

    def request(self, reason: str) -> None:
        """Ask to stop. Does nothing but take a note, so that a signal handler may call it."""
        self._reason = reason

    def limit(self, minutes: float | None) -> None:
        """Stop after this number of minutes, but not before the first step; None sets no limit."""
        self._minutes = math.inf if minutes is None else minutes

    def advanced(self) -> None:
        """Call it behind every step that the next start need not take again."""
        self._has_advanced = True

    def check_request(self) -> None:
        """Call it inside of a step, which is lost if the run is left there: a time limit lets the step be finished.

        Raises:
            Stopped: with the reason of a request.
        """
        if self._reason is not None:
            raise Stopped(self._reason)

    def check(self) -> None:
        """Call it where a run can be left.

        Raises:
            Stopped: with the reason.
        """
        if self._reason is None and self._has_advanced and self._is_over():
            self._reason = f"its time limit of {self._minutes:g} minutes is over"
        self.check_request()

    def _is_over(self) -> bool:
        return time.monotonic() - self._started > 60 * self._minutes

    @contextmanager
    def on_sigterm(self, told: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Take SIGTERM as a request, and the second as it was taken before. Only in the main thread, and where nothing
        else has a handler for it: a launcher's own is left alone.

        Args:
            told: Called when the request comes, for a line to the user.
        """

        def noted(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as handlers are called
            self.request("SIGTERM")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            told()

        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        signal.signal(signal.SIGTERM, noted)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
