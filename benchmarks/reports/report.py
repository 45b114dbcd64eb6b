"""The scores of runs in the terminal, and the Markdown page of one run with the pictures of figures.py."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports import charts, figures, glossary, panels, tables
from errata.benchmarks.reports.counts import count_of
from errata.benchmarks.reports.escaping import markdown_text
from errata.benchmarks.reports.groups import LEAST_CASES, LOWER, rows_of
from errata.benchmarks.reports.naming import (
    Results,
    file_names,
    grouped,
    labels,
    ordered,
    readable,
    shared_method,
    titles,
)
from errata.benchmarks.reports.orders import order_panels, order_table
from errata.benchmarks.reports.strengths import TextTable, strength_panels, strength_table, tables_markdown
from errata.benchmarks.reports.tables import between, figure, share
from errata.benchmarks.reports.terminal import show_table
from errata.benchmarks.runs import summary
from errata.benchmarks.runs.results import is_sequence, read_results
from errata.benchmarks.runs.run_folder import RESULTS, RunFolder
from errata.editors.core.files.atomic import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

SCORES, DAMAGE, CURVES, MARKDOWN, COMPARISON = "scores.png", "damage.png", "curves.png", "report.md", "comparison.png"
STRENGTHS = "strengths.png"
_TABLES = (strength_table, order_table)


def read(folder: Path) -> Results:
    """Return the results of a finished run."""
    return {**read_results(folder / RESULTS), "folder": str(folder)}


def write(folder: RunFolder, results: Results, records: Sequence[Mapping[str, Any]]) -> None:
    """Write plots and Markdown of one run into its folder."""
    if is_sequence(results):
        lines = charts.collapse([{**results, "folder": str(folder.path)}])
        second = (CURVES, panels.png(lines) if lines else None)
    else:
        second = (DAMAGE, figures.damage(results, summary.curve(records)))
    over = strength_panels(
        [{**results, "folder": str(folder.path)}], summary.papers_scoring(results["names"]["dataset"])
    )
    pictures = [(SCORES, figures.scores(results)), second, (STRENGTHS, panels.png(over, across=3) if over else None)]
    drawn = [name for name, picture in pictures if picture is not None]
    for name, picture in pictures:
        if picture is not None:
            folder.write_bytes(name, picture)
    folder.write_text(MARKDOWN, markdown(results, drawn))


# --- tables -------------------------------------------------------------------------------------------------------


def show(runs: Sequence[Results], console: Console) -> None:
    """Print a table per model, dataset and protocol: one row per metric, one column per run; the best is bold.

    Runs that differ in their seed alone are one column.
    """
    from rich.text import Text

    groups = [rows_of(ordered(group)) for group in grouped(runs)]
    for group, title in zip(groups, titles(groups), strict=True):
        if len(groups) > 1:
            console.print(Text(title, style="bold underline"), "")
        table, caption = _table(group)
        show_table(console, table)
        console.print(Text(f"\n{caption}\n", style="dim"), soft_wrap=True)
        scoring = summary.papers_scoring(group[0]["names"]["dataset"])
        for make in _TABLES:
            if (found := make(group, scoring)) is not None:
                _show_texts(found, console)
        for run, name in zip(group, labels(group), strict=True):
            for warning in run["warnings"]:
                console.print(Text.assemble((f"{name}: ", "yellow"), warning), soft_wrap=True)
    for run in runs:
        console.print(Text.assemble(("results  ", "dim"), run["folder"]), soft_wrap=True)
    if len(runs) == 1:
        console.print(Text.assemble(("again    ", "dim"), runs[0]["command"]), soft_wrap=True)


def _table(runs: Sequence[Results]) -> tuple[Any, str]:
    """Return the table of a group, and what its numbers are means of."""
    from rich.table import Table

    n = _usual_cases(runs)
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column(shared_method(runs) or "", no_wrap=True)
    for name in ("before", *map(readable, labels(runs))):
        table.add_column(name, justify="right", no_wrap=True)
    for scoring, title in glossary.SCORING_TITLES:
        shown = glossary.measured_titles(runs, scoring)
        if shown:
            table.add_row(f"[bold]{title}[/], %")
        for metric, name in shown:
            before = _mean([run["before"].get(scoring, {}).get(metric) for run in runs])
            table.add_row(f"  {name}", before, *_cells(runs, scoring, metric, n))
    table.add_row("[bold]Damage and speed[/]")
    for name, values in tables.damage(runs).items():
        table.add_row(f"  {name}", "", *values)
    level = " or ".join(dict.fromkeys(f"{100 * run['config']['confidence']:g}" for run in runs))
    over = f"Means over {count_of(n, 'case')}"
    if all("seeds" in run for run in runs):
        return table, f"{over} per seed, ± standard deviation between seeds."
    some = "; mean ± standard deviation where there are several seeds" if any("seeds" in run for run in runs) else ""
    return table, f"{over} with {level} % intervals{some}."


def _show_texts(found: TextTable, console: Console) -> None:
    """Print a table of texts: that of runs over strengths, or of compositions."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, title=found.title, title_justify="left")
    for place, head in enumerate(found.heads):
        table.add_column(head, justify="right" if place else "left", no_wrap=True)
    for cells in found.rows:
        table.add_row(*map(Text, cells))
    show_table(console, table)
    for note in found.notes:
        console.print(Text(note, style="dim"), soft_wrap=True)
    console.print()


