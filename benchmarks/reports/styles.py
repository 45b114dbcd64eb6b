"""The columns of published tables: one row per method and one for the untouched model, in percent, with errors.

    errata report runs style=alphaedit        # Eff, Gen, Spe, S, Flu, Consis; the collapse point of a sequence
    errata report runs style=wild             # Rel, Gen, Loc by free answers; Cap; seconds per edit
    errata report runs style=knowedit         # Edit Succ., Portability and Locality with their groups, Fluency
    errata report runs style=wikibigedit      # Update, Rephrase, Persona, Multi-hop, Locality: a row per interval

An error is the standard error of a mean over cases; that of a harmonic mean is by the jackknife, and that of Cap by the
standard errors of its tasks. There is one table for each model and protocol.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from errata.benchmarks.ability import ability
from errata.benchmarks.reports import charts, glossary
from errata.benchmarks.reports.groups import Group
from errata.benchmarks.reports.naming import Results, labels, readable
from errata.benchmarks.reports.paper import dataset_title, method_key, without_columns
from errata.benchmarks.reports.seeds import members
from errata.benchmarks.runs import summary
from errata.benchmarks.runs.results import is_sequence, read_records
from errata.benchmarks.runs.run_folder import RECORDS
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError, DatasetError
from errata.evaluate import metrics

COLLAPSED = 0.6  # CP@60
STYLES = ("alphaedit", "wild", "knowedit", "wikibigedit", "ability")  # the last one is in ability_table.py
Moment = Literal["before", "after"]


@dataclass(frozen=True)
class StyledCell:
    """A number as a table prints it: in percent, or as it is; `error` is its standard error.

    Attributes:
        text: Stands in place of the number.
    """

    mean: float
    error: float | None = None
    text: str | None = None
    digits: int = 1

    def shown(self, plus_minus: str = "±") -> str:
        """Return the number with its error: "98.9 ± 0.2"."""
        if self.text is not None:
            return self.text
        spread = "" if self.error is None else f" {plus_minus} {self.error:.{self.digits}f}"
        return f"{self.mean:.{self.digits}f}{spread}"


@dataclass(frozen=True)
class Measured:
    """What a row of results measured before or after its edits.

    Attributes:
        run: As in results.json; of several seeds, combined.
        moment: Which of the two.
        interval: Only the cases of this interval of time; None: all.
    """

    run: Results
    moment: Moment = "after"
    interval: str | None = None

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The records of all seeds; none where some are gone or damaged."""
        try:
            found = [each for run in members(self.run) for each in read_records(Path(run["folder"]) / RECORDS)]
        except DatasetError:
            return []
        return [each for each in found if self.interval is None or each.get("interval") == self.interval]

    @cached_property
    def cases(self) -> list[metrics.Values]:
        """The values of each case."""
        return [metrics.case_values(summary.outcomes(record, self.moment)) for record in self.records]

    def table(self) -> Mapping[str, Any]:
        """Return the means of results.json by scoring and metric."""
        return self.run["summary" if self.moment == "after" else "before"]

    def share(self, scoring: str, metric: str) -> StyledCell | None:
        """Return a metric's mean over cases, in percent; None where it was not measured."""
        values = [case[scoring][metric] for case in self.cases if metric in case.get(scoring, {})]
        if values:
            return _percent(values)
        entry = self.table().get(scoring, {}).get(metric)
        return None if entry is None or self.interval is not None else StyledCell(100 * entry["mean"])

    def count(self) -> StyledCell | None:
        """Return the number of cases."""
        return StyledCell(math.nan, text=f"{len(self.records):,}") if self.records else None

    def score(self, scoring: str) -> StyledCell | None:
        """Return the harmonic mean of reliability, generalization and locality, in percent."""
        columns = metrics.score_columns(self.cases, scoring)
        if columns is None:
            return None
        rows = [row for row in zip(*columns[:3], strict=True) if not any(map(math.isnan, row))]
        if not rows:
            return None
        whole = _harmonic(rows)
        return StyledCell(100 * whole, None if len(rows) < 2 else 100 * _jackknife(rows))

    def writing(self, name: str) -> StyledCell | None:
        """Return fluency or consistency in the papers' form, which is times 100 already."""
        each = [record["writing"].get(self.moment, {}) for record in self.records if "writing" in record]
        values = [table[name] / 100 for table in each if name in table]
        return _percent(values) if values else None

    def capability(self) -> StyledCell | None:
        """Return the unweighted mean over the tasks of general ability, in percent."""
        each = [ability.scores_of_plain((run.get("ability") or {}).get(self.moment)) for run in members(self.run)]
        means = [mean for mean in map(ability.mean, each) if mean is not None]
        errors = [error for error in map(ability.error_of_mean, each) if error is not None]
        if not means:
            return None
        spread = math.sqrt(math.fsum(error**2 for error in errors)) / len(means) if len(errors) == len(means) else None
        return StyledCell(100 * fmean(means), None if spread is None else 100 * spread)

    def seconds(self) -> StyledCell | None:
        """Return seconds per edit; nothing before the edits."""
        value = self.run["speed"]["seconds_per_edit"]
        return None if self.moment == "before" or value is None else StyledCell(value, digits=2)

    def collapse_point(self, scoring: str) -> StyledCell | None:
        """Return the number of edits at the first checkpoint whose reliability is below 60 %, of each seed."""
        if self.moment == "before" or not is_sequence(self.run):
            return None
        points = [collapse_point(charts.curve(run), scoring) for run in members(self.run)]
        known = [point for point in points if point is not None]
        return StyledCell(math.nan, text=" / ".join(known)) if known else None


