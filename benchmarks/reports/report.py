"""What one looks at after a run: tables in the terminal and as Markdown, with the pictures of figures.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports import charts, figures, panels, tables
from errata.benchmarks.reports.figures import METRIC_TITLES, PROTOCOL_TITLES
from errata.benchmarks.reports.naming import Results, file_names, grouped, labels, titles
from errata.benchmarks.reports.tables import figure, share
from errata.benchmarks.reports.terminal import show_table
from errata.benchmarks.runs import summary
from errata.benchmarks.runs.results import SEQUENCES, read_results
from errata.benchmarks.runs.run_folder import RESULTS, RunFolder
from errata.editors.core.files.atomic import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

SCORES, DAMAGE, CURVES, MARKDOWN, COMPARISON = "scores.png", "damage.png", "curves.png", "report.md", "comparison.png"


def read(folder: Path) -> Results:
    """The results of a finished run."""
    return {**read_results(folder / RESULTS), "folder": str(folder)}


def write(folder: RunFolder, results: Results, records: Sequence[Mapping[str, Any]]) -> None:
    """Plots and Markdown of one run, into its folder."""
    if results["names"]["protocol"] in SEQUENCES:
        lines = charts.collapse([{**results, "folder": str(folder.path)}])
        second = (CURVES, panels.png(lines) if lines else None)
    else:
        second = (DAMAGE, figures.damage(results, summary.curve(records)))
    pictures = [(SCORES, figures.scores(results)), second]
    drawn = [name for name, picture in pictures if picture is not None]
    for name, picture in pictures:
        if picture is not None:
            folder.write_bytes(name, picture)
    folder.write_text(MARKDOWN, markdown(results, drawn))


# --- tables -------------------------------------------------------------------------------------------------------


def show(runs: Sequence[Results], console: Console) -> None:
    """Print a table per model, dataset and protocol: one row per metric, one column per run; the best is bold."""
    from rich.text import Text

    groups = grouped(runs)
    for group, title in zip(groups, titles(groups), strict=True):
        if len(groups) > 1:
            console.print(Text(title, style="bold underline"), "")
        show_table(console, _table(group))
        console.print()
        for run, name in zip(group, labels(group), strict=True):
            for warning in run["warnings"]:
                console.print(Text.assemble((f"{name}: ", "yellow"), warning), soft_wrap=True)
    for run in runs:
        console.print(Text.assemble(("results  ", "dim"), run["folder"]), soft_wrap=True)
    if len(runs) == 1:
        console.print(Text.assemble(("again    ", "dim"), runs[0]["command"]), soft_wrap=True)


def _table(runs: Sequence[Results]) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("before", *labels(runs)):
        table.add_column(name, justify="right", no_wrap=True)
    for protocol, title in PROTOCOL_TITLES:
        metrics = [entry for entry in METRIC_TITLES if any(_entry(run, protocol, entry[0]) for run in runs)]
        if metrics:
            table.add_row(f"[bold]{title}[/], %")
        for metric, name in metrics:
            before = share(runs[0]["before"][protocol][metric]["mean"])
            table.add_row(f"  {name}".replace("\n", " "), before, *_cells(runs, protocol, metric))
    table.add_row("[bold]Damage and speed[/]")
    for name, values in tables.damage(runs).items():
        table.add_row(f"  {name}", "", *values)
    return table


def _entry(run: Results, protocol: str, metric: str) -> Mapping[str, float] | None:
    return run["summary"].get(protocol, {}).get(metric)


def _cells(runs: Sequence[Results], protocol: str, metric: str) -> list[str]:
    """Mean and interval of every run."""
    found = [_entry(run, protocol, metric) for run in runs]
    means = [entry["mean"] for entry in found if entry is not None]
    cells = []
    for entry in found:
        if entry is None:
            cells.append("-")
            continue
        value = f"{share(entry['mean']):>5}"
        if len(set(means)) > 1 and entry["mean"] == max(means):
            value = f"[bold]{value}[/]"
        interval = f"{100 * entry['low']:.0f}-{100 * entry['high']:.0f}"
        cells.append(f"{value} [dim]{interval:>7}[/]")
    return cells


def markdown(results: Results, pictures: Sequence[str]) -> str:
    """The same as a page."""
    names = results["names"]
    lines = [f"# {names['editor']} on {names['model']}, {names['dataset']}, {names['protocol']}", ""]
    counts = results["counts"]
    lines += [f"{counts['edits']} edits, {counts['failed']} refused, {counts['disabling']} disabling.", ""]
    if "asked" in counts:
        lines += [f"{counts['asked']} facts asked, {counts['known']} known, {counts['unknown']} unknown.", ""]
    lines += ["Shares in percent, with bootstrap intervals over cases.", ""]
    lines += ["| protocol | metric | before | after | interval | cases |", "|---|---|---:|---:|---|---:|"]
    for protocol, metrics in results["summary"].items():
        for metric, after in metrics.items():
            before = results["before"][protocol][metric]["mean"]
            interval = f"{100 * after['low']:.1f} to {100 * after['high']:.1f}"
            shares = f"{100 * before:.1f} | {100 * after['mean']:.1f}"
            lines.append(f"| {protocol} | {metric} | {shares} | {interval} | {after['n']} |")
    lines += ["", "| damage and speed | |", "|---|---:|"]
    lines += [f"| {k} | {figure(v)} |" for part in ("collapse", "speed") for k, v in results[part].items()]
    if results["warnings"]:
        lines += ["", *(f"- {warning}" for warning in results["warnings"])]
    lines += ["", *(f"![{name}]({name})" for name in pictures)]
    return "\n".join([*lines, "", "Again:", "", "```", results["command"], "```", ""])


def write_comparisons(runs: Sequence[Results], out: str | Path) -> list[Path]:
    """A picture for each group of several runs that began alike, into `out`; their paths."""
    groups = [group for group in grouped(runs) if len(group) > 1]
    written = []
    for group, name in zip(groups, file_names(titles(groups)), strict=True):
        shown = charts.collapse(group) or _single_edits(group)
        if shown:
            written.append(Path(out) / (COMPARISON if len(groups) == 1 else f"{name}-{COMPARISON}"))
            write_atomically(written[-1], panels.png(shown, across=3))
    return written


def _single_edits(group: Sequence[Results]) -> list[panels.Panel]:
    """Scores and damage, of one size."""
    shown = charts.scores(group, summary.papers_scoring(group[0]["names"]["dataset"]))
    marks = charts.damage(group)
    size = (2.6, 0.9 + 0.25 * len(group))
    return [dataclasses.replace(panel, size=size) for panel in (*shown, *([marks] if marks else []))]
