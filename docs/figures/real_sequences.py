"""The second figure of "Results on a real model": 200 edits one after the other, scores and damage by method."""

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
    "perplexity_ratio": "Perplexity over before",
    "drift": "Drift, nats",
}


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw a panel per measure as PNG, over the number of edits. The last point asks all facts, the others a sample."""
    panels = [Panel(title, partial(_draw, data=data, measure=measure), (2.3, 2.6)) for measure, title in PANELS.items()]
    return png(panels, across=5)


def _draw(axis: Any, *, data: Mapping[str, Any], measure: str) -> None:
    for row in data["rows"]:
        edits = [point["edits"] for point in row["points"]]
        values = [point[measure] for point in row["points"]]
        look = LOOKS[row["method"]]
        axis.plot(edits, values, color=look.colour, linewidth=1.2, label=readable(row["method"]))
        axis.plot(edits[:-1], values[:-1], linestyle="", marker="o", markersize=3, color=look.colour, mfc="white")
        axis.plot(edits[-1:], values[-1:], linestyle="", marker="o", markersize=4, color=look.colour)
    if measure in data["untouched"]:
        axis.axhline(data["untouched"][measure], color=GREY, linewidth=1)
    axis.set_xticks([0, *(point["edits"] for point in data["rows"][0]["points"])])
    axis.set_xlim(0, data["rows"][0]["points"][-1]["edits"] * 1.05)
    if measure in ("perplexity_ratio", "drift"):
        axis.set_ylim(bottom=1 if measure == "perplexity_ratio" else 0)
    else:
        axis.set_ylim(-4, 104)
    axis.set_xlabel("edits")
    axis.grid(axis="y", linewidth=0.4, alpha=0.4)
