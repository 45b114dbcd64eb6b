"""Tables in a published style (styles.py) as Markdown, LaTeX and CSV, and the curves of efficacy over edits so far."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

from errata.benchmarks.reports import charts
from errata.benchmarks.reports.escaping import csv_cell, markdown_text
from errata.benchmarks.reports.naming import Results, labels, readable
from errata.benchmarks.reports.palette import MUTED, looks
from errata.benchmarks.reports.panels import Panel
from errata.benchmarks.reports.seeds import members
from errata.benchmarks.reports.styles import COLLAPSED, StyledCell, StyledTable
from errata.benchmarks.reports.tables import latex_text
from errata.benchmarks.runs.results import is_sequence

NOTE = "Percent, ± standard errors over cases"


def markdown(tables: Sequence[StyledTable]) -> str:
    """Return the tables in Markdown."""
    lines: list[str] = []
    for table in tables:
        lines += [f"## {markdown_text(table.title)}", "", f"{NOTE}. {'; '.join(table.notes)}.", ""]
        heads = [markdown_text(f"{dataset}: {column}") for dataset, column in table.columns]
        lines += [_line(["", *heads]), _line(["---", *["---:"] * len(heads)])]
        lines += [_line([markdown_text(label), *map(_shown, cells)]) for label, cells in table.rows.items()]
        lines.append("")
    return "\n".join(lines)


def _shown(cell: StyledCell | None) -> str:
    return "-" if cell is None else cell.shown()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def latex(tables: Sequence[StyledTable]) -> str:
    """Return the tables in LaTeX, for \\usepackage{booktabs}."""
    return "\n".join("\n".join([*_latex_lines(table), ""]) for table in tables)


def _latex_lines(table: StyledTable) -> list[str]:
    datasets = dict.fromkeys(dataset for dataset, _ in table.columns)
    widths = {name: sum(dataset == name for dataset, _ in table.columns) for name in datasets}
    heads = [rf"\multicolumn{{{width}}}{{c}}{{{latex_text(name)}}}" for name, width in widths.items()]
    rules, first = [], 2
    for width in widths.values():
        rules.append(rf"\cmidrule(lr){{{first}-{first + width - 1}}}")
        first += width
    rows = [" & ".join([latex_text(label), *map(_latex_cell, cells)]) + r" \\" for label, cells in table.rows.items()]
    caption = latex_text(f"{table.title}. {NOTE}. {'; '.join(table.notes)}.").replace("±", r"$\pm$")
    return [
        r"% Needs \usepackage{booktabs}.",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(["", *heads]) + r" \\",
        " ".join(rules),
        " & ".join(["", *(latex_text(column) for _, column in table.columns)]) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]


def _latex_cell(cell: StyledCell | None) -> str:
    return "--" if cell is None else cell.shown(r"$\pm$").replace(">", "$>$")


def as_csv(tables: Sequence[StyledTable]) -> str:
    """Return the tables as CSV, one after the other, with the error beside each number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for table in tables:
        heads = [f"{dataset}: {column}{part}" for dataset, column in table.columns for part in ("", " error")]
        writer.writerow(["table", "method", *map(csv_cell, heads)])
        for label, cells in table.rows.items():
            values = [value for cell in cells for value in _values(cell)]
            writer.writerow([csv_cell(table.title), csv_cell(label), *values])
    return text.getvalue()


def _values(cell: StyledCell | None) -> list[str]:
    if cell is None:
        return ["", ""]
    number = cell.text if cell.text is not None else f"{cell.mean:.4f}"
    return [number, "" if cell.error is None else f"{cell.error:.4f}"]


def efficacy(table: StyledTable) -> list[Panel]:
    """Return the share of edits so far that hold, against their number: a panel per dataset, of sequences alone."""
    found = []
    for title, scoring, rows in table.runs:
        runs = [run for row in rows for run in members(row) if is_sequence(run)]
        if any(len(charts.curve(run)) > 1 for run in runs):
            found.append(Panel(f"{title}: Eff, %", partial(_draw, runs=runs, scoring=scoring)))
    return found


def _draw(axis: Any, *, runs: Sequence[Results], scoring: str) -> None:
    for run, look, label in zip(runs, looks(runs), labels(runs), strict=True):
        entries = [
            (point["edits"], entry)
            for point in charts.curve(run)
            if (entry := point["summary"].get(scoring, {}).get("reliability")) is not None
        ]
        style: Any = {"color": look.colour, "alpha": look.alpha, "linestyle": look.dash, "linewidth": 1.4}
        edits, means = [edits for edits, _ in entries], [100 * entry["mean"] for _, entry in entries]
        axis.plot(edits, means, marker=look.marker, markersize=3.5, mew=0, label=readable(label), **style)
        ends = [[100 * entry[end] for _, entry in entries] for end in ("low", "high")]
        axis.fill_between(edits, *ends, color=look.colour, alpha=0.14 * look.alpha, linewidth=0)
    axis.axhline(100 * COLLAPSED, color=MUTED, linewidth=0.8, linestyle=":")
    axis.set_ylim(0, 104)
    axis.set_xlim(left=0)
    axis.set_xlabel("edits so far")
    axis.grid()
