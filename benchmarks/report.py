"""What one looks at after a run: tables in the terminal and as Markdown, with the pictures of figures.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks import figures, summary
from errata.benchmarks.figures import METRIC_TITLES, PROTOCOL_TITLES, labels
from errata.benchmarks.store import RESULTS, RunFolder, number, read_results, write_atomically

if TYPE_CHECKING:
    from rich.console import Console

Results = Mapping[str, Any]

SCORES, DAMAGE, MARKDOWN, COMPARISON = "scores.png", "damage.png", "report.md", "comparison.png"


def read(folder: Path) -> Results:
    """The results of a finished run."""
    return {**read_results(folder / RESULTS), "folder": str(folder)}


def write(folder: RunFolder, results: Results, records: Sequence[Mapping[str, Any]]) -> None:
    """Plots and Markdown of one run, into its folder."""
    pictures = [(SCORES, figures.scores(results)), (DAMAGE, figures.damage(results, summary.curve(records)))]
    drawn = [name for name, figure in pictures if figure is not None]
    for name, figure in pictures:
        if figure is not None:
            folder.write_bytes(name, figure)
    folder.write_text(MARKDOWN, markdown(results, drawn))


# --- tables -------------------------------------------------------------------------------------------------------


def show(runs: Sequence[Results], console: Console) -> None:
    """One table a protocol, before and after side by side; among several runs the best of a column is bold."""
    from rich.table import Table
    from rich.text import Text

    for protocol, title in PROTOCOL_TITLES:
        metrics = [
            entry for entry in METRIC_TITLES if any(entry[0] in run["summary"].get(protocol, {}) for run in runs)
        ]
        if not metrics:
            continue
        table = Table(title=f"{title}: before → after, %", title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("")
        for _, name in metrics:
            table.add_column(name.replace("\n", " "), justify="right")
        for run, name in zip(runs, labels(runs), strict=True):
            table.add_row(name, *(_cell(runs, run, protocol, metric) for metric, _ in metrics))
        console.print(table, "")
    console.print(_damage_table(runs), "")
    for run, name in zip(runs, labels(runs), strict=True):
        for warning in run["warnings"]:
            console.print(Text.assemble((f"{name}: ", "yellow"), warning), soft_wrap=True)
    for run in runs:
        console.print(Text.assemble(("results  ", "dim"), run["folder"]), soft_wrap=True)
    if len(runs) == 1:
        console.print(Text.assemble(("again    ", "dim"), runs[0]["command"]), soft_wrap=True)


def _cell(runs: Sequence[Results], run: Results, protocol: str, metric: str) -> str:
    after = run["summary"].get(protocol, {}).get(metric)
    if after is None:
        return "-"
    before = run["before"][protocol][metric]
    means = [r["summary"][protocol][metric]["mean"] for r in runs if metric in r["summary"].get(protocol, {})]
    best = len(runs) > 1 and after["mean"] == max(means) and len(set(means)) > 1
    value = f"{100 * after['mean']:.1f}"
    interval = f" [dim]({100 * after['low']:.0f}-{100 * after['high']:.0f})[/]"
    return f"{100 * before['mean']:.1f} → {f'[bold]{value}[/]' if best else value}{interval}"


def _damage_table(runs: Sequence[Results]) -> Any:
    from rich.table import Table

    table = Table(title="Damage and speed", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("edits", "refused", "disabling", "perplexity", "worst", "facts kept", "drift (KL)", "s per edit"):
        table.add_column(name, justify="right")
    for run, name in zip(runs, labels(runs), strict=True):
        counts, collapse = run["counts"], run["collapse"]
        perplexity = f"{figure(collapse['perplexity_before'])} → {figure(collapse['perplexity_after'])}"
        disabling = "-" if collapse["perplexity_ratio"] is None else str(counts["disabling"])
        cells = (str(counts["edits"]), str(counts["failed"]), disabling, perplexity)
        worst = collapse["perplexity_ratio_worst"]
        table.add_row(
            name,
            *cells,
            "-" if worst is None else f"x {figure(worst)}",
            "-" if collapse["retention"] is None else f"{100 * collapse['retention']:.1f}",
            figure(collapse["neighborhood_kl"]),
            figure(run["speed"]["seconds_per_edit"]),
        )
    return table


def figure(value: Any) -> str:
    """A number in three digits or so; `-` for none."""
    if value is None:
        return "-"
    plain = number(value)
    if not math.isfinite(plain):
        return "inf"
    return f"{plain:,.0f}" if abs(plain) >= 1000 else f"{plain:.3g}"


def markdown(results: Results, pictures: Sequence[str]) -> str:
    """The same as a page."""
    names = results["names"]
    lines = [f"# {names['editor']} on {names['model']}, {names['dataset']}, {names['protocol']}", ""]
    counts = results["counts"]
    lines += [f"{counts['edits']} edits, {counts['failed']} refused, {counts['disabling']} disabling.", ""]
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


def write_comparison(runs: Sequence[Results], out: str | Path) -> Path | None:
    """A picture of several runs into `out`; its path, or None where there is nothing to compare."""
    picture = figures.comparison(runs)
    if picture is None:
        return None
    path = Path(out) / COMPARISON
    write_atomically(path, picture)
    return path
