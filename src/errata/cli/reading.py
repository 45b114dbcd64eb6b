"""The commands that read what runs have left: `errata compare`, `errata report`, `errata status`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.terminal import show_table
from errata.cli.messages import asked_for_help
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.reports.comparing import Comparison, PairedRow
    from errata.benchmarks.runs.status import RunsStatus

JSON = "--json"
COMPARE_HELP = """\
errata compare RUN RUN [--json]              two folders of runs
errata compare DIR METHOD METHOD [--json]    the runs of two methods in a folder, one pair for each setting they share

Paired differences of the second to the first over the same cases, with intervals and exact tests.
"""
REPORT_HELP = """\
errata report DIR [out=FOLDER]    all finished runs in a folder, to DIR/report unless out= is given

index.html, one page to send to somebody; beside it the tables (Markdown, LaTeX, CSV, Parquet) and the pictures.
"""
STATUS_HELP = """\
errata status DIR [--json]    how far the runs of a folder are: done, running, failed, stopped, pending, time left
"""


def compare(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Two runs over the same cases: paired differences, intervals and tests."""
    from errata.benchmarks.reports import comparing

    if asked_for_help(arguments, COMPARE_HELP, console):
        return 0
    words, as_json = parted(arguments)
    found = [comparing.compare(a, b) for a, b in comparing.pairs(words)]
    if as_json:
        show_json([entry.as_dict() for entry in found], console)
    else:
        for entry in found:
            _show(entry, console)
    return 0


def report(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Tables, pictures and one page about all finished runs in a folder."""
    import shlex

    from rich.text import Text

    from errata.benchmarks.reports.publish import publish

    if asked_for_help(arguments, REPORT_HELP, console):
        return 0
    folders = [argument for argument in arguments if not argument.startswith("out=")]
    outs = [Path(argument.removeprefix("out=")) for argument in arguments if argument.startswith("out=")]
    if len(folders) != 1 or len(outs) > 1 or folders[0].startswith("-"):
        raise ConfigError(f"expected a folder of runs, and out=FOLDER where the report goes, got {list(arguments)}")
    command = shlex.join(["errata", "report", *arguments])
    page, *others = publish(Path(folders[0]), outs[0] if outs else None, command=command)
    console.print(Text.assemble(("page     ", "dim"), str(page)), soft_wrap=True)
    console.print(Text.assemble(("beside   ", "dim"), ", ".join(path.name for path in others)), soft_wrap=True)
    return 0


def status(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """How far the runs of a folder are, and how those go on that failed or stopped."""
    from errata.benchmarks.runs.status import survey

    if asked_for_help(arguments, STATUS_HELP, console):
        return 0
    words, as_json = parted(arguments)
    if len(words) != 1:
        raise ConfigError(f"expected one folder of runs, got {len(words)}")
    found = survey(Path(words[0]))
    if as_json:
        show_json(found.as_dict(), console)
    else:
        _show_survey(found, console)
    return 0


_COLOURS = {"running": "green", "failed": "bold red", "stopped": "yellow", "pending": "dim", "done": "default"}


def _show_survey(found: RunsStatus, console: Console) -> None:
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
        state = Text(run.state, style=_COLOURS[run.state])
        table.add_row(state, Text(run.name), made, figure(run.seconds_per_edit), left)
    show_table(console, table)
    console.print()
    counts = ", ".join(f"{found.count(state)} {state}" for state in STATES if found.count(state))
    left = f"; done in about {_clock(found.seconds_left)}" if found.seconds_left is not None else ""
    console.print(Text(f"{counts or 'no runs'}{left}"))
    for run in found.runs:
        if run.state in ("failed", "stopped"):
            console.print(Text.assemble(("\n", ""), (f"{run.state}  ", _COLOURS[run.state]), run.reason or run.name))
            for name, text in (("where", run.traceback), ("again", run.command)):
                if text:
                    console.print(Text.assemble((f"{name:>7}  ", "dim"), text), soft_wrap=True)


def _clock(seconds: float) -> str:
    """A time as one says it: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def parted(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """The words of a command that takes --json and no other flag, and whether it was given."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    if unknown := [flag for flag in flags if flag != JSON]:
        raise ConfigError(f"unknown option {unknown[0]!r}; there is {JSON}")
    return [argument for argument in arguments if not argument.startswith("-")], bool(flags)


def show_json(value: Any, console: Console) -> None:
    """Strict JSON, as it is: no colours, no wrapping."""
    from errata.benchmarks.runs.json_values import encodable

    text = json.dumps(encodable(value), indent=2, allow_nan=False)
    console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)


def _show(found: Comparison, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from errata.benchmarks.reports.naming import readable

    a, b = (readable(label) for label in found.labels)
    console.print(Text.assemble((f"{a} and {b}", "bold"), f": {found.title}, {found.cases} cases\n"))
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    interval = f"{100 * found.confidence:g} % interval"
    for name in (a, b, "difference", interval, "higher, lower", "p", "p (Holm)", "test"):
        table.add_column(name, justify="right", no_wrap=True)
    scoring = None
    for row in found.rows:
        if row.scoring != scoring:
            scoring = row.scoring
            table.add_row(f"[bold]{_heading(scoring)}[/]")
        table.add_row(*_cells(row))
    show_table(console, table)
    console.print()
    for name, (one, other) in found.settings.items():
        console.print(Text.assemble((f"{name}: ", "dim"), f"{one} / {other}"), soft_wrap=True)
    console.print(
        Text(f"The difference is {b} minus {a}, over the same cases, and bold where its interval leaves 0 out.")
    )
    console.print(Text("p (Holm) allows for the number of rows.\n"))


def _heading(scoring: str) -> str:
    from errata.benchmarks.reports.figures import PROTOCOL_TITLES

    return {name: f"{title}, %" for name, title in PROTOCOL_TITLES}.get(scoring, "Damage of an edit")


def _cells(row: PairedRow) -> list[str]:
    from errata.benchmarks.reports.comparing import DAMAGE, metric_title

    unit, digits = (1, 3) if row.scoring == DAMAGE else (100, 1)
    found, means = row.difference, (row.a, row.b)
    apart = "-" if math.isnan(found.mean) else f"{unit * found.mean:+.{digits}f}"
    return [
        f"  {metric_title(row)}",
        *(_mean(unit * value, digits, missing, found.n) for value, missing in zip(means, row.not_finite, strict=True)),
        f"[bold]{apart}[/]" if found.is_significant else apart,
        "-" if math.isnan(found.mean) else f"{unit * found.low:+.{digits}f} to {unit * found.high:+.{digits}f}",
        f"{found.wins}, {found.losses}",
        _p(found.p),
        _p(row.p_holm),
        f"[dim]{found.test}[/]",
    ]


def _mean(value: float, digits: int, missing: int, count: int) -> str:
    """A mean, and how many values are not in it."""
    mean = "-" if math.isnan(value) else f"{value:.{digits}f}"
    return f"{mean} ({missing} of {count} not finite)" if missing else mean


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
