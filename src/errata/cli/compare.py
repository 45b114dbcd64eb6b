"""`errata compare`: compares two runs over the same cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.benchmarks.reports.terminal import show_table
from errata.cli.arguments import parse
from errata.cli.command import AS_JSON, MEASURE, Command
from errata.cli.exit_codes import DONE
from errata.cli.messages import count_of, show_json

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.reports.comparing import Comparison, PairedRow


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Show the paired differences of two runs, with intervals and tests."""
    given = parse(arguments, COMMAND)

    from errata.benchmarks.reports import comparing

    found = [comparing.compare(a, b) for a, b in comparing.pairs(list(given.words))]
    if given.flags:
        show_json([entry.as_dict() for entry in found], console)
    else:
        for entry in found:
            _show(entry, console)
    return DONE


def _show(found: Comparison, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from errata.benchmarks.reports.naming import readable

    a, b = (readable(label) for label in found.labels)
    console.print(Text.assemble((f"{a} and {b}", "bold"), f": {found.title}, {count_of(found.cases, 'case')}\n"))
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


COMMAND = Command(
    name="compare",
    usage=("RUN RUN", "DIR METHOD METHOD"),
    summary="Compare two runs over the same cases: paired differences, intervals, tests.",
    group=MEASURE,
    run=run,
    options=(AS_JSON,),
    notes=(
        "RUN is the folder of a run. With DIR, the runs of two methods in that folder are compared, one pair for each\n"
        "setting that they share. Differences are the second minus the first.",
    ),
    examples=("errata compare runs rome r_rome",),
)