def _usual_cases(runs: Sequence[Results]) -> int:
    """Return the number of cases that most entries of a group's tables have."""
    counts = Counter(entry["n"] for run in runs for table in run["summary"].values() for entry in table.values())
    return max(counts, key=lambda n: (counts[n], n), default=0)


def _mean(entries: Sequence[Mapping[str, float] | None]) -> str:
    """Return the untouched model's mean, from the first run that has it."""
    return next((share(entry["mean"]) for entry in entries if entry is not None), "-")


def _cells(runs: Sequence[Results], scoring: str, metric: str, n: int) -> list[str]:
    """Return mean and interval of every run, and its number of cases where it is not `n`."""
    found = [run["summary"].get(scoring, {}).get(metric) for run in runs]
    means = [entry["mean"] for entry in found if entry is not None]
    best = min if metric in LOWER else max
    cells = []
    for entry in found:
        if entry is None:
            cells.append("-")
            continue
        value = f"{share(entry['mean']):>5}"
        if len(set(means)) > 1 and entry["mean"] == best(means) and entry["n"] >= LEAST_CASES:
            value = f"[bold]{value}[/]"
        spread = f"± {share(entry['deviation'])}" if "deviation" in entry else interval(entry)
        own = "" if entry["n"] == n else f" n={entry['n']}"
        cells.append(f"{value} [dim]{spread:>7}{own}[/]")
    return cells


def interval(entry: Mapping[str, float]) -> str:
    """Return an interval in whole percent: "82-100"."""
    return between(entry["low"], entry["high"], "-")


def markdown(results: Results, pictures: Sequence[str]) -> str:
    """Return the scores of one run as a page of Markdown."""
    names = results["names"]
    title = f"{names['editor']} on {names['model']}, {names['dataset']}, {names['protocol']}"
    lines = [f"# {markdown_text(title)}", ""]
    counts = results["counts"]
    made = count_of(counts["edits"], "edit")
    lines += [f"{made}, {counts['failed']} refused, {counts['disabling']} disabling.", ""]
    if "asked" in counts:
        asked = count_of(counts["asked"], "fact")
        lines += [f"{asked} asked, {counts['known']} known, {counts['unknown']} unknown.", ""]
    lines += ["Shares in percent, with bootstrap intervals over cases.", ""]
    lines += ["| scoring | metric | before | after | interval | cases |", "|---|---|---:|---:|---|---:|"]
    for scoring, metrics in results["summary"].items():
        for metric, after in metrics.items():
            before = _mean([results["before"].get(scoring, {}).get(metric)])
            ends = f"{100 * after['low']:.1f} to {100 * after['high']:.1f}"
            shares = f"{before} | {100 * after['mean']:.1f}"
            lines.append(f"| {scoring} | {metric} | {shares} | {ends} | {after['n']} |")
    lines += ["", "| damage and speed | |", "|---|---:|"]
    lines += [f"| {k} | {figure(v)} |" for part in ("collapse", "speed") for k, v in results[part].items()]
    for table in (make([{**results, "folder": ""}], summary.papers_scoring(names["dataset"])) for make in _TABLES):
        lines += [] if table is None else ["", tables_markdown([table])]
    if results["warnings"]:
        lines += ["", *(f"- {warning}" for warning in results["warnings"])]
    lines += ["", *(f"![{name}]({name})" for name in pictures)]
    return "\n".join([*lines, "", "Again:", "", "```", results["command"], "```", ""])


def write_comparisons(runs: Sequence[Results], out: str | Path) -> list[Path]:
    """Draw a picture for each group of several rows that began alike into `out`, and return their paths."""
    groups = [rows for group in grouped(runs) if len(rows := rows_of(ordered(group))) > 1]
    written = []
    for group, name in zip(groups, file_names(titles(groups)), strict=True):
        over = strength_panels(group, summary.papers_scoring(group[0]["names"]["dataset"]))
        both = order_panels(group, summary.papers_scoring(group[0]["names"]["dataset"]))
        shown = over or both or charts.collapse(group) or _single_edits(group)
        if shown:
            written.append(Path(out) / (COMPARISON if len(groups) == 1 else f"{name}-{COMPARISON}"))
            heading = ", ".join(filter(None, (shared_method(group), titles([group])[0])))
            write_atomically(written[-1], panels.png(shown, across=3, title=heading))
    return written


def _single_edits(group: Sequence[Results]) -> list[panels.Panel]:
    """Return panels of scores and damage, all of one size, which fits their labels."""
    shown = charts.scores(group, summary.papers_scoring(group[0]["names"]["dataset"]), _usual_cases(group))
    marks = charts.damage(group)
    width, height = charts.row_size(group, 1.9)
    return [dataclasses.replace(panel, size=(width, height + 0.3)) for panel in (*shown, *([marks] if marks else []))]
