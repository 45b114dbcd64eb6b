"""`errata compare`: compares two runs over the same cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.benchmarks.reports.counts import count_of
from errata.benchmarks.reports.terminal import show_table
from errata.cli.arguments import parse
from errata.cli.command import AS_JSON, MEASURE, Command
from errata.cli.exit_codes import DONE
from errata.cli.messages import show_json

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.reports.comparing import Comparison, PairedRow


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Show the paired differences of two runs, with intervals and tests."""
    given = parse(arguments, COMMAND)

    from errata.benchmarks.reports import comparing

    found = [comparing.compare_seeds(row) for row in comparing.seed_pairs(list(given.words))]
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
    cases = count_of(found.cases, "case") + (f", {found.seeds} seeds" if found.seeds > 1 else "")
    console.print(Text.assemble((f"{a} and {b}", "bold"), f": {found.title}, {cases}\n"), soft_wrap=True)
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
        table.add_row(*_cells(row, found.cases))
    show_table(console, table)
    console.print()
    for name, (one, other) in found.settings.items():
        console.print(Text.assemble((f"{name}: ", "dim"), f"{one} / {other}"), soft_wrap=True)
    console.print(
        Text(f"The difference is {b} minus {a}, over the same cases, and bold where its interval leaves 0 out.")
    )
    if found.seeds > 1:
        console.print(
            Text("Means are over seeds, ± their standard deviation; a case counts once, with its mean over seeds.")
        )
    console.print(Text("p (Holm) allows for the number of rows.\n"))


def _heading(scoring: str) -> str:
    from errata.benchmarks.reports.glossary import SCORING_TITLES

    return {name: f"{title}, %" for name, title in SCORING_TITLES}.get(scoring, "Damage of an edit")


def _cells(row: PairedRow, cases: int) -> list[str]:
    from errata.benchmarks.reports.comparing import DAMAGE, metric_title
    from errata.benchmarks.reports.tables import signed

    unit, digits = (1, 3) if row.scoring == DAMAGE else (100, 1)
    found, spread = row.difference, row.deviation or (None, None)
    apart = "-" if math.isnan(found.mean) else signed(unit * found.mean, digits)
    ends = [signed(unit * end, digits) for end in (found.low, found.high)]
    of = "" if found.n == cases else f" [dim]n={found.n}[/]"
    return [
        f"  {metric_title(row)}{of}",
        *(
            _mean(unit * value, digits, missing, found.n, None if own is None else unit * own)
            for value, missing, own in zip((row.a, row.b), row.not_finite, spread, strict=True)
        ),
        f"[bold]{apart}[/]" if found.is_significant else apart,
        "-" if math.isnan(found.mean) else " to ".join(ends),
        f"{found.wins}, {found.losses}",
        _p(found.p),
        _p(row.p_holm),
        f"[dim]{found.test}[/]",
    ]


def _mean(value: float, digits: int, missing: int, count: int, deviation: float | None) -> str:
    """Return a mean with its deviation between seeds, and the number of values that it leaves out."""
    mean = "-" if math.isnan(value) else f"{value:.{digits}f}"
    mean += "" if deviation is None or math.isnan(deviation) else f" ± {deviation:.{digits}f}"
    return f"{mean} ({missing} of {count} not finite)" if missing else mean


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


COMMAND = Command(
    name="compare",
    usage=("RUN RUN", "DIR METHOD METHOD", "DIR [METHOD]"),
    summary="Compare two runs over the same cases: paired differences, intervals, tests.",
    group=MEASURE,
    run=run,
    options=(AS_JSON,),
    notes=(
        "RUN is the folder of a run. With DIR, the runs of two methods in that folder are compared, one pair for each\n"
        "setting that they share. Runs with several seeds are one pair. Differences are the second minus the first.\n"
        "With one METHOD, or none if the folder has only one, every two settings of that method are compared.",
    ),
    examples=("errata compare runs rome r_rome",),
)
