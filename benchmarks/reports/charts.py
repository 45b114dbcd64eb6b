"""The panels of a report on a group of runs: scores, their cost, the course of a sequence, and seconds.

Rows are runs, or runs that differ in their seed alone, combined (seeds.py). Courses of sequences have one line per run.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from errata.benchmarks.ability.ability import mean_of_plain
from errata.benchmarks.reports.figures import ratio_axis
from errata.benchmarks.reports.glossary import measured_titles
from errata.benchmarks.reports.naming import Results, labels, readable
from errata.benchmarks.reports.palette import MUTED, Look, looks
from errata.benchmarks.reports.panels import Panel
from errata.benchmarks.reports.seeds import members
from errata.benchmarks.runs.json_values import number
from errata.benchmarks.runs.results import is_sequence, read_curve, read_records
from errata.benchmarks.runs.run_folder import CURVE, SECONDS

# Metrics along a sequence, and how they are called.
CURVES = (("reliability", "Reliability, %"), ("generalization", "Generalization, %"), ("locality", "Locality, %"))
Point = Mapping[str, Any]


def scores(runs: Sequence[Results], scoring: str, n: int | None = None) -> list[Panel]:
    """Return one panel per metric, one row per run: mean and interval; a dotted line is the untouched model.

    Args:
        runs: Of one group.
        scoring: Whose metrics are drawn.
        n: The number of cases that the report states. A panel over another number states its own.
    """
    return [
        Panel(title + _cases(runs, scoring, name, n), partial(_score, runs=runs, scoring=scoring, metric=name), size)
        for size in [row_size(runs)]
        for name, title in measured_titles(runs, scoring)
    ]


def _cases(runs: Sequence[Results], scoring: str, metric: str, n: int | None) -> str:
    """Return the number of cases of a panel where it is not the report's."""
    found = sorted({entry["n"] for run in runs if (entry := _entry(run, scoring, metric)) is not None and "n" in entry})
    return "" if n is None or found in ([], [n]) else f" (n = {' or '.join(map(str, found))})"


WRAPPED = 26  # characters of a label in one line
_PER_CHARACTER, _PER_LINE = 0.068, 0.15  # inches of text in the size of STYLE


def row_size(runs: Sequence[Results], width: float = 1.6) -> tuple[float, float]:
    """Return the size in inches of a panel with one row per run, with room for their labels beside `width`."""
    lines = [wrapped(label).split("\n") for label in labels(runs)]
    longest = max(len(line) for label in lines for line in label)
    tallest = max(map(len, lines))
    return width + _PER_CHARACTER * longest, 0.6 + len(runs) * max(0.22, 0.05 + _PER_LINE * tallest)


def wrapped(label: str) -> str:
    """Return a label as it is drawn: methods as in their papers, long labels in several lines."""
    return "\n".join(textwrap.wrap(readable(label), WRAPPED, break_long_words=True, break_on_hyphens=False))


def _entry(run: Results, scoring: str, metric: str) -> Mapping[str, float] | None:
    return run["summary"].get(scoring, {}).get(metric)


def _score(axis: Any, *, runs: Sequence[Results], scoring: str, metric: str) -> None:
    for place, (run, look) in enumerate(zip(runs, looks(runs), strict=True)):
        entry = _entry(run, scoring, metric)
        if entry is not None:
            low, mean, high = (100 * entry[name] for name in ("low", "mean", "high"))
            axis.plot([low, high], [place, place], color=look.colour, alpha=look.alpha, linewidth=1.4)
            style = {"color": look.colour, "alpha": look.alpha, "marker": look.marker, "mew": 0}
            axis.plot(mean, place, markersize=5.5, clip_on=False, **style)
    before = runs[0]["before"].get(scoring, {}).get(metric)
    if before is not None:
        axis.axvline(100 * before["mean"], color=MUTED, linewidth=0.9, linestyle=(0, (1, 1.5)))
    _rows(axis, runs)
    axis.set_xlim(-2, 102)
    axis.set_xticks((0, 50, 100), ("0", "50", "100 %"))


def _rows(axis: Any, runs: Sequence[Results]) -> None:
    axis.set_yticks(range(len(runs)), [wrapped(label) for label in labels(runs)])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(runs) - 0.5, -0.5)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x")