def collapse_point(curve: Sequence[Mapping[str, Any]], scoring: str) -> str | None:
    """Return CP@60 of a sequence: "400", or "> 2,000" where no checkpoint is below; None without checkpoints."""
    found = [
        (point["edits"], entry["mean"])
        for point in curve
        if (entry := point.get("summary", {}).get(scoring, {}).get("reliability")) is not None
    ]
    if not found:
        return None
    below = next((edits for edits, mean in found if mean < COLLAPSED), None)
    return f"> {found[-1][0]:,}" if below is None else f"{below:,}"


def _percent(values: Sequence[float]) -> StyledCell:
    error = 100 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return StyledCell(100 * fmean(values), error)


def _harmonic(rows: Sequence[Sequence[float]]) -> float:
    return metrics.harmonic_mean([max(0.0, fmean(column)) for column in zip(*rows, strict=True)])


def _jackknife(rows: Sequence[Sequence[float]]) -> float:
    """Return the standard error of `_harmonic` by leaving out one row at a time."""
    n = len(rows)
    totals = [math.fsum(column) for column in zip(*rows, strict=True)]
    left = [
        metrics.harmonic_mean([max(0.0, (total - value) / (n - 1)) for total, value in zip(totals, row, strict=True)])
        for row in rows
    ]
    middle = fmean(left)
    return math.sqrt((n - 1) / n * math.fsum((value - middle) ** 2 for value in left))


# --- columns ----------------------------------------------------------------------------------------------------------

Column = tuple[str, Callable[[Measured], StyledCell | None]]


def _columns(style: str, group: Group) -> list[Column]:
    """Return the columns of a style for a dataset: title and what stands there."""
    if style == "wild":
        return _wild_columns(group)
    if style == "knowedit":
        return _knowedit_columns(group)
    if style == "wikibigedit":
        return [("n", Measured.count), *((title, _teacher_forced(metric)) for title, metric in _WIKIBIGEDIT)]
    scoring = summary.papers_scoring(group.runs[0]["names"]["dataset"])
    return [
        ("Eff", lambda row: row.share(scoring, "reliability")),
        ("Gen", lambda row: row.share(scoring, "generalization")),
        ("Spe", lambda row: row.share(scoring, "locality")),
        ("S", lambda row: row.score(scoring)),
        ("Flu", lambda row: row.writing("fluency")),
        ("Consis", lambda row: row.writing("consistency")),
        ("CP@60", lambda row: row.collapse_point(scoring)),
    ]


_WIKIBIGEDIT = (
    ("Update", "reliability"),
    ("Rephrase", "generalization/Rephrase"),
    ("Persona", "generalization/Persona"),
    ("Multi-hop", "portability/Multi_hop"),
    ("Locality", "locality"),
)


def _wild_columns(group: Group) -> list[Column]:
    if not any(scoring == "wild" for scoring, _ in group.cells):
        return []
    return [
        ("Rel", lambda row: row.share("wild", "reliability")),
        ("Gen", lambda row: row.share("wild", "generalization")),
        ("Rel, judged", lambda row: row.share("wild_judged", "reliability")),
        ("Gen, judged", lambda row: row.share("wild_judged", "generalization")),
        ("Loc", lambda row: None if row.moment == "before" else row.share("wild", "locality_unchanged")),
        ("Cap", Measured.capability),
        ("Time, s", Measured.seconds),
    ]


