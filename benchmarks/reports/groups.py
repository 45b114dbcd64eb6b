"""Runs over the same cases side by side: every metric of every run, the best of them, and what cannot be told from it.

The best mean alone says little where cases are few. Each other run is therefore compared with the best one over the
same cases (evaluate/paired.py), and is tied with it unless both the interval and the test tell them apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from errata.benchmarks.reports import comparing
from errata.benchmarks.reports.comparing import DAMAGE, CaseValues
from errata.benchmarks.reports.figures import METRIC_TITLES, PROTOCOL_TITLES
from errata.benchmarks.reports.naming import Results, file_names, grouped, labels, readable, titles
from errata.benchmarks.runs import summary
from errata.benchmarks.runs.results import read_records
from errata.benchmarks.runs.run_folder import RECORDS
from errata.editors.core.errors import DatasetError
from errata.evaluate import metrics
from errata.evaluate.intervals import bootstrap, bootstrap_of_means
from errata.evaluate.paired import difference

SCORE = "score"
# Of these, less is better.
LOWER = ("perplexity", "drift")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run's mean of one metric with its interval over `n` cases; whether it is the group's best, and whether it
    cannot be told from the best. `not_finite`: of how many cases the value is infinite; mean and interval are over the
    others, NaN without any."""

    mean: float
    low: float
    high: float
    n: int
    is_best: bool = False
    is_tied: bool = False
    not_finite: int = 0

    def lowest_first(self) -> tuple[int, float]:
        """Return its sort key among cells where less is better: an infinite value is worse than any other."""
        return self.not_finite, math.inf if math.isnan(self.mean) else self.mean


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs over the same cases of one model.

    Attributes:
        title: Model, dataset, protocol.
        name: For files and anchors; no other group's.
        runs, labels: As long as each other.
        scoring: The one that the dataset's papers use.
        values: By case, of each run; empty where its records are gone.
        cells: {(scoring, metric): one Cell per run, None where it was not measured}.
    """

    title: str
    name: str
    runs: Sequence[Results]
    labels: Sequence[str]
    scoring: str
    values: Sequence[CaseValues]
    cells: Mapping[tuple[str, str], Sequence[Cell | None]]

    @property
    def is_paired(self) -> bool:
        """Whether all records are there, so that ties could be found."""
        return all(self.values)

    def scorings(self) -> list[tuple[str, str]]:
        """Name and title of what was measured, the papers' first."""
        there = [entry for entry in PROTOCOL_TITLES if any(name == entry[0] for name, _ in self.cells)]
        return sorted(there, key=lambda entry: entry[0] != self.scoring)

    def columns(self) -> list[tuple[str, str]]:
        """Name and title of the shares that were measured under any scoring, the score first."""
        there = {metric for _, metric in self.cells}
        titles = ((SCORE, "Score"), *((name, title.replace("\n", " ")) for name, title in METRIC_TITLES))
        return [entry for entry in titles if entry[0] in there]

    def row(self, place: int, scoring: str) -> list[Cell | None]:
        """A run's cells under a scoring, one for each of `columns`."""
        return [self.cells.get((scoring, metric), [None] * len(self.runs))[place] for metric, _ in self.columns()]


def groups(runs: Sequence[Results]) -> list[Group]:
    """The groups of runs, in the order of their first ones, each with its best and its ties found."""
    found = grouped(runs)
    said = titles(found)
    return [_group(*entry) for entry in zip(said, file_names(said), found, strict=True)]


def _group(title: str, own_name: str, runs: Sequence[Results]) -> Group:
    values = [_case_values(run) for run in runs]
    cells: dict[tuple[str, str], list[Cell | None]] = {}
    for name, _ in PROTOCOL_TITLES:
        if any(row := _scores(runs, values, name)):
            cells[name, SCORE] = row
    for name, metric in comparing.measures():
        if name == DAMAGE:
            row = _damage(runs, values, metric)
        else:
            row = [_cell(run["summary"].get(name, {}).get(metric)) for run in runs]
        if any(row):
            cells[name, metric] = _marked(row, values, name, metric, runs[0])
    scoring = summary.papers_scoring(runs[0]["names"]["dataset"])
    return Group(title, own_name, runs, [readable(label) for label in labels(runs)], scoring, values, cells)


