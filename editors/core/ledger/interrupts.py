"""Delayed Ctrl-C, so that an interrupt never leaves a model half changed.

    with deferred_interrupts():
        for row in rows:
            safe_point()          # raises KeyboardInterrupt here, if Ctrl-C is waiting
            ...
        install(everything)       # no safe point inside, so that it runs completely

    with reversible(lambda: apply_to(model), lambda _: undo(model)):
        ...                       # Ctrl-C is prompt here, and `undo` runs in any case

`try/finally` is not enough. Python raises KeyboardInterrupt between any two bytecodes: also inside a `finally`, and
inside the `__enter__` and `__exit__` of a context manager, where no clause of ours would catch it. While one of these
blocks is open, our SIGINT handler only remembers the interrupt. It is raised later, where the model is consistent.
Python delivers signals to the main thread only. In other threads, and if SIGINT has no Python handler, the blocks
delay nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class _DeferringHandler:
    """The SIGINT handler of open blocks. While a block holds it, it remembers the signal; else it delivers at once."""

    def __init__(self, previous: Callable[[int, FrameType | None], object]) -> None:
        self.previous = previous
        self.holds = 0  # blocks that must not be interrupted now
        self.shields = 0  # blocks among them in which a `safe_point` does nothing, too
        self.pending = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # `__exit__` takes its hold in its first line. A signal before that line is recognised by the call stack.
        if self.holds > 0 or _on_an_edge(frame):
            self.pending = True
        else:
            self.previous(number, frame)

    def deliver(self) -> None:
        """Hand a waiting interrupt to the previous handler."""
        if self.pending:
            self.pending = False
            self.previous(signal.SIGINT, None)


class _Block:
    """One block's use of the handler: the outermost block installs it, and each block holds it while necessary."""

    def __init__(self) -> None:
        self.handler: _DeferringHandler | None = None
        self.installer = False

    def open(self) -> None:
        """Install the handler or join the installed one, and hold it. An earlier signal is raised from here."""
        if threading.current_thread() is not threading.main_thread():
            return
        current = signal.getsignal(signal.SIGINT)
        if isinstance(current, _DeferringHandler):
            self.handler = current
            current.holds += 1
        elif callable(current):
            # Set all fields first: `signal.signal` raises a signal that came before it, and then takes effect.
            handler = _DeferringHandler(current)
            handler.holds = 1
            self.handler, self.installer = handler, True
            signal.signal(signal.SIGINT, handler)

    def close(self) -> None:
        """Release the hold, restore the previous handler if this block replaced it, and deliver a waiting signal."""
        handler = self.handler
        if handler is None:
            return
        if self.installer:
            # The hold lasts until after the exchange: a signal before it is remembered, and a signal after it goes
            # to the previous handler.
            signal.signal(signal.SIGINT, handler.previous)
        handler.holds -= 1
        if handler.holds == 0:
            handler.deliver()


class deferred_interrupts:  # noqa: N801 - used as a function: `with deferred_interrupts():`
    """Context manager: SIGINT waits for a `safe_point`, or for the end of the outermost of these blocks.

    Blocks may be nested. At the end, the previous handler is restored before it gets the waiting interrupt. So a
    user's handler gets it as if nothing had been delayed.
    """

    def __init__(self) -> None:
        self._block = _Block()

    def __enter__(self) -> None:
        self._block.open()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._block.close()


def safe_point() -> None:
    """Raise KeyboardInterrupt if one is waiting.

    Call it where the model is consistent, for example between the steps of a search. It does nothing outside
    `deferred_interrupts`, outside the main thread, and while `reversible` undoes.
    """
    if threading.current_thread() is threading.main_thread():
        current = signal.getsignal(signal.SIGINT)
        if isinstance(current, _DeferringHandler) and not current.shields:
            current.deliver()


class reversible(Generic[T]):  # noqa: N801 - used as a function: `with reversible(do, undo):`
    """Context manager: it calls `do()` on entry and `undo(result of do)` on leaving, even by an exception.

    Ctrl-C is prompt in the block. It cannot interrupt `do` or `undo`, and it cannot come between them and the block.
    A generator with `try/finally` cannot promise that: it does not see an interrupt between its `yield` and the block.
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
            # This is a plain store on purpose. CPython checks for signals at calls and jumps, so that the next check is
            # inside the block.
            handler.holds -= 1
        return value

    def _deliver_before_the_block(self, handler: _DeferringHandler) -> None:
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


class transaction:  # noqa: N801 - used as a function: `with transaction(begin, commit, roll_back):`
    """Context manager: it calls `begin()` on entry, and on leaving `commit()`, or `roll_back()` after an exception.

    Interrupts are delayed inside. It is a class, since an interrupt could come between a generator and the block.
    """

    def __init__(self, begin: Callable[[], None], commit: Callable[[], None], roll_back: Callable[[], None]) -> None:
        self._begin, self._commit, self._roll_back = begin, commit, roll_back
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
                self._roll_back()
        finally:
            self._deferred.__exit__(kind, value, tb)


def _on_an_edge(frame: FrameType | None) -> bool:
    """Return whether the frame, or one that called it, enters or leaves a `reversible` block."""
    edges = (reversible.__enter__.__code__, reversible.__exit__.__code__)
    while frame is not None:
        if frame.f_code in edges:
            return True
        frame = frame.f_back
    return False
