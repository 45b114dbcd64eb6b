"""Delayed signals, so that Ctrl-C or a time-out never leaves a model half changed.

    with deferred_interrupts():
        for row in rows:
            safe_point()          # raises KeyboardInterrupt here, if Ctrl-C is waiting
            ...
        install(everything)       # no safe point inside, so that it runs completely

    with reversible(lambda: apply_to(model), lambda _: undo(model)):
        ...                       # Ctrl-C is prompt here, and `undo` runs in any case

`try/finally` is not enough. Python calls the handler of a signal between any two bytecodes, and that is where the
handler raises: also inside a `finally`, and inside the `__enter__` and `__exit__` of a context manager, where no clause
of ours would catch it. While one of these blocks is open, our own handlers only remember the signals of SIGNALS. The
former handlers are called later, where the model is consistent. Python delivers signals to the main thread only. In
other threads, and for signals without a Python handler, the blocks delay nothing.
"""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], Any]

# The signals that are delayed, as far as the system has them: those whose Python handlers may raise, as time-outs do
# with SIGALRM. Signals that programs ignore or that come often are left out.
SIGNALS = tuple(
    number
    for name in ("SIGINT", "SIGALRM", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGPROF", "SIGXCPU")
    if (number := getattr(signal, name, None)) is not None
)


class _Gate:
    """What the handlers of all delayed signals share: it remembers signals while a block holds it."""

    def __init__(self) -> None:
        # Weak references: a block that an exception from another thread ended without its `__exit__` does not count.
        # One field, which is replaced as a whole, so that a signal cannot come between two stores.
        self.blocks: tuple[weakref.ref[_Block], ...] = ()
        self.shields = 0  # blocks among them in which a `safe_point` does nothing, too
        self.pending: list[tuple[int, Handler]] = []

    @property
    def open_blocks(self) -> list[_Block]:
        """The blocks that are open now."""
        return [block for reference in self.blocks if (block := reference()) is not None]

    @property
    def holds(self) -> int:
        """How many of the open blocks must not be interrupted now."""
        return sum(block.holds for block in self.open_blocks)

    def deliver(self) -> None:
        """Hand all waiting signals to their former handlers, also if one of these raises."""
        if self.pending:
            number, previous = self.pending.pop(0)
            try:
                previous(number, None)
            finally:
                self.deliver()

    def dismantle(self) -> None:
        """Restore the former handlers. A handler that other code has installed in the meantime stays."""
        for number in SIGNALS:
            current = signal.getsignal(number)
            if isinstance(current, _DeferringHandler) and current.gate is self:
                signal.signal(number, current.previous)


class _DeferringHandler:
    """The handler of a signal while blocks are open: it remembers the signal if the gate is held, else delivers it."""

    def __init__(self, gate: _Gate, previous: Handler) -> None:
        self.gate, self.previous = gate, previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # `__exit__` takes its hold in its first line. A signal before that line is recognised by the call stack.
        if self.gate.holds or (self.gate.open_blocks and _on_an_edge(frame)):
            self.gate.pending.append((number, self.previous))
        else:
            self.previous(number, frame)


class _Block:
    """One block's use of the gate: the outermost block installs the handlers, and each block holds while necessary."""

    def __init__(self) -> None:
        self.gate: _Gate | None = None
        self.holds = False

    def open(self) -> None:
        """Install the handlers that are missing, and hold the gate. An earlier signal is raised from here."""
        if threading.current_thread() is not threading.main_thread():
            return
        gate = _installed_gate() or _Gate()
        try:
            for number in SIGNALS:
                current = signal.getsignal(number)
                while isinstance(current, _DeferringHandler) and current.gate is not gate:
                    current = current.previous  # left over by a block that a signal ended at its edge
                if callable(current) and not isinstance(current, _DeferringHandler):
                    signal.signal(number, _DeferringHandler(gate, current))
        except BaseException:
            if not gate.open_blocks:
                gate.dismantle()
            raise
        # The gate is not held until here, so that an exception in the loop cannot leave signals delayed.
        self.gate, self.holds = gate, True
        gate.blocks = (*gate.blocks, weakref.ref(self))

    def close(self) -> None:
        """Release the hold, restore the former handlers after the last block, and deliver waiting signals."""
        gate = self.gate
        if gate is None:
            return
        gate.blocks = tuple(reference for reference in gate.blocks if reference() not in (self, None))
        try:
            if not gate.blocks:
                gate.dismantle()
        finally:
            if not gate.holds:
                gate.deliver()


def _installed_gate() -> _Gate | None:
    """Return the gate of the blocks that are open now."""
    for number in SIGNALS:
        current = signal.getsignal(number)
        if isinstance(current, _DeferringHandler) and current.gate.open_blocks:
            return current.gate
    return None


class deferred_interrupts:  # noqa: N801 - used as a function: `with deferred_interrupts():`
    """Context manager: signals wait for a `safe_point`, or for the end of the outermost of these blocks.

    Blocks may be nested. At the end, the former handlers are restored before they get the waiting signals. So a user's
    handler gets them as if nothing had been delayed. A handler that the user installs inside stays.
    """

    def __init__(self) -> None:
        self._block = _Block()

    def __enter__(self) -> None:
        self._block.open()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._block.close()


def safe_point() -> None:
    """Raise KeyboardInterrupt if Ctrl-C is waiting, or what the handler of another waiting signal raises.

    Call it where the model is consistent, for example between the steps of a search. It does nothing outside
    `deferred_interrupts`, outside the main thread, and while `reversible` undoes.
    """
    if threading.current_thread() is threading.main_thread():
        gate = _installed_gate()
        if gate is not None and gate.pending and not gate.shields:
            gate.deliver()


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
        gate = self._block.gate
        try:
            value = self._value = self._do()
        except BaseException:
            self._block.close()
            raise
        if gate is not None:
            if gate.holds == 1 and gate.pending:
                self._deliver_before_the_block(gate)
            # A plain store on purpose. CPython checks for signals at calls and jumps, so that the next check is inside
            # the block.
            self._block.holds = False
        return value

    def _deliver_before_the_block(self, gate: _Gate) -> None:
        try:
            gate.deliver()
        except BaseException:
            self._finish()
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._block.holds = True
        self._finish()

    def _finish(self) -> None:
        gate = self._block.gate
        if gate is not None:
            gate.shields += 1
        try:
            self._undo(self._value)
        finally:
            if gate is not None:
                gate.shields -= 1
            self._block.close()


class transaction:  # noqa: N801 - used as a function: `with transaction(begin, commit, roll_back):`
    """Context manager: it calls `begin` on entry, and on leaving `commit`, or `roll_back` after an exception.

    Each is called with the transaction. Signals are delayed inside. It is a class, since an interrupt could come
    between a generator and the block. An exception that another thread raises here cannot be delayed. If one ends
    `commit` or `roll_back`, `roll_back` is called again. So both keep what that needs until their last step.

    Attributes:
        is_over: Whether the block has been left.
    """

    def __init__(
        self,
        begin: Callable[[transaction], None],
        commit: Callable[[transaction], None],
        roll_back: Callable[[transaction], None],
    ) -> None:
        self._begin, self._commit, self._roll_back = begin, commit, roll_back
        self._deferred = deferred_interrupts()
        self.is_over = False

    def __enter__(self) -> None:
        self._deferred.__enter__()
        try:
            self._begin(self)
        except BaseException:
            self.is_over = True
            self._deferred.__exit__(None, None, None)
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.is_over = True
        try:
            (self._commit if kind is None else self._roll_back)(self)
        except BaseException as error:
            self._roll_back(self)
            # Everything is restored now. So the error says what ended the first attempt, and not that it failed.
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None
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