def trade_off(runs: Sequence[Results], scoring: str) -> Panel | None:
    """Return what edits teach against what they leave alone: best is the upper right corner.

    It is None where locality was not asked, as in a sequence whose subjects are all among each other's neighbours.
    """
    if not any(_entry(run, scoring, "locality") for run in runs):
        return None
    return Panel("Reliability against locality", partial(_trade_off, runs=runs, scoring=scoring), (3.3, 2.9))


def _trade_off(axis: Any, *, runs: Sequence[Results], scoring: str) -> None:
    for run, look, label in zip(runs, looks(runs), labels(runs), strict=True):
        x, y = _entry(run, scoring, "locality"), _entry(run, scoring, "reliability")
        if x is not None and y is not None:
            error = [[[100 * abs(e["mean"] - e[end])] for end in ("low", "high")] for e in (x, y)]
            style = {"color": look.colour, "alpha": look.alpha, "marker": look.marker, "mew": 0, "markersize": 7}
            place = 100 * x["mean"], 100 * y["mean"]
            axis.errorbar(*place, xerr=error[0], yerr=error[1], elinewidth=0.9, label=readable(label), **style)
    axis.set_xlim(_from([_entry(run, scoring, "locality") for run in runs]), 103)
    axis.set_ylim(_from([_entry(run, scoring, "reliability") for run in runs]), 103)
    axis.set_xlabel("locality, %")
    axis.set_ylabel("reliability, %")
    axis.grid()


def _from(entries: Sequence[Mapping[str, float] | None]) -> float:
    """Return where an axis of percentages begins: below all values, and so far from 100 that none looks too large."""
    least = min((100 * entry["low"] for entry in entries if entry is not None), default=0.0)
    return max(-3.0, min(47.0, 10 * math.floor(least / 10) - 3))


def damage(runs: Sequence[Results]) -> Panel | None:
    """Return one mark per edit: its perplexity ratio. None for sequences, whose edits are not measured apart."""
    if is_sequence(runs[0]):
        return None
    curves = [[point for run in members(row) for point in curve(run)] for row in runs]
    found = [[number(p["perplexity_ratio"]) for p in points if p["perplexity_ratio"] is not None] for points in curves]
    if not any(found):
        return None
    return Panel("Perplexity per edit", partial(_damage, runs=runs, found=found), (3.3, 2.9))


def _damage(axis: Any, *, runs: Sequence[Results], found: Sequence[Sequence[float]]) -> None:
    everything = [ratio for ratios in found for ratio in ratios]
    ceiling = 3 * max([ratio for ratio in everything if math.isfinite(ratio)], default=1.0)
    for column, (ratios, look) in enumerate(zip(found, looks(runs), strict=True)):
        # Spread sideways by their order, so that they can be told apart.
        places = [column + 0.3 * (2 * ((i * 0.618) % 1) - 1) for i in range(len(ratios))]
        style = {"s": 12, "alpha": 0.75 * look.alpha, "linewidths": 0, "color": look.colour, "marker": look.marker}
        axis.scatter(places, [min(ratio, ceiling) for ratio in ratios], **style)
    _columns(axis, runs)
    ratio_axis(axis, everything)
    axis.set_ylabel("after / before")


def _columns(axis: Any, runs: Sequence[Results]) -> None:
    names = [wrapped(label) for label in labels(runs)]
    is_crowded = sum(map(len, names)) > 28
    turned: Any = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_crowded else {}
    axis.set_xticks(range(len(runs)), names, **turned)
    axis.set_xlim(-0.6, len(runs) - 0.4)


def seconds(runs: Sequence[Results]) -> Panel | None:
    """Return seconds per edit, one bar per run, on a logarithmic axis where they are far apart."""
    values = [run["speed"]["seconds_per_edit"] for run in runs]
    if not any(values):
        return None
    width, height = row_size(runs, 2.6)
    size = (max(3.3, width), height + 0.15 + 0.06 * len(runs))
    return Panel("Seconds per edit", partial(_seconds, runs=runs, values=[value or 0.0 for value in values]), size)


