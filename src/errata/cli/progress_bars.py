"""Long work as it goes on: bars on a terminal, a line now and then where the output is kept in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.progress import Progress

EDITS = "edits"  # what a bench counts; the rest are its parts
SECONDS = 30.0
SHARE = 0.1


@contextmanager
def show_progress(console: Console) -> Iterator[Progress]:
    """A progress that shows on this console."""
    if console.is_terminal:
        with _bars(console) as report:
            yield report
    else:
        yield PlainProgress(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))


class PlainProgress:
    """Says how many edits there are to make, and goes on to say how many are made: after a tenth of them or 30 seconds,
    whichever comes first. Of anything else it speaks every 30 seconds."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._started = self._last = clock()
        self._said: int | None = None  # edits

    def __call__(self, done: int, total: int, what: str) -> None:
        now, said = self._clock(), self._said
        if what == EDITS and done == said:
            return
        is_share = what == EDITS and (said is None or done == total or done - said >= SHARE * total)
        if is_share or now - self._last >= SECONDS:
            self._say(f"{what}: {done} of {total}, {_minutes(now - self._started)}")
            self._last, self._said = now, done if what == EDITS else said


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    from rich import progress as rich_progress

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
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
