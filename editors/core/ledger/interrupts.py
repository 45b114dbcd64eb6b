"""Ctrl-C that waits: a model is changed completely or not at all, whenever the user loses patience.

    with deferred_interrupts():
        for row in rows:
            safe_point()          # raises KeyboardInterrupt here, if one is waiting
            ...
        install(everything)       # no safe point inside: nothing can tear this apart

    with reversible(lambda: apply_to(model), lambda _: take_off(model)):
        ...                       # Ctrl-C is prompt here, and `take_off` runs whatever happens

Why handlers and not `try/finally`: a KeyboardInterrupt is raised between any two bytecodes, also inside a `finally`
and inside the `__enter__` and `__exit__` of a context manager, where no clause of ours would catch it. While one of
these blocks is open, SIGINT only makes a note; the interrupt is raised where the model is consistent. Python delivers
signals to the main thread, so that everywhere else, and where SIGINT does not lead to a Python handler, both blocks
defer nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class _Waiting:
    """The SIGINT handler of an open block: delivers at once while nobody holds it, and otherwise takes a note."""

    def __init__(self, previous: Callable[[int, FrameType | None], object]) -> None:
        self.previous = previous
        self.holds = 0
        self.shields = 0  # held, and without safe points
        self.pending = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # A hold is taken by the first line of `__exit__`; before that line, the stack itself says where we are.
        if self.holds > 0 or _on_an_edge(frame):
            self.pending = True
        else:
            self.previous(number, frame)

    def deliver(self) -> None:
        """Hand a waiting interrupt to whoever would have had it."""
        if self.pending:
            self.pending = False
            self.previous(signal.SIGINT, None)


class _Block:
    """An open block's share of the handler: installs it if it is the outermost, and holds it while it must."""

    def __init__(self) -> None:
        self.handler: _Waiting | None = None
        self.installer = False

    def open(self) -> None:
        """Install or join the handler, and hold it. A signal before the installation is raised from here."""
        if threading.current_thread() is not threading.main_thread():
            return
        current = signal.getsignal(signal.SIGINT)
        if isinstance(current, _Waiting):
            self.handler = current
            current.holds += 1
        elif callable(current):
            # All fields first: `signal.signal` itself raises what came before it, and takes effect after that.
            handler = _Waiting(current)
            handler.holds = 1
            self.handler, self.installer = handler, True
            signal.signal(signal.SIGINT, handler)

    def close(self) -> None:
        """Let go, restore the former handler if this block installed ours, and deliver what waited."""
        handler = self.handler
        if handler is None:
            return
        if self.installer:
            # Still held: a signal up to the very exchange is noted, one after it meets the former handler.
            signal.signal(signal.SIGINT, handler.previous)
        handler.holds -= 1
        if handler.holds == 0:
            handler.deliver()


class deferred_interrupts:  # noqa: N801 - used as a function: `with deferred_interrupts():`
    """Context manager: SIGINT waits until a `safe_point`, or until the outermost of these blocks is left.

    Re-entrant. On leaving, the former handler is back before the waiting interrupt is handed to it, so that a handler
    of the user's own gets it as if nothing had been deferred.
    """

    def __init__(self) -> None:
        self._block = _Block()

    def __enter__(self) -> None:
        self._block.open()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._block.close()


def safe_point() -> None:
    """Raise KeyboardInterrupt if one waits: call it where the model is consistent, as between steps of a search.

    Does nothing outside `deferred_interrupts`, outside the main thread, and while `reversible` undoes.
    """
    if threading.current_thread() is threading.main_thread():
        current = signal.getsignal(signal.SIGINT)
        if isinstance(current, _Waiting) and not current.shields:
            current.deliver()


class reversible(Generic[T]):  # noqa: N801 - used as a function: `with reversible(do, undo):`
    """Context manager: `do()` on entry, `undo(its result)` on leaving, whatever happens and however often.

    Neither can be interrupted, nor can an interrupt slip between them and the block; in the block it is prompt.
    A generator with `try/finally` cannot promise that: an interrupt between its `yield` and the block is lost on it.
    """

    def __init__(self, do: Callable[[], T], undo: Callable[[T], object]) -> None:
        self._do, self._undo = do, undo
        self._block = _Block()

    def __enter__(self) -> T:
        self._block.open()
        handler = self._block.handler
        try:
            value = self._value = self._do()
        except BaseException:
            self._block.close()
            raise
        if handler is not None:
            if handler.holds == 1 and handler.pending:
                self._deliver_before_the_block(handler)
            # The last step is a plain store: CPython looks for signals at calls and jumps, so that its next look is
            # inside the block.
            handler.holds -= 1
        return value

    def _deliver_before_the_block(self, handler: _Waiting) -> None:
        try:
            handler.deliver()
        except BaseException:
            self._finish()
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._block.handler is not None:
            self._block.handler.holds += 1
        self._finish()

    def _finish(self) -> None:
        handler = self._block.handler
        if handler is not None:
            handler.shields += 1
        try:
            self._undo(self._value)
        finally:
            if handler is not None:
                handler.shields -= 1
            self._block.close()


class transaction:  # noqa: N801 - used as a function: `with transaction(begin, commit, take_back):`
    """Context manager: `begin()` on entry; on leaving `commit()`, or `take_back()` where an exception ends the block.
    Interrupts are deferred inside. A class, not a generator: none can slip between its end and the block."""

    def __init__(self, begin: Callable[[], None], commit: Callable[[], None], take_back: Callable[[], None]) -> None:
        self._begin, self._commit, self._take_back = begin, commit, take_back
        self._deferred = deferred_interrupts()

    def __enter__(self) -> None:
        self._deferred.__enter__()
        try:
            self._begin()
        except BaseException:
            self._deferred.__exit__(None, None, None)
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self._commit()
            else:
                self._take_back()
        finally:
            self._deferred.__exit__(kind, value, tb)


def _on_an_edge(frame: FrameType | None) -> bool:
    """Whether the frame is, or was called by, one whose first or last line is at the edge of a held stretch."""
    edges = (reversible.__enter__.__code__, reversible.__exit__.__code__)
    while frame is not None:
        if frame.f_code in edges:
            return True
        frame = frame.f_back
    return False