def _seconds(axis: Any, *, runs: Sequence[Results], values: Sequence[float]) -> None:
    some = [value for value in values if value > 0]
    is_wide = max(some) > 20 * min(some)
    for place, (value, look) in enumerate(zip(values, looks(runs), strict=True)):
        axis.barh(place, value, height=0.62, color=look.colour, alpha=look.alpha, linewidth=0)
        axis.annotate(f"{value:.3g}", (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    _rows(axis, runs)
    if is_wide:
        axis.set_xscale("log")
        axis.set_xlim(min(some) / 2, 3 * max(some))
    else:
        axis.set_xlim(0, 1.18 * max(some))
        axis.locator_params(axis="x", nbins=4)
    axis.set_xlabel("seconds" + (", logarithmic" if is_wide else ""))


def costs(runs: Sequence[Results], scoring: str) -> list[Panel]:
    """Return what edits teach against what they break, and how long they take."""
    panels = [trade_off(runs, scoring), damage(runs), able(_each(runs)), seconds(runs)]
    return [panel for panel in panels if panel is not None]


# --- along a sequence ---------------------------------------------------------------------------------------------


def _each(rows: Sequence[Results]) -> list[Results]:
    """Return the runs of all rows, one for each seed."""
    return [run for row in rows for run in members(row)]


def curve(run: Results) -> list[Point]:
    """Return the damage that a run recorded, by edit or by checkpoint; nothing where the file is gone.

    Raises:
        DatasetError: The file is damaged.
    """
    return [*read_curve(Path(run["folder"]) / CURVE, is_sequence=is_sequence(run))]


def collapse(runs: Sequence[Results]) -> list[Panel]:
    """Return scores of all edits so far, facts kept and perplexity against the number of edits; only for sequences."""
    if not is_sequence(runs[0]):
        return []
    runs = _each(runs)
    found = [curve(run) for run in runs]
    if max(map(len, found)) < 2:  # a single checkpoint is no curve
        return []
    panels = [
        Panel(title, partial(_lines, runs=runs, found=found, value=partial(_shares, metric=metric)))
        for metric, title in CURVES
    ]
    if any(point["retention"] is not None for points in found for point in points):
        panels.append(Panel("Known facts kept, %", partial(_lines, runs=runs, found=found, value=_kept)))
    return [*panels, Panel("Perplexity", partial(_perplexities, runs=runs, found=found))]


def _shares(point: Point, *, metric: str) -> tuple[float, float, float] | None:
    entry = point["summary"].get("probability", {}).get(metric)
    return None if entry is None else (100 * entry["low"], 100 * entry["mean"], 100 * entry["high"])


def _kept(point: Point) -> tuple[float, float, float] | None:
    kept = point["retention"]
    return None if kept is None else (100 * kept, 100 * kept, 100 * kept)


def _ratio(point: Point) -> tuple[float, float, float] | None:
    ratio = number(point["perplexity_ratio"])
    return (ratio, ratio, ratio) if math.isfinite(ratio) else None


Value = Callable[[Point], tuple[float, float, float] | None]


def _lines(axis: Any, *, runs: Sequence[Results], found: Sequence[Sequence[Point]], value: Value) -> None:
    for points, look, label in zip(found, looks(runs), labels(runs), strict=True):
        _line(axis, points, look, value, label)
    axis.set_ylim(0, 104)
    _edits_axis(axis)


def _perplexities(axis: Any, *, runs: Sequence[Results], found: Sequence[Sequence[Point]]) -> None:
    for points, look, label in zip(found, looks(runs), labels(runs), strict=True):
        _line(axis, [{"edits": 0, "perplexity_ratio": 1.0}, *points], look, _ratio, label)
    ratio_axis(axis, [value[1] for points in found for point in points if (value := _ratio(point)) is not None])
    axis.set_ylabel("after / before")
    _edits_axis(axis)


def _edits_axis(axis: Any) -> None:
    axis.set_xlabel("edits")
    axis.set_xlim(left=0)
    axis.grid()


def _line(axis: Any, points: Sequence[Point], look: Look, value: Value, label: str) -> None:
    some = [(point["edits"], found) for point in points if (found := value(point)) is not None]
    places = [x for x, _ in some]
    low, mean, high = zip(*(found for _, found in some), strict=True) if some else ((), (), ())
    style: Any = {"color": look.colour, "alpha": look.alpha, "linestyle": look.dash, "linewidth": 1.4}
    axis.plot(places, mean, marker=look.marker, markersize=3.5, mew=0, label=readable(label), **style)
    axis.fill_between(places, low, high, color=look.colour, alpha=0.14 * look.alpha, linewidth=0)


# --- ability ------------------------------------------------------------------------------------------------------


def able(runs: Sequence[Results]) -> Panel | None:
    """Return general ability against perplexity, one mark per checkpoint; None where no task was asked."""
    found = [_able(run) for run in runs]
    if not any(len(points) > 1 for points in found):
        return None
    return Panel("Ability against perplexity", partial(_abilities, runs=runs, found=found), (3.3, 2.9))


def _able(run: Results) -> list[tuple[float, float]]:
    """Return pairs of the untouched model and of the checkpoints: perplexity ratio, mean over lm-eval's tasks."""
    asked = [(1.0, (run.get("ability") or {}).get("before"))]
    asked += [(number(point["perplexity_ratio"]), point.get("ability")) for point in curve(run)]
    means = [(ratio, mean_of_plain(scores)) for ratio, scores in asked]
    return [(ratio, 100 * value) for ratio, value in means if value is not None and math.isfinite(ratio)]


def _abilities(axis: Any, *, runs: Sequence[Results], found: Sequence[Sequence[tuple[float, float]]]) -> None:
    for points, look, label in zip(found, looks(runs), labels(runs), strict=True):
        style: Any = {"color": look.colour, "alpha": look.alpha, "linestyle": look.dash, "linewidth": 1.0}
        axis.plot(*zip(*points, strict=True), marker=look.marker, markersize=4.5, mew=0, label=readable(label), **style)
    axis.set_xscale("log")
    axis.set_xlabel("perplexity, after / before")
    axis.set_ylabel("lm-eval, mean of tasks, %")
    axis.set_ylim(0, 104)
    axis.grid()


# The cost of a sequence as it grows: field of seconds.jsonl, title, and the seconds or bytes of its unit.
GROWTH = (
    ("edit", "Milliseconds per edit", 1e-3),
    ("memory", "Memory in use, MB", 1e6),
    ("disk", "Edits on disk, MB", 1e6),
)
_PLACES = 50  # most points along a sequence; a point is the median of the edits around it


def growth(runs: Sequence[Results]) -> list[Panel]:
    """Return time, memory and disk against the number of edits; only for sequences that are long enough."""
    if not is_sequence(runs[0]):
        return []
    runs = _each(runs)
    found = [_held(run) for run in runs]
    return [
        Panel(title, partial(_growth, runs=runs, found=found, field=field, unit=unit))
        for field, title, unit in GROWTH
        if any(len(_medians(points, field)) > 2 for points in found)
    ]


def _held(run: Results) -> list[Mapping[str, Any]]:
    """Return one entry per batch of edits, in their order."""
    path = Path(run["folder"]) / SECONDS
    each = {entry["edits"]: entry for entry in read_records(path) if "edits" in entry} if path.is_file() else {}
    return [each[edits] for edits in sorted(each)]


def _medians(points: Sequence[Mapping[str, Any]], field: str) -> list[tuple[float, float]]:
    some = [(point["edits"], point[field]) for point in points if point.get(field) is not None]
    width = max(1, math.ceil(len(some) / _PLACES))
    parts = [some[start : start + width] for start in range(0, len(some), width)]
    return [(median(x for x, _ in part), median(y for _, y in part)) for part in parts]


def _growth(
    axis: Any, *, runs: Sequence[Results], found: Sequence[Sequence[Mapping[str, Any]]], field: str, unit: float
) -> None:
    for points, look, label in zip(found, looks(runs), labels(runs), strict=True):
        some = [(x, y / unit) for x, y in _medians(points, field)]
        style: Any = {"color": look.colour, "alpha": look.alpha, "linestyle": look.dash, "linewidth": 1.4}
        if some:
            axis.plot(*zip(*some, strict=True), label=readable(label), **style)
            axis.plot(*some[-1], color=look.colour, alpha=look.alpha, marker=look.marker, markersize=5, mew=0)
    axis.set_ylim(bottom=0)
    _edits_axis(axis)
