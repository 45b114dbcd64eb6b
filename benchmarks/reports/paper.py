"""Tables in the shape that papers print: one row per method, one column per dataset and metric, under one scoring.

    errata report runs style=paper scoring=probability

There is one table for each model and protocol. Its numbers and marks are those of the report.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from errata.benchmarks.datasets.published import BENCHMARKS
from errata.benchmarks.reports import glossary
from errata.benchmarks.reports.counts import count_of
from errata.benchmarks.reports.escaping import csv_cell, markdown_text
from errata.benchmarks.reports.groups import Cell, Group
from errata.benchmarks.reports.naming import Results, flat_settings, labels, readable
from errata.benchmarks.reports.tables import confidence, latex_cell, latex_text, markdown_cell, share
from errata.benchmarks.runs.json_values import digest
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

SCORINGS = tuple(name for name, _ in glossary.SCORING_TITLES)
# Settings in which the columns of one row may differ.
_OF_COLUMNS = ("dataset", "n_edits", "seed", "editor.seed", "out", "time_limit")
_WRITTEN: Mapping[str, str] = MappingProxyType(
    {"counterfact_plus": "CounterFact+", "counterfact": "CounterFact", "zsre": "zsRE"}
    | {name: benchmark.title for name, benchmark in BENCHMARKS.items()}
)


@dataclass(frozen=True)
class PaperTable:
    """One table.

    Attributes:
        title: Model and protocol.
        scoring: Name of the scoring.
        confidence: Of the intervals, in percent.
        datasets: (title, number of cases, number of its columns), from left to right.
        columns: Titles of the metrics.
        rows: (label, one Cell per column or None).
    """

    title: str
    scoring: str
    confidence: str
    datasets: Sequence[tuple[str, int, int]]
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]

    def cases(self) -> list[int]:
        """Return for each column the number of cases of its dataset."""
        return [n for _, n, width in self.datasets for _ in range(width)]

    def names(self) -> list[str]:
        """Return the dataset and the metric of each column in one text."""
        datasets = [title for title, _, width in self.datasets for _ in range(width)]
        return [f"{dataset}, {metric}" for dataset, metric in zip(datasets, self.columns, strict=True)]


def paper_tables(groups: Sequence[Group], scoring: str) -> list[PaperTable]:
    """Return one table for each model and protocol.

    Args:
        groups: As a report has them.
        scoring: One of `SCORINGS`.

    Raises:
        ConfigError: an unknown scoring, or one that no run measured.
    """
    if scoring not in SCORINGS:
        raise ConfigError(f"scoring={scoring}: unknown scoring{did_you_mean(scoring, SCORINGS)}")
    measured = [group for group in groups if any(name == scoring for name, _ in group.cells)]
    if not measured:
        raise ConfigError(f"scoring={scoring}: no run measured it; generation needs generation.tokens above 0")
    by_place: dict[tuple[str, str], list[Group]] = {}
    for group in measured:
        names = group.runs[0]["names"]
        by_place.setdefault((names["model"], names["protocol"]), []).append(group)
    return [_table(f"{Path(model).name}, {protocol}", own, scoring) for (model, protocol), own in by_place.items()]


def _table(title: str, groups: Sequence[Group], scoring: str) -> PaperTable:
    rows = {method_key(run): without_columns(run) for group in groups for run in group.runs}
    cells: dict[str, list[Cell | None]] = {key: [] for key in rows}
    columns: list[str] = []
    datasets: list[tuple[str, int, int]] = []
    for group in groups:
        there = [(name, shown) for name, shown in group.columns() if (scoring, name) in group.cells]
        own = {method_key(run): index for index, run in enumerate(group.runs)}
        for key, row in cells.items():
            row += [group.cells[scoring, name][own[key]] if key in own else None for name, _ in there]
        columns += [shown for _, shown in there]
        datasets.append((dataset_title(group, groups), group.n, len(there)))
    named = map(readable, labels(list(rows.values())))
    level = " or ".join(dict.fromkeys(map(confidence, groups)))
    shown = list(zip(named, cells.values(), strict=True))
    return PaperTable(title, scoring, level, datasets, columns, shown)


def method_key(run: Results) -> str:
    """Return a digest of the method with its settings, which the columns of one row have in common."""
    own = without_columns(run)
    return digest([own["names"], own["config"]])


def without_columns(run: Results) -> Results:
    """Return a run without the settings in which the columns of one row may differ."""
    settings = flat_settings(run["config"])
    own = {name: v for name, v in settings.items() if not {name, name.split(".")[0]} & set(_OF_COLUMNS)}
    return {**run, "names": {**run["names"], "dataset": ""}, "config": own}


def dataset_title(group: Group, groups: Sequence[Group]) -> str:
    """Return the dataset of a group as papers write it, with the settings that tell it apart from others."""
    name = group.runs[0]["names"]["dataset"]
    short = name.removeprefix("world_")
    written = _WRITTEN.get(short, short)
    title = f"{written} (world)" if short != name else written
    alike = [other for other in groups if other.runs[0]["names"]["dataset"] == name]
    if len(alike) == 1:
        return title
    settings = ", ".join(group.title.split(", ")[3:])  # after model, dataset and protocol
    return f"{title}, {settings or count_of(group.n, 'case')}"


def markdown(tables: Sequence[PaperTable]) -> str:
    """Return the tables in Markdown."""
    lines: list[str] = []
    for table in tables:
        over = "; ".join(f"{title}: {count_of(n, 'case')}" for title, n, _ in table.datasets)
        note = f"{_scoring(table)}, percent, with {table.confidence} % intervals, or ± deviations over seeds."
        lines += [f"## {table.title}", "", f"{note} {over}.", ""]
        lines += [_line(["Method", *table.names()]), _line(["---", *["---:"] * len(table.columns)])]
        for label, cells in table.rows:
            shown = (markdown_cell(cell, n) for cell, n in zip(cells, table.cases(), strict=True))
            lines.append(_line([markdown_text(label), *shown]))
        lines.append("")
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _scoring(table: PaperTable) -> str:
    return dict(glossary.SCORING_TITLES)[table.scoring]


def latex(tables: Sequence[PaperTable]) -> str:
    """Return the tables in LaTeX, for \\usepackage{booktabs}."""
    return "\n".join("\n".join([*_latex_lines(table), ""]) for table in tables)


def _latex_lines(table: PaperTable) -> list[str]:
    heads, rules, first = [], [], 2
    for title, n, width in table.datasets:
        heads.append(rf"\multicolumn{{{width}}}{{c}}{{{latex_text(title)} ($n={n}$)}}")
        rules.append(rf"\cmidrule(lr){{{first}-{first + width - 1}}}")
        first += width
    caption = f"{latex_text(table.title)}. {_scoring(table)}, percent, with {table.confidence}"
    rows = [
        " & ".join([latex_text(label), *(latex_cell(c, n) for c, n in zip(cells, table.cases(), strict=True))]) + r" \\"
        for label, cells in table.rows
    ]
    return [
        r"% Needs \usepackage{booktabs}. Bold: best of its column; underlined: cannot be told from it.",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{caption}\,\% intervals, or deviations over seeds.}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(["", *heads]) + r" \\",
        " ".join(rules),
        " & ".join(["Method", *map(latex_text, table.columns)]) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]


def as_csv(tables: Sequence[PaperTable]) -> str:
    """Return the tables as CSV, one after the other: percent, with the interval or deviation and n beside each mean."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for table in tables:
        parts = ("", " low", " high", " n", " deviation", " seeds")
        heads = [f"{name}{part}" for name in table.names() for part in parts]
        writer.writerow(["table", "method", *map(csv_cell, heads)])
        for label, cells in table.rows:
            writer.writerow(
                [csv_cell(table.title), csv_cell(label), *(value for cell in cells for value in _values(cell))]
            )
    return text.getvalue()


def _values(cell: Cell | None) -> list[str]:
    if cell is None:
        return [""] * 6
    spread = "" if cell.deviation is None else share(cell.deviation)
    return [share(cell.mean), share(cell.low), share(cell.high), str(cell.n), spread, str(cell.seeds)]
