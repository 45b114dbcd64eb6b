"""Pictures of an attribution: where its weights are, the strongest components, and predictions beside measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from errata.benchmarks.reports.palette import BLUE, VERMILION
from errata.benchmarks.reports.panels import Panel, png

# The colour of each keep rate, the highest first; further ones begin again.
_COLOURS = (BLUE, VERMILION, "#009e73", "#cc79a7", "#e69f00")


def of_attribution(summary: Mapping[str, Any], title: str) -> bytes:
    """Return the picture of a summary as PNG; see `attribution_summary.summarise_attribution`."""
    return png(attribution_panels(summary), across=3, title=title)


def largest_sum(summary: Mapping[str, Any]) -> float:
    """Return the largest sum of a layer's components, without its sign: the end of the scale of colours."""
    return max(max(map(abs, row)) for row in summary["sums"].values()) or 1.0


def attribution_panels(summary: Mapping[str, Any], most: float | None = None) -> list[Panel]:
    """Return the panels of a summary: sums by layer and kind, the strongest components, and the checks.

    Args:
        summary: Of one model.
        most: The end of the scale of colours, where several models are compared; None: the model's own largest sum.
    """
    kinds, layers = list(summary["sums"]), summary["layers"]
    cells, most = list(summary["sums"].values()), largest_sum(summary) if most is None else most
    size = (max(3.3, 1.9 + 0.09 * len(layers)), 2.6)
    panels = [
        Panel("all components of a layer", partial(_sums, cells=cells, kinds=kinds, most=most), size),
        Panel("strongest components", partial(_strongest, summary=summary), size),
    ]
    if summary["checks"]:
        panels.append(Panel("under fresh masks", partial(_predictions, checks=summary["checks"]), size))
    return panels


def _sums(axis: Any, *, cells: Sequence[Sequence[float]], kinds: Sequence[str], most: float) -> None:
    image = axis.imshow(cells, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    axis.set_yticks(range(len(kinds)), kinds, parse_math=False)
    axis.set_xticks(range(0, len(cells[0]), max(1, round(len(cells[0]) / 6))))
    axis.set_xlabel("layer")
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label("logits", fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _strongest(axis: Any, *, summary: Mapping[str, Any]) -> None:
    shown = [*summary["for"][:6], *summary["against"][:6][::-1]]
    for row, entry in enumerate(shown):
        colour = BLUE if entry["mean"] > 0 else VERMILION
        axis.barh(row, entry["mean"], color=colour, height=0.7)
        if entry["low"] is not None:
            axis.plot([entry["low"], entry["high"]], [row, row], color="#444444", linewidth=0.8)
    axis.axvline(0, color="#444444", linewidth=0.6)
    axis.set_yticks(range(len(shown)), [entry["name"] for entry in shown], parse_math=False, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("logits that the margin gains")


def _predictions(axis: Any, *, checks: Sequence[Mapping[str, Any]]) -> None:
    ordered = sorted(checks, key=lambda each: -each["keep"])
    for place, check in reversed(list(enumerate(ordered))):
        axis.scatter(
            check["predicted"],
            check["measured"],
            s=4,
            linewidths=0,
            alpha=0.5,
            color=_COLOURS[place % len(_COLOURS)],
            label=f"kept {check['keep']:g}",
        )
    told = "\n".join(f"r = {check['mean']:.2f} at {check['keep']:g}" for check in ordered)
    axis.text(0.03, 0.97, told, transform=axis.transAxes, va="top", fontsize=7)
    axis.axline((0, 0), slope=1, color="#444444", linewidth=0.6)
    axis.set_xlabel("margin as predicted, less its mean")
    axis.set_ylabel("as measured")
    axis.grid(linewidth=0.4, alpha=0.4)