def _knowedit_columns(group: Group) -> list[Column]:
    found: list[Column] = [("Edit Succ.", lambda row: row.share("teacher_forced", "reliability"))]
    there = dict.fromkeys(metric for scoring, metric in group.cells if scoring == "teacher_forced")
    for metric in ("portability", "locality"):
        for name, title in glossary.metric_titles(each for each in there if each.partition("/")[0] == metric):
            found.append((title, _teacher_forced(name)))
    return [*found, ("Fluency", lambda row: row.writing("fluency"))]


def _teacher_forced(metric: str) -> Callable[[Measured], StyledCell | None]:
    return lambda row: row.share("teacher_forced", metric)


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass
class StyledTable:
    """One table: of a model and a protocol.

    Attributes:
        style: Its style.
        title: Model and protocol.
        notes: What the numbers are over, per dataset.
        columns: (dataset, column), from left to right.
        rows: {label: one cell per column, None where it was not measured}; the untouched model first.
        runs: The runs of each dataset, for the curves.
    """

    style: str
    title: str
    notes: list[str] = field(default_factory=list)
    columns: list[tuple[str, str]] = field(default_factory=list)
    rows: dict[str, list[StyledCell | None]] = field(default_factory=dict)
    runs: list[tuple[str, str, Sequence[Results]]] = field(default_factory=list)


def styled_tables(groups: Sequence[Group], style: str) -> list[StyledTable]:
    """Return one table in a style for each model and protocol.

    Raises:
        ConfigError: There is no such style, or no run measured what it shows.
    """
    if style not in STYLES:
        raise ConfigError(f"style={style}: unknown style{did_you_mean(style, STYLES)}")
    by_place: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        names = group.runs[0]["names"]
        by_place.setdefault((names["model"], names["protocol"]), []).append(group)
    found = [_table(style, place, own) for place, own in by_place.items()]
    measured = [table for table in found if table.columns]
    if not measured:
        needs = {"wild": "wild.tokens=50", "knowedit": "a dataset that is asked about"}.get(style, "a run with records")
        raise ConfigError(f"style={style}: no run measured what it shows; it needs {needs}")
    return measured


def _table(style: str, place: tuple[str, str], groups: Sequence[Group]) -> StyledTable:
    table = StyledTable(style, f"{Path(place[0]).name}, {place[1]}")
    rows = {method_key(run): without_columns(run) for group in groups for run in group.runs}
    named = ["before", *map(readable, labels(list(rows.values())))]
    intervals = _intervals(style, groups)
    table.rows = {_row_name(name, interval): [] for name in named for interval in intervals}
    for group in groups:
        title = dataset_title(group, groups)
        own = {method_key(run): Measured(run) for run in group.runs}
        whole = [Measured(group.runs[0], "before"), *(own.get(key) for key in rows)]
        measured = [row and replace(row, interval=interval) for row in whole for interval in intervals]
        for column, value in _columns(style, group):
            cells = [None if row is None else value(row) for row in measured]
            if any(cells):
                table.columns.append((title, column))
                for name, cell in zip(table.rows, cells, strict=True):
                    table.rows[name].append(cell)
        scoring = summary.papers_scoring(group.runs[0]["names"]["dataset"])
        table.notes.append(f"{title}: {_over(group, scoring, style)}")
        table.runs.append((title, scoring, group.runs))
    return table


def _intervals(style: str, groups: Sequence[Group]) -> list[str | None]:
    """Return the intervals of time that have rows of their own; one None for all cases together."""
    runs = [one for group in groups for run in group.runs for one in members(run)]
    found = {name for run in runs for name in run.get("intervals", {})}
    return [*sorted(found)] if style == "wikibigedit" and found else [None]


def _row_name(name: str, interval: str | None) -> str:
    return name if interval is None else f"{name}, {interval}"


def _over(group: Group, scoring: str, style: str) -> str:
    edits = " or ".join(dict.fromkeys(f"{run['counts']['edits']:,}" for run in group.runs))
    guessed = [ability.chance_of_plain((run.get("ability") or {}).get("after")) for run in group.runs]
    chance = f", Cap by guessing {100 * guessed[0]:.1f}" if style == "wild" and guessed[0] is not None else ""
    used = {"wild": "wild", "knowedit": "teacher_forced", "wikibigedit": "teacher_forced"}.get(style, scoring)
    return f"{edits} edits, {dict(glossary.SCORING_TITLES)[used]}{chance}"
