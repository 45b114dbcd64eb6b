"""`errata status`: shows how far the runs of a folder are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from errata.benchmarks.reports.terminal import show_table
from errata.cli.arguments import parse
from errata.cli.command import AS_JSON, MEASURE, Command
from errata.cli.exit_codes import DONE
from errata.cli.messages import show_json
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.runs.status import RunsStatus

COLOURS = MappingProxyType(
    {"running": "green", "failed": "bold red", "stopped": "yellow", "pending": "dim", "done": "default"}
)


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Show the state of every run, and how failed or stopped ones are continued."""
    given = parse(arguments, COMMAND)
    if len(given.words) != 1:
        raise ConfigError(f"expected one folder of runs, got {len(given.words)}")

    from errata.benchmarks.runs.status import survey

    found = survey(Path(given.words[0]))
    if given.flags:
        show_json(found.as_dict(), console)
    else:
        _show(found, console)
    return DONE


def _show(found: RunsStatus, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from errata.benchmarks.reports.tables import figure
    from errata.benchmarks.runs.status import STATES

    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column("")
    table.add_column("run", overflow="fold")
    for name in ("edits", "seconds each", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in found.runs:
        made = "-" if run.edits is None else f"{run.made or 0}/{run.edits}"
        left = "-" if run.seconds_left is None else _clock(run.seconds_left)
        state = Text(run.state, style=COLOURS[run.state])
        table.add_row(state, Text(run.name), made, figure(run.seconds_per_edit), left)
    show_table(console, table)
    console.print()
    counts = ", ".join(f"{found.count(state)} {state}" for state in STATES if found.count(state))
    left = f"; done in about {_clock(found.seconds_left)}" if found.seconds_left is not None else ""
    console.print(Text(f"{counts or 'no runs'}{left}"))
    for run in found.runs:
        if run.state in ("failed", "stopped"):
            console.print(Text.assemble(("\n", ""), (f"{run.state}  ", COLOURS[run.state]), run.reason or run.name))
            for name, text in (("where", run.traceback), ("again", run.command)):
                if text:
                    console.print(Text.assemble((f"{name:>7}  ", "dim"), text), soft_wrap=True)


def _clock(seconds: float) -> str:
    """Return a duration in words: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


COMMAND = Command(
    name="status",
    usage=("DIR",),
    summary="Show which runs in a folder are done, running, failed or pending, and the time left.",
    group=MEASURE,
    run=run,
    options=(AS_JSON,),
    notes=("For runs that failed or stopped, it shows the reason and the command that continues them.",),
    examples=("errata status runs",),
)
