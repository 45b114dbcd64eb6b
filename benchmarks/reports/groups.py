"""Rows over the same cases side by side: every metric of every row, the best of them, and what is tied with it.

A row is a run, or several runs that differ in their seed alone. The best mean alone says little where cases are few.
So each other row is compared with the best one over the same cases (evaluate/paired.py), and is tied with it unless
both the interval and the test tell them apart. Where the cases are too few for either answer, nothing is marked.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from errata.benchmarks.reports import comparing, glossary
from errata.benchmarks.reports.comparing import DAMAGE, CaseValues
from errata.benchmarks.reports.examples import Examples, examples_of
from errata.benchmarks.reports.naming import Results, file_names, grouped, labels, ordered, readable, replicates, titles
from errata.benchmarks.reports.seeds import combined, mean_values, members, over_seeds
from errata.benchmarks.runs import summary
from errata.benchmarks.runs.results import read_records
from errata.benchmarks.runs.run_folder import RECORDS
from errata.editors.core.errors import DatasetError
from errata.evaluate import metrics
from errata.evaluate.intervals import bootstrap, bootstrap_of_means
from errata.evaluate.paired import difference

SCORE = glossary.SCORE[0]
Records = Sequence[Mapping[str, Any]]
# Of these, less is better.
LOWER = ("perplexity", "drift", "priming", *metrics.LOWER)


# Of fewer cases nothing can be said about a difference.
LEAST_CASES = 2


@dataclasses.dataclass(frozen=True)
class Cell:
    """The mean of one metric in a row, with its interval.

    Attributes:
        mean, low, high: Over `n` cases. Over several seeds: the mean over seeds, and one standard deviation around it.
        n: Number of cases; over several seeds, of the cases of one.
        is_best: Whether it is the best of the group.
        is_tied: Whether it cannot be told from the best.
        not_finite: In how many cases the value is infinite. Mean and interval are over the others, NaN without any.
        deviation: Over several seeds, the standard deviation between them.
        seeds: Number of seeds.
    """

    mean: float
    low: float
    high: float
    n: int
    is_best: bool = False
    is_tied: bool = False
    not_finite: int = 0
    deviation: float | None = None
    seeds: int = 1

    def lowest_first(self) -> tuple[int, float]:
        """Return its sort key among cells where less is better: an infinite value is worse than any other."""
        return self.not_finite, math.inf if math.isnan(self.mean) else self.mean


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows over the same cases of one model.

    Attributes:
        title: Model, dataset, protocol.
        name: For files and anchors; no other group has it.
        runs: One results.json per row; of runs that differ in their seed alone, what `seeds.combined` makes of them.
        labels: One per row.
        scoring: The one that the dataset's papers use.
        values: For each row, the values of its cases; empty where its records are gone.
        cells: {(scoring, metric): one Cell per row, None where it was not measured}.
        examples: For each row, edits with what the model said.
    """

    title: str
    name: str
    runs: Sequence[Results]
    labels: Sequence[str]
    scoring: str
    values: Sequence[CaseValues]
    cells: Mapping[tuple[str, str], Sequence[Cell | None]]
    examples: Sequence[Examples] = ()

    @property
    def is_paired(self) -> bool:
        """Whether all records are there, so that ties could be found."""
        return all(self.values)

    @property
    def n(self) -> int:
        """The number of cases that most cells have."""
        counts = Counter(cell.n for cells in self.cells.values() for cell in cells if cell is not None)
        return max(counts, key=lambda n: (counts[n], n), default=0)

    def scorings(self) -> list[tuple[str, str]]:
        """Return name and title of the scorings that were measured, the papers' first."""
        there = [entry for entry in glossary.SCORING_TITLES if any(name == entry[0] for name, _ in self.cells)]
        return sorted(there, key=lambda entry: entry[0] != self.scoring)

    def columns(self) -> list[tuple[str, str]]:
        """Return name and title of the shares that were measured under any scoring, the score first."""
        there = [metric for scoring, metric in self.cells if scoring != DAMAGE]
        score = [glossary.SCORE[:2]] if SCORE in there else []
        return [*score, *glossary.metric_titles(name for name in there if name != SCORE)]

    def row(self, index: int, scoring: str) -> list[Cell | None]:
        """Return a row's cells under a scoring, one for each of `columns`."""
        return [self.cells.get((scoring, metric), [None] * len(self.runs))[index] for metric, _ in self.columns()]


