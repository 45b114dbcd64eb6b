"""The figure and the tables of "Attribution": the components of a model's facts, and edits of ablations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from errata.benchmarks.reports.panels import png
from errata.benchmarks.tracing.attribution_panels import attribution_panels, largest_sum

METRICS = ("reliability", "generalization", "locality")


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw a row of panels per model: sums by layer, the strongest components, and the check on fresh masks."""
    most = max(largest_sum(data[where]) for where in ("testbed", "real"))
    panels = [
        replace(panel, title=f"{panel.title}, {name}")
        for where, name in (("testbed", "testbed"), ("real", "SmolLM2-135M"))
        for panel in attribution_panels(data[where], most)
    ]
    return png(panels, across=3)


def fits(data: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of masks and fits in Markdown, as the page has it."""
    lines = ["| masks | fit | kept 0.95 | 0.9 | 0.8 |", "|---:|---|---:|---:|---:|"]
    for row in data["fits"]:
        cells = [f"{row['masks']:,}", row["fit"], *(f"{value:.2f}" for value in row["correlations"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def edits(data: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of edits in Markdown, as the page has it."""
    lines = ["| | reliability | generalization | locality | said | perplexity |", "|---|---:|---:|---:|---:|---:|"]
    for row in data["edits"]:
        scores = [f"{100 * row[metric]:.0f}" for metric in (*METRICS, "generated")]
        lines.append(f"| {' | '.join([row['name'], *scores])} | × {row['perplexity']:.2f} |")
    return lines
