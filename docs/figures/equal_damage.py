"""The figure and the tables of "Equal damage": what edits achieve against what they cost, on two models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from errata.benchmarks.reports.naming import readable
from errata.benchmarks.reports.panels import png
from errata.benchmarks.reports.strengths import cost_panel

METRICS = ("reliability", "generalization", "locality")
TITLES = {"world": "testbed", "real": "SmolLM2-135M"}


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw a row of panels per model, one panel per metric."""
    panels = []
    for where, name in TITLES.items():
        named = [(readable(row["method"]), _run(row)) for row in data[where]["rows"] if len(row["points"]) > 0]
        panels += [cost_panel(f"{metric.capitalize()}, {name}", named, "probability", metric) for metric in METRICS]
    return png(panels, across=3)


def _run(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as the results of a run of the dial."""
    points = [
        {
            "strength": point["strength"],
            "rise": {"value": point["rise"], "error": point["error"]},
            "summary": {"probability": {metric: {"mean": point[metric]} for metric in METRICS}},
        }
        for point in row["points"]
    ]
    return {"names": {"editor": row["method"]}, "dial": {"points": points, "fixed": row["fixed"]}}


def table(data: Mapping[str, Any], where: str) -> list[str]:
    """Return the lines of a model's table in Markdown, as the page has them."""
    caps = [entry["cap"] for entry in data[where]["rows"][0]["leagues"]]
    lines = ["| | full strength | rise of the loss | " + " | ".join(f"{cap:g}" for cap in caps) + " |"]
    lines.append("|---|---|---:|" + "---|" * len(caps))
    for row in data[where]["rows"]:
        leagues = [f"{entry['strength']:.3g}: {_scores(entry)}" for entry in row["leagues"]]
        full = row["full"]
        cells = [readable(row["method"]), _scores(full), _rise(full), *leagues]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rise(point: Mapping[str, float]) -> str:
    return "0" if point["rise"] == 0 else f"{point['rise']:.1e} ± {point['error']:.0e}"


def _scores(point: Mapping[str, float]) -> str:
    return " · ".join("-" if point[metric] is None else f"{100 * point[metric]:.0f}" for metric in METRICS)
