"""What the command line shows besides results: complaints, warnings, and the failures of a sweep."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.counts import count_of

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.runs.sweeps import JobNote, Sweep


def complain(console: Console, error: Exception) -> None:
    """Show an error in one line, or in one line per problem where a file has several."""
    from rich.text import Text

    # Only the error of a file of facts has `lines`. Importing its class would load torch for every complaint.
    for line in getattr(error, "lines", [str(error)]):
        console.print(Text.assemble(("errata: ", "bold red"), " ".join(line.split())), soft_wrap=True)


def say(console: Console, text: str) -> None:
    """Show plain text as it is: no colours, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)


def say_stopped(console: Console, reason: Exception) -> None:
    """Show why a run stopped early, and that the same command continues it."""
    console.print(f"[yellow]stopped[/]: {reason}; the same command continues where it stopped", soft_wrap=True)


def show_json(value: Any, console: Console) -> None:
    """Show a value as strict JSON: no colours, no wrapping, NaN and infinity as text."""
    from errata.benchmarks.runs.json_values import encodable

    say(console, json.dumps(encodable(value), indent=2, allow_nan=False))


@contextmanager
def shown_warnings(console: Console) -> Iterator[None]:
    """Show each warning once, in one line. Of doubtful edits it shows the first of each kind, and in the end how many
    there were; the results name the doubts of every edit."""
    from rich.text import Text

    seen: set[str] = set()
    doubtful: Counter[str] = Counter()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if sign := getattr(message, "sign", ""):
            doubtful[sign] += 1
            if doubtful[sign] > 1:
                return
        if text not in seen:
            seen.add(text)
            console.print(Text.assemble((f"{category.__name__}: ", "yellow"), text), soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for noisy in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning):
            warnings.simplefilter("ignore", noisy)
        warnings.showwarning = show
        try:
            yield
        finally:
            for text in _repeated(doubtful):
                console.print(Text.assemble(("DoubtfulEditWarning: ", "yellow"), text), soft_wrap=True)


def _repeated(doubtful: Counter[str]) -> Iterator[str]:
    """Yield a line for each kind of doubt that had more warnings than the first, which was shown."""
    for sign, count in doubtful.items():
        if count > 1:
            from errata.editors.core.doubts import MEANINGS

            yield f"{count} warnings that {MEANINGS.get(sign, sign)}; the first is shown, the results name each edit"


def show_failures(sweep: Sweep, failed: Sequence[tuple[int, JobNote]], console: Console) -> None:
    """Show the failed jobs of a sweep: the reason, the traceback's file, and the command that tries again."""
    from rich.text import Text

    console.print(Text(f"\n{len(failed)} of {count_of(len(sweep.jobs), 'run')} failed", style="bold red"))
    for index, note in failed:
        failure = note.failure or {}
        lines = (
            ("", sweep.name(index)),
            ("why", f"{failure.get('kind')}: {failure.get('reason')}"),
            ("where", str(note.traceback)),
            ("again", sweep.again(index)),
        )
        for name, text in lines:
            console.print(Text.assemble((f"{name:>7}  ", "dim"), text), soft_wrap=True)
