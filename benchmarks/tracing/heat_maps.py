"""Heat maps of traces: tokens (or classes of tokens) down, layers across, one panel per grid.

Source of the form: Meng et al. 2022, figure 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np

from errata.benchmarks.reports.panels import Panel, png
from errata.benchmarks.tracing.trace_summary import is_normalised
from errata.editors.core.locating.answer_scores import Metric
from errata.editors.core.locating.tracing import FactTrace

_UNITS: Mapping[str, str] = MappingProxyType(
    {"probability": "change of the answer's probability", "logit_difference": "logits", "kl": "nats"}
)
_TITLES: Mapping[str, str] = MappingProxyType({"state": "hidden state", "mlp": "MLP", "attention": "attention"})


def title_of(grid: str) -> str:
    """Return how pictures and tables call a grid: "MLP, window 10"."""
    head, comma, rest = grid.partition(",")
    return f"{_TITLES.get(head, head)}{comma}{rest.replace('mlp', 'MLP')}"


def unit_of(metric: str, *, normalised: bool) -> str:
    """Return what the numbers of a metric's effect are."""
    return "share of the logit difference" if normalised else _UNITS[metric]


def of_fact(trace: FactTrace, metric: Metric) -> bytes:
    """Return the heat maps of one fact as PNG; the subject's tokens have a star, as in ROME's figures."""
    normalised = is_normalised([trace], metric)
    first, end = trace.subject_range
    names = [f"{trace.tokens[i]!r}"[1:-1] + ("*" if first <= i < end else "") for i in trace.rows]
    maps = {grid: trace.effects(grid, metric, normalised=normalised).tolist() for grid in trace.grids}
    what = f"{trace.answers[0].strip()} over {trace.answers[1].strip()}"
    if metric != "logit_difference":
        what = trace.answers[0].strip()
    panels = _panels(maps, names, unit_of(metric, normalised=normalised))
    return png(panels, across=3, title=f"{trace.direction}: {what}")


def of_summary(summary: Mapping[str, Any], metric: Metric, title: str) -> bytes:
    """Return the heat maps of an average over facts as PNG, by class of tokens."""
    return png(summary_panels(summary, metric), across=3, title=title)


def summary_panels(summary: Mapping[str, Any], metric: Metric) -> list[Panel]:
    """Return one heat map per grid of an average over facts: classes of tokens down, layers across."""
    effects = {grid: found[metric] for grid, found in summary["effects"].items()}
    names = list(next(iter(effects.values())))
    maps = {grid: [found[name]["mean"] for name in names] for grid, found in effects.items()}
    return _panels(maps, names, unit_of(metric, normalised=metric in summary["normalised"]))


def _panels(maps: Mapping[str, Sequence[Sequence[float]]], names: Sequence[str], unit: str) -> list[Panel]:
    layers = len(next(iter(maps.values()))[0])
    size = (max(2.9, 1.6 + 0.06 * layers), 0.9 + 0.2 * len(names))
    # One scale for all grids, so that colours can be compared.
    most = max(max(map(abs, row)) for cells in maps.values() for row in cells) or 1.0
    return [
        Panel(title_of(grid), partial(_draw, cells=cells, names=names, unit=unit, most=most), size)
        for grid, cells in maps.items()
    ]


def _draw(axis: Any, *, cells: Sequence[Sequence[float]], names: Sequence[str], unit: str, most: float) -> None:
    from matplotlib.colors import FuncNorm

    # Both signs on one scale: a patch can also take the answer further away, which is a finding. Colours follow the
    # root, because an MLP's effect is seldom more than a fifth of a state's and would be all but white beside it.
    scale = FuncNorm((_root, _square), vmin=-most, vmax=most)
    image = axis.imshow(cells, aspect="auto", cmap="RdBu_r", norm=scale, interpolation="nearest")
    axis.set_yticks(range(len(names)), names, parse_math=False)  # tokens may hold dollar signs
    layers = len(cells[0])
    step = max(1, round(layers / 6))
    axis.set_xticks(range(0, layers, step))
    axis.set_xlabel("layer")
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02)
    ticks = [part * most for part in (-1, -0.5, -0.1, 0, 0.1, 0.5, 1)]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.set_label(unit, fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _root(values: Any) -> Any:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: Any) -> Any:
    return np.sign(values) * np.square(values)
