"""The figure of "Your own model": what more text for second moments, and another text, change in real edits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from errata.benchmarks.reports.naming import readable
from errata.benchmarks.reports.palette import GREY, LOOKS
from errata.benchmarks.reports.panels import Panel, png

# Field of a row, title of its panel, factor.
PANELS = (
    ("generalization", "Generalization, %", 100),
    ("locality", "Locality, %", 100),
    ("kl", "Drift of neighbours, nats", 1),
    ("update_ratio", "Update over weight, norms", 1),
)
TEXTS = {"factbook": "-", "me_ppl": (0, (4, 2)), "world": (0, (1, 1.5))}
NAMES = {"factbook": "World Factbook", "me_ppl": "ME-PPL", "world": "made-up world"}


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw four panels over tokens per dimension: a colour for each method, a line style for each text, as PNG."""
    panels = [
        Panel(title, partial(_draw, rows=data["rows"], field=field, factor=factor), (3.0, 2.2))
        for field, title, factor in PANELS
    ]
    return png(panels, across=4)


def _draw(axis: Any, *, rows: list[Mapping[str, Any]], field: str, factor: int) -> None:
    for method in ("rome", "memit"):
        look = LOOKS[method]
        for text, dash in TEXTS.items():
            own = [row for row in rows if (row["method"], row["text"]) == (method, text)]
            if not own:
                continue
            points = [(row["tokens_per_dimension"], factor * row[field]) for row in own]
            label = f"{readable(method)}, {NAMES[text]}"
            kind = {"color": look.colour, "marker": look.marker, "markersize": 3.5, "linewidth": 1.2}
            axis.plot(*zip(*points, strict=True), linestyle=dash, label=label, **kind)
    without = next((row for row in rows if row["text"] == "none"), None)
    if without is not None:
        axis.axhline(factor * without[field], color=GREY, linewidth=1, linestyle=":", label="ROME, no second moments")
    axis.set_xscale("log")
    ticks = sorted({row["tokens_per_dimension"] for row in rows} - {0})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("tokens per dimension")
    low, high = (0, 105) if factor == 100 else (0, None)
    axis.set_ylim(low, high)
    axis.grid(linewidth=0.4, alpha=0.4)
