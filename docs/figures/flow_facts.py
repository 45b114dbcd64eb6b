"""The figure of many flows on "Information flow": what reaches the last token's state from where, by layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from errata.benchmarks.reports.palette import BLUE, INK, VERMILION
from errata.benchmarks.reports.panels import Panel, png

LINES = (("subject", BLUE, "-"), ("attention", INK, (0, (1, 1.5))), ("mlp", VERMILION, (0, (4, 2))))
LABELS = {"subject": "attention, from the subject", "attention": "attention, all of it", "mlp": "MLP"}


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw the mean shares of the last token's states by layer, with 95 % intervals, a panel per model, as PNG."""
    panels = [
        Panel(f"{found['model']}, {found['n']} facts", partial(_draw, found=found), (4.2, 2.7))
        for found in data["models"]
    ]
    return png(panels, across=2)


def _draw(axis: Any, *, found: Mapping[str, Any]) -> None:
    for name, colour, dash in LINES:
        shares = found[name]
        layers = range(len(shares["mean"]))
        axis.plot(layers, shares["mean"], color=colour, linestyle=dash, linewidth=1.4, label=LABELS[name])
        axis.fill_between(layers, shares["low"], shares["high"], color=colour, alpha=0.18, linewidth=0)
    axis.set_xlabel("layer")
    axis.set_ylabel("share of the last token's state")
    axis.set_ylim(0, 1.02)
    axis.grid(linewidth=0.4, alpha=0.4)
