"""The progress of long work: bars on a terminal, and a line now and then in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from errata.cli.messages import say

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.progress import Progress

EDITS = "edits"  # the unit that a bench reports; everything else is a part of an edit
SECONDS = 30.0  # between two lines
SHARE = 0.1  # of the edits, between two lines


@contextmanager
def show_progress(console: Console, run: str = "") -> Iterator[Progress]:
    """Yield a function that shows progress on a console.

    Args:
        console: A terminal or a file.
        run: The run of a sweep that it is about; it comes before everything that is shown.
    """
    before = f"{run}: " if run else ""
    if console.is_terminal:
        with _bars(console, before) as report:
            yield report
    else:
        yield PlainProgress(lambda line: say(console, f"{before}{line}"))


class PlainProgress:
    """Progress in lines: how many edits are made, after each tenth of them or 30 seconds, whichever comes first.

    Other work gets a line every 30 seconds.

    Args:
        say: Shows one line.
        clock: Returns the time in seconds.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._started = self._last = clock()
        self._said: int | None = None  # edits in the last line

    def __call__(self, done: int, total: int, what: str) -> None:
        now, last = self._clock(), self._said
        if what == EDITS and done == last:
            return
        is_share = what == EDITS and (last is None or done == total or done - last >= SHARE * total)
        if is_share or now - self._last >= SECONDS:
            self._say(f"{what}: {done} of {total}, {_duration(now - self._started)}")
            self._last, self._said = now, done if what == EDITS else last


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


@contextmanager
def _bars(console: Console, before: str) -> Iterator[Progress]:
    from rich import progress as rich_progress
    from rich.markup import escape

    columns = (
        rich_progress.TextColumn("{task.description:<24}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(done: int, total: int, what: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(f"{before}{what}"), total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