def _case_values(run: Results) -> CaseValues:
    """Nothing where the records are gone or damaged: then means can be shown, and no ties."""
    try:
        records = read_records(Path(run["folder"]) / RECORDS)
    except DatasetError:
        return {}
    return {record["case"]: comparing.values_of(record) for record in records}


def _cell(entry: Mapping[str, Any] | None) -> Cell | None:
    return None if entry is None else Cell(entry["mean"], entry["low"], entry["high"], entry["n"])


def _damage(runs: Sequence[Results], values: Sequence[CaseValues], metric: str) -> list[Cell | None]:
    row: list[Cell | None] = []
    for run, found in zip(runs, values, strict=True):
        each = [case[DAMAGE][metric] for case in found.values() if metric in case[DAMAGE]]
        row.append(_damage_cell(each, run["config"]) if each else None)
    return row


def _damage_cell(each: Sequence[float], config: Mapping[str, Any]) -> Cell:
    finite = comparing.finite(each)
    missing = len(each) - len(finite)
    if not finite:
        return Cell(math.nan, math.nan, math.nan, len(each), not_finite=missing)
    found = bootstrap(finite, seed=config["seed"], confidence=config["confidence"])
    return Cell(found.mean, found.low, found.high, len(each), not_finite=missing)


# --- the best, and what cannot be told from it --------------------------------------------------------------------


def _marked(
    row: Sequence[Cell | None], values: Sequence[CaseValues], scoring: str, metric: str, run: Results
) -> list[Cell | None]:
    best = _best(row, lower=metric in LOWER)
    if best is None:
        return list(row)
    config, marked = run["config"], list[Cell | None]()
    for place, cell in enumerate(row):
        pairs = comparing.paired(values[best], values[place], scoring, metric)
        is_tied = False
        if cell is not None and place != best and pairs:
            a, b = zip(*pairs, strict=True)
            found = difference(a, b, seed=config["seed"], confidence=config["confidence"])
            is_tied = not found.is_significant
        marked.append(_as(cell, row[best], is_tied=is_tied))
    return marked


def _as(cell: Cell | None, best: Cell | None, *, is_tied: bool) -> Cell | None:
    """The cell with its marks; equal means are both the best."""
    if cell is None or best is None:
        return cell
    is_best = cell.lowest_first() == best.lowest_first()
    return dataclasses.replace(cell, is_best=is_best, is_tied=is_tied and not is_best)


def _best(row: Sequence[Cell | None], *, lower: bool = False) -> int | None:
    """The place of the best mean; None where there is nothing to be better than."""
    ranks = {place: cell.lowest_first() for place, cell in enumerate(row) if cell is not None}
    if len(set(ranks.values())) < 2:
        return None
    return min(ranks, key=ranks.__getitem__) if lower else max(ranks, key=ranks.__getitem__)


def _scores(runs: Sequence[Results], values: Sequence[CaseValues], scoring: str) -> list[Cell | None]:
    """The score, from the records; two are told apart by drawing their cases together."""
    columns = [metrics.score_columns(list(found.values()), scoring) for found in values]
    row = [_score_cell(run, entry) for run, entry in zip(runs, columns, strict=True)]
    best = _best(row)
    if best is None:
        return row
    return [
        _as(cell, row[best], is_tied=cell is not None and _ties(runs[0], values, best, place, scoring))
        for place, cell in enumerate(row)
    ]


def _score_cell(run: Results, columns: list[list[float]] | None) -> Cell | None:
    if columns is None:
        return None
    config = run["config"]
    options = {"seed": config["seed"], "confidence": config["confidence"]}
    return _cell(bootstrap_of_means(columns, metrics.harmonic_means, **options).as_dict())


def _ties(run: Results, values: Sequence[CaseValues], best: int, place: int, scoring: str) -> bool:
    """Whether the interval of the difference of two scores holds zero."""
    shared = [case for case in values[best] if case in values[place]]
    a, b = (metrics.score_columns([values[i][case] for case in shared], scoring) for i in (best, place))
    if a is None or b is None:
        return False

    def apart(means: np.ndarray) -> np.ndarray:
        return metrics.harmonic_means(means[..., len(a) :]) - metrics.harmonic_means(means[..., : len(a)])

    config = run["config"]
    found = bootstrap_of_means([*a, *b], apart, seed=config["seed"], confidence=config["confidence"])
    return found.low <= 0 <= found.high
