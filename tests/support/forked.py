"""Processes of their own for tests, begun as forks of the process that runs the tests: they find everything imported.

A new interpreter takes seconds for its imports alone. A process that is killed or told to stop leaves the same behind
if it began as a fork. Only what depends on the imports themselves needs a new interpreter.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from errata.cli import main


class ForkedProcess:
    """A process that a test has begun.

    Attributes:
        pid: Its number.
    """

    def __init__(self, work: Callable[[], object], base: Path) -> None:
        """Begin the work; its result is the exit code, and None is 0.

        Args:
            work: What the process does. Nothing that it changes in memory reaches the tests.
            base: A path. What the process writes to stdout and stderr is in files of that name with .out and .err.
        """
        self._out, self._err = base.with_suffix(".out"), base.with_suffix(".err")
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _carry_out(work, self._out, self._err)

    def poll(self) -> int | None:
        """Return the exit code, minus the signal that ended it, or None as long as it runs."""
        return self._ended(os.WNOHANG)

    def wait(self) -> int:
        """Wait for its end and return the exit code, or minus the signal that ended it."""
        code = self._ended(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """Return what it has written to stdout."""
        return self._out.read_text(encoding="utf-8")

    @property
    def errors(self) -> str:
        """Return what it has written to stderr."""
        return self._err.read_text(encoding="utf-8")

    def _ended(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def command(*arguments: str) -> Callable[[], int]:
    """Return the work of a process that carries out `errata ARGUMENTS`."""

    def work() -> int:
        sys.argv = ["errata", *arguments]
        return main.main()

    return work


def output_of(work: Callable[[], object], base: Path) -> str:
    """Do the work in a process of its own, which must succeed, and return what it has written to stdout."""
    process = ForkedProcess(work, base)
    assert process.wait() == 0, process.errors
    return process.output


def _carry_out(work: Callable[[], object], out: Path, err: Path) -> None:
    """Do the work and end this process: it must never return into the tests."""
    code = 1
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        code = int(work() or 0)  # type: ignore[call-overload]
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the process must not go on
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
