"""General ability over the edits so far: a column per task, a row per checkpoint, what guessing gives beside each task.

    errata report runs style=ability        # untouched, after 1, 5, 10, ... edits

Li et al. 2024 (Should We Really Edit Language Models?) report abilities so. Tasks of a group, such as MMLU's subjects,
are left out where the group has a score. Shares are in percent, with the standard error over questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from errata.benchmarks.ability import ability
from errata.benchmarks.ability.ability import Score
from errata.benchmarks.reports import charts
from errata.benchmarks.reports.groups import Group
from errata.benchmarks.reports.naming import Results, labels, readable
from errata.benchmarks.reports.paper import dataset_title
from errata.benchmarks.reports.seeds import members
from errata.benchmarks.reports.styles import StyledCell, StyledTable
from errata.editors.core.errors import ConfigError

STYLE, BEFORE = "ability", "before"
Scores = Mapping[str, Score]


def ability_tables(groups: Sequence[Group]) -> list[StyledTable]:
    """Return a table for each model and protocol.

    Raises:
        ConfigError: No run was asked about its general ability.
    """
    by_place: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        names = group.runs[0]["names"]
        by_place.setdefault((names["model"], names["protocol"]), []).append(group)
    found = [_table(place, own) for place, own in by_place.items()]
    measured = [table for table in found if table.columns]
    if not measured:
        raise ConfigError(f"style={STYLE}: no run measured what it shows; it needs ability.tasks=[...]")
    return measured


def _table(place: tuple[str, str], groups: Sequence[Group]) -> StyledTable:
    rows: dict[str, list[Scores]] = {}
    for group in groups:
        where = f"{dataset_title(group, groups)}, " if len(groups) > 1 else ""
        for run, label in zip(group.runs, map(readable, labels(list(group.runs))), strict=True):
            for edits, scores in _checkpoints(run):
                name = BEFORE if edits is None else f"{where}{label}, {edits:,} {'edit' if edits == 1 else 'edits'}"
                rows.setdefault(name, []).extend(scores)
    tasks = dict.fromkeys(task for scores in rows.values() for each in scores for task in each)
    table = StyledTable(STYLE, f"{Path(place[0]).name}, {place[1]}", ["errors are over questions"])
    table.columns = [("General ability", _titled(task, rows)) for task in tasks]
    table.rows = {name: [_cell(scores, task) for task in tasks] for name, scores in rows.items()}
    return table


def _checkpoints(run: Results) -> list[tuple[int | None, list[Scores]]]:
    """Return what a row of results scored, by the number of edits; None: before the first. Each seed is one entry."""
    found: dict[int | None, list[Scores]] = {}
    for one in members(run):
        asked: list[tuple[int | None, Any]] = [(None, (one.get("ability") or {}).get("before"))]
        asked += [(point.get("edits"), point.get("ability")) for point in charts.curve(one)]
        for edits, plain in asked:
            if plain:
                scores = ability.scores_of_plain(plain)
                whole = {task: score for task, score in scores.items() if score.part_of is None}
                found.setdefault(edits, []).append(whole)
    return sorted(found.items(), key=lambda item: -1 if item[0] is None else item[0])


def _titled(task: str, rows: Mapping[str, Sequence[Scores]]) -> str:
    """Return a task with what guessing gives."""
    chances = [scores[task].chance for own in rows.values() for scores in own if task in scores]
    known = next((chance for chance in chances if chance is not None), None)
    return task if known is None else f"{task} (chance {100 * known:.1f})"


def _cell(scores: Sequence[Scores], task: str) -> StyledCell | None:
    """Return a task's score, the mean over seeds where there are several."""
    own = [each[task] for each in scores if task in each]
    if not own:
        return None
    if own[0].metric not in ability.SHARES:
        return StyledCell(fmean(score.value for score in own), digits=2)
    errors = [score.stderr for score in own if score.stderr is not None]
    spread = math.sqrt(math.fsum(error**2 for error in errors)) / len(own) if len(errors) == len(own) else None
    return StyledCell(100 * fmean(score.value for score in own), None if spread is None else 100 * spread)
