"""The picture of heads: their attributions by layer, and what a model answers while the best of each side is scaled."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from errata.benchmarks.reports.palette import BLUE, INK, MUTED, VERMILION
from errata.benchmarks.reports.panels import Panel, png

_LINES = (("context", VERMILION, "-"), ("memory", BLUE, (0, (4, 2))), ("remembered", INK, (0, (1, 1.5))))
_LABELS: Mapping[str, str] = MappingProxyType(
    {
        "context": "says the context's answer",
        "memory": "says the remembered answer",
        "remembered": "remembers it without the context",
    }
)


def of_heads(report: Mapping[str, Any]) -> bytes:
    """Return the picture of a report (`head_sweeps.head_report`) as PNG."""
    return png(head_panels(report), across=3)


def head_panels(report: Mapping[str, Any]) -> list[Panel]:
    """Return the map of attributions, and one panel per head that was scaled."""
    ranked, measured = (report["counts"][name] for name in ("ranked", "measured"))
    size = (3.4, max(2.4, 1.1 + 0.09 * len(report["attributions"])))
    panels = [Panel(f"attribution, {ranked} facts", partial(_draw_map, rows=report["attributions"]), size)]
    for sweep in report["sweeps"]:
        draw = partial(_draw_sweep, effects=sweep["effects"])
        panels.append(Panel(f"head {sweep['head']} scaled, {measured} facts", draw, size))
    return panels


def _draw_map(axis: Any, *, rows: list[list[float | None]]) -> None:
    values = [[float("nan") if each is None else each for each in row] for row in rows]
    most = max(abs(each) for row in rows for each in row if each is not None) or 1.0
    image = axis.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-most, vmax=most, origin="lower")
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_xticks(range(0, len(rows[0]), max(1, len(rows[0]) // 8)))
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label("logits, context over memory", fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _draw_sweep(axis: Any, *, effects: list[Mapping[str, Any]]) -> None:
    factors = [effect["factor"] for effect in effects]
    apart = 0.012 * (max(factors) - min(factors))  # lines of equal shares stand beside each other
    for place, (name, colour, dash) in enumerate(_LINES):
        shares = [effect[name] for effect in effects]
        mean, low, high = ([100 * share[end] for share in shares] for end in ("mean", "low", "high"))
        at = [factor + (place - 1) * apart for factor in factors]
        axis.vlines(at, low, high, color=colour, linewidth=0.9, alpha=0.7)
        axis.plot(at, mean, color=colour, linestyle=dash, linewidth=1.4, marker="o", markersize=3, label=_LABELS[name])
    axis.axvline(1, color=MUTED, linewidth=0.6)
    axis.set_ylim(-4, 104)
    axis.set_xlabel("factor")
    axis.set_ylabel("% of the facts")
    axis.grid(linewidth=0.4, alpha=0.4)