def groups(runs: Sequence[Results]) -> list[Group]:
    """Return the groups of runs, in the order of their first ones, each with its best and its ties found."""
    found = grouped(runs)
    said = titles(found)
    return [_group(*entry) for entry in zip(said, file_names(said), found, strict=True)]


def rows_of(runs: Sequence[Results]) -> list[Results]:
    """Return the rows of a group: runs, those combined that differ in their seed alone."""
    return [combined(row) for row in replicates(runs)]


def _group(title: str, own_name: str, runs: Sequence[Results]) -> Group:
    rows = rows_of(ordered(runs))
    records = [[_records(run) for run in members(row)] for row in rows]
    scoring = summary.papers_scoring(rows[0]["names"]["dataset"])
    each = [[_case_values(own) for own in of_row] for of_row in records]
    values = [_over_seeds(own) for own in each]
    shown = [examples_of(own[0] or [], scoring) for own in records]
    named = list(map(readable, labels(rows)))
    return Group(title, own_name, rows, named, scoring, values, _cells(rows, each, values), shown)


def _cells(
    rows: Sequence[Results], each: Sequence[Sequence[CaseValues]], values: Sequence[CaseValues]
) -> dict[tuple[str, str], Sequence[Cell | None]]:
    cells: dict[tuple[str, str], Sequence[Cell | None]] = {}
    for name, _ in glossary.SCORING_TITLES:
        row = [_score_cell(run, own, name) for run, own in zip(rows, each, strict=True)]
        if any(row):
            cells[name, SCORE] = _scores_marked(row, values, name, rows[0])
    measured = (metric for run in rows for table in run["summary"].values() for metric in table)
    for name, metric in comparing.measures(measured):
        if name == DAMAGE:
            row = _damage(rows, values, metric)
        else:
            row = [_cell(run["summary"].get(name, {}).get(metric), run.get("seeds", 1)) for run in rows]
        if any(row):
            cells[name, metric] = _marked(row, values, name, metric, rows[0])
    return cells


def _records(run: Results) -> Records | None:
    """Return the records of a run; None where they are gone or damaged: then there are means, and no ties."""
    try:
        return read_records(Path(run["folder"]) / RECORDS)
    except DatasetError:
        return None


def _case_values(records: Records | None) -> CaseValues:
    """Return the values of a run's cases; nothing where its records are gone."""
    return {record["case"]: comparing.values_of(record) for record in records or ()}


def _over_seeds(each: Sequence[CaseValues]) -> CaseValues:
    """Return the values of a row's cases; nothing where the records of a seed are gone."""
    if not all(each):
        return {}
    return each[0] if len(each) == 1 else mean_values(each)


def _cell(entry: Mapping[str, Any] | None, seeds: int) -> Cell | None:
    if entry is None:
        return None
    return Cell(entry["mean"], entry["low"], entry["high"], entry["n"], deviation=entry.get("deviation"), seeds=seeds)


def _damage(rows: Sequence[Results], values: Sequence[CaseValues], metric: str) -> list[Cell | None]:
    row: list[Cell | None] = []
    for run, found in zip(rows, values, strict=True):
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

# "unknown": too few cases say anything; "gone": the records are gone, so that nothing can be compared.
Verdict = Literal["apart", "tied", "unknown", "gone"]


def _marked(
    row: Sequence[Cell | None], values: Sequence[CaseValues], scoring: str, metric: str, run: Results
) -> list[Cell | None]:
    """Return the cells of one metric with their marks."""
    config = run["config"]

    def verdict(best: int, index: int) -> Verdict:
        if not (values[best] and values[index]):
            return "gone"
        pairs = comparing.paired(values[best], values[index], scoring, metric)
        if len(pairs) < LEAST_CASES:
            return "unknown"
        a, b = zip(*pairs, strict=True)
        found = difference(a, b, seed=config["seed"], confidence=config["confidence"])
        return "apart" if found.is_significant else "tied"

    return _with_marks(row, verdict, lower=metric in LOWER)


