"""The figure of "Locating facts": the traces of a real model's facts, as heat maps and as lines with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from errata.benchmarks.reports.palette import BLUE, VERMILION
from errata.benchmarks.reports.panels import Panel, png
from errata.benchmarks.tracing.heat_maps import summary_panels, title_of

METRIC = "logit_difference"
TOKENS = (("last subject", BLUE, "-"), ("last", VERMILION, (0, (4, 2))))


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw a heat map per grid, and below it the last token of the subject and of the prompt by layer, as PNG."""
    maps = summary_panels(data, METRIC)
    lines = [
        Panel(f"{title_of(grid)}, with 95 % intervals", partial(_draw, found=found[METRIC]), maps[0].size)
        for grid, found in data["effects"].items()
    ]
    return png([*maps, *lines], across=len(maps))


def _draw(axis: Any, *, found: Mapping[str, Any]) -> None:
    for name, colour, dash in TOKENS:
        entry = found[name]
        layers = range(len(entry["mean"]))
        axis.plot(layers, entry["mean"], color=colour, linestyle=dash, linewidth=1.3, label=f"{name} token")
        axis.fill_between(layers, entry["low"], entry["high"], color=colour, alpha=0.2, linewidth=0)
    axis.axhline(0, color="#444444", linewidth=0.6)
    axis.set_xlabel("layer")
    axis.set_ylabel("share of the logit difference")
    axis.grid(linewidth=0.4, alpha=0.4)
