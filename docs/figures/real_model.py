"""The figure of "Results on a real model": scores of single edits by method, with intervals, by two scorings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from errata.benchmarks.reports.naming import readable
from errata.benchmarks.reports.palette import GREY, LOOKS
from errata.benchmarks.reports.panels import Panel, png

PANELS = {
    "reliability": "Reliability, %",
    "generalization": "Generalization, %",
    "locality": "Locality, %",
    "distracting_locality": "Distracting locality, %",
}
# Scoring, how far above or below the method's line it is drawn, filled or hollow.
SCORINGS = (("probability", 0.15, True), ("generation", -0.15, False))


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw a panel per metric as PNG. A line is a method; filled: probability comparison, hollow: free generation."""
    panels = [
        Panel(title, partial(_draw, data=data, metric=metric, named=not place), (2.6, 3.0))
        for place, (metric, title) in enumerate(PANELS.items())
    ]
    return png(panels, across=4)


def _draw(axis: Any, *, data: Mapping[str, Any], metric: str, named: bool) -> None:
    rows = data["rows"]
    for place, row in enumerate(rows):
        colour = LOOKS[row["method"]].colour
        for scoring, off, filled in SCORINGS:
            low, mean, high = (100 * row[scoring][metric][key] for key in ("low", "mean", "high"))
            height = len(rows) - 1 - place + off
            axis.plot([low, high], [height] * 2, color=colour, linewidth=1.2)
            axis.plot(
                mean, height, marker="o", markersize=4, color=colour, markerfacecolor=colour if filled else "white"
            )
    for scoring, _, filled in SCORINGS:
        axis.axvline(
            100 * data["untouched"][scoring][metric]["mean"], color=GREY, linewidth=1, linestyle="-" if filled else ":"
        )
    axis.set_yticks(
        range(len(rows)), [readable(row["method"]) for row in reversed(rows)] if named else [""] * len(rows)
    )
    axis.set_xlim(-4, 104)
    axis.grid(axis="x", linewidth=0.4, alpha=0.4)
