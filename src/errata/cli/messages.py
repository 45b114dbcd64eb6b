"""What the command line shows beside results: one line a complaint, warnings, and what failed of a sweep."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.runs.sweeps import JobNote, Sweep


def complain(console: Console, error: Exception) -> None:
    """An error in one line; of a file with several problems each in one."""
    from rich.text import Text

    from errata.benchmarks.facts.fact_file import FactsError

    for line in error.lines if isinstance(error, FactsError) else [str(error)]:
        console.print(Text.assemble(("errata: ", "bold red"), " ".join(line.split())), soft_wrap=True)


def asked_for_help(arguments: Sequence[str], text: str, console: Console, *, needs_some: bool = False) -> bool:
    """Whether -h or --help is among the arguments of a command, or there are none where it needs some; then its help is
    shown."""
    asked = bool({"-h", "--help"} & set(arguments)) or (needs_some and not arguments)
    if asked:
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    return asked


def say(console: Console, text: str) -> None:
    """One line of plain text, as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def counted(count: int, what: str) -> str:
    """ "1 edit", "1,000 edits"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


@contextmanager
def shown_warnings(console: Console) -> Iterator[None]:
    """Each warning once, in one line."""
    from rich.text import Text

    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in seen:
            seen.add(text)
            console.print(Text.assemble((f"{category.__name__}: ", "yellow"), text), soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for noisy in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning):
            warnings.simplefilter("ignore", noisy)
        warnings.showwarning = show
        yield


def show_failures(sweep: Sweep, failed: Sequence[tuple[int, JobNote]], console: Console) -> None:
    """What failed of a sweep: why, where, and the command that tries again."""
    from rich.text import Text

    console.print(Text(f"\n{len(failed)} of {len(sweep.jobs)} runs failed", style="bold red"))
    for place, note in failed:
        failure = note.failure or {}
        lines = (
            ("", sweep.name(place)),
            ("why", f"{failure.get('kind')}: {failure.get('reason')}"),
            ("where", str(note.traceback)),
            ("again", sweep.again(place)),
        )
        for name, text in lines:
            console.print(Text.assemble((f"{name:>7}  ", "dim"), text), soft_wrap=True)