def _scores_marked(
    row: Sequence[Cell | None], values: Sequence[CaseValues], scoring: str, run: Results
) -> list[Cell | None]:
    """Return the cells of the score with their marks; two scores are compared by drawing their cases together."""

    def verdict(best: int, index: int) -> Verdict:
        if not (values[best] and values[index]):
            return "gone"
        shared = [case for case in values[best] if case in values[index]]
        a, b = (metrics.score_columns([values[i][case] for case in shared], scoring) for i in (best, index))
        if a is None or b is None or len(shared) < LEAST_CASES:
            return "unknown"
        return _score_verdict(a, b, run["config"])

    return _with_marks(row, verdict)


def _score_verdict(a: list[list[float]], b: list[list[float]], config: Mapping[str, Any]) -> Verdict:
    """Return whether the interval of the difference of two scores leaves zero out."""

    def apart(means: np.ndarray) -> np.ndarray:
        return metrics.harmonic_means(means[..., len(a) :]) - metrics.harmonic_means(means[..., : len(a)])

    found = bootstrap_of_means([*a, *b], apart, seed=config["seed"], confidence=config["confidence"])
    return "tied" if found.low <= 0 <= found.high else "apart"


def _with_marks(
    row: Sequence[Cell | None], verdict: Callable[[int, int], Verdict], *, lower: bool = False
) -> list[Cell | None]:
    """Return the cells with their marks. Equal means are all the best.

    A cell is tied only where the intervals of both overlap: with intervals apart and a test that does not reject, the
    cases are too few for an answer. Where that is so for every other cell, the best has no mark either.
    """
    best = _best(row, lower=lower)
    if best is None:
        return list(row)
    top = row[best]
    assert top is not None
    is_best = [cell is not None and cell.lowest_first() == top.lowest_first() for cell in row]
    found: dict[int, Verdict] = {
        index: _checked(verdict(best, index), top, cell)
        for index, cell in enumerate(row)
        if cell is not None and not is_best[index]
    }
    if set(found.values()) == {"unknown"}:
        return list(row)
    return [
        None if cell is None else dataclasses.replace(cell, is_best=own, is_tied=found.get(index) == "tied")
        for index, (cell, own) in enumerate(zip(row, is_best, strict=True))
    ]


def _checked(verdict: Verdict, best: Cell, cell: Cell) -> Verdict:
    """Return the verdict, or "unknown" for a tie between intervals that do not overlap."""
    is_over_seeds = best.seeds > 1 or cell.seeds > 1  # deviations, which are no intervals
    are_apart = best.low > cell.high or cell.low > best.high
    return "unknown" if verdict == "tied" and are_apart and not is_over_seeds else verdict


def _best(row: Sequence[Cell | None], *, lower: bool = False) -> int | None:
    """Return the index of the best mean; None where there is nothing to be better than."""
    ranks = {index: cell.lowest_first() for index, cell in enumerate(row) if cell is not None}
    if len(set(ranks.values())) < 2:
        return None
    return min(ranks, key=ranks.__getitem__) if lower else max(ranks, key=ranks.__getitem__)


def _score_cell(run: Results, values: Sequence[CaseValues], scoring: str) -> Cell | None:
    """Return the score of a row from the values of each of its seeds; None where one cannot be computed."""
    found = []
    for member, own in zip(members(run), values, strict=True):
        config = member["config"]
        options = {"seed": config["seed"], "confidence": config["confidence"]}
        columns = metrics.score_columns(list(own.values()), scoring)
        if columns is None:
            return None
        found.append(bootstrap_of_means(columns, metrics.harmonic_means, **options).as_dict())
    return _cell(found[0] if len(found) == 1 else over_seeds(found), len(found))
