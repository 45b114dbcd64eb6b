"""The pictures of one run, as PNG. The same numbers give the same bytes. Pictures of several runs are in charts.py.

- scores: every metric before and after the edits, with its interval, one panel per scoring.
- damage: perplexity after each edit against the key ratio that predicts it; disabling edits have a mark of their own.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from errata.benchmarks.reports import glossary
from errata.benchmarks.reports.naming import Results, readable
from errata.benchmarks.reports.palette import BLUE, GREY, VERMILION
from errata.benchmarks.reports.panels import STYLE, saved
from errata.benchmarks.runs import summary
from errata.benchmarks.runs.json_values import number


def scores(results: Results) -> bytes | None:
    """Return bars before and after, with intervals; None without scores."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [entry for entry in glossary.SCORING_TITLES[:3] if results["summary"].get(entry[0])]
    if not panels:
        return None
    counts = [len(_metrics(results, scoring)) for scoring, _ in panels]
    with rc_context(STYLE):
        canvas = Figure(figsize=(1.2 + 0.62 * sum(counts), 2.6), layout="constrained")
        axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=counts)[0]
        for axis, (scoring, title) in zip(axes, panels, strict=True):
            _bars(axis, results, scoring)
            axis.set_title(title)
        axes[0].set_ylabel("share of cases, %")
        handles, names = axes[0].get_legend_handles_labels()
        canvas.legend(handles, names, loc="outside lower center", ncols=2)
        names = results["names"]
        made = f"{results['counts']['edits']} edits, {names['protocol']}"
        canvas.suptitle(f"{readable(names['editor'])} on {Path(names['model']).name}: {made}")
        return saved(canvas)


def _metrics(results: Results, scoring: str) -> list[tuple[str, str]]:
    """Return name and title of what was measured; the title states the cases where not all edits have the metric."""
    table, most = results["summary"][scoring], results["counts"]["edits"]
    titles = glossary.metric_titles(table)
    counted = ((name, title, table[name].get("n", most)) for name, title in titles)
    return [(name, title if n == most else f"{title} (n = {n})") for name, title, n in counted]


# What only edits change has no value before them, and no bar.
_UNMEASURED: Mapping[str, float] = MappingProxyType(dict.fromkeys(("mean", "low", "high"), math.nan))


def _bars(axis: Any, results: Results, scoring: str) -> None:
    metrics = _metrics(results, scoring)
    for table, shift, colour, label in (("before", -0.2, GREY, "before"), ("summary", 0.2, BLUE, "after")):
        there = results[table].get(scoring, {})
        _interval_bars(axis, [there.get(metric, _UNMEASURED) for metric, _ in metrics], shift, 0.38, colour, label)
    _metric_axis(axis, metrics)


def _interval_bars(
    axis: Any, entries: Sequence[Mapping[str, float]], shift: float, width: float, colour: str, label: str
) -> None:
    means = [100 * entry["mean"] for entry in entries]
    below = [max(0.0, mean - 100 * entry["low"]) for mean, entry in zip(means, entries, strict=True)]
    above = [max(0.0, 100 * entry["high"] - mean) for mean, entry in zip(means, entries, strict=True)]
    bars = {"elinewidth": 0.9, "capsize": 1.8, "capthick": 0.9, "ecolor": "#222222"}
    places = [i + shift for i in range(len(entries))]
    axis.bar(places, means, width, color=colour, label=label, yerr=(below, above), error_kw=bars)


def _metric_axis(axis: Any, metrics: Sequence[tuple[str, str]]) -> None:
    titles = [textwrap.fill(title, 14, break_long_words=False) for _, title in metrics]
    axis.set_xticks(range(len(metrics)), titles, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_ylim(0, 104)
    axis.grid(axis="y", linewidth=0.4, alpha=0.5)


def damage(results: Results, curve: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Return the perplexity ratio of every edit against its key ratio; None where either was not measured."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    measured = [p for p in curve if p["key_ratio"] is not None and p["perplexity_ratio"] is not None]
    points = [(p["key_ratio"], number(p["perplexity_ratio"]), p["disabling"]) for p in measured]
    if not points:
        return None
    ratios = [y for _, y, _ in points]
    with rc_context(STYLE):
        canvas = Figure(figsize=(3.6, 2.9), layout="constrained")
        axis = canvas.subplots()
        ceiling = _ceiling(ratios)
        for bad, colour, marker, label in ((False, BLUE, "o", "harmless"), (True, VERMILION, "X", "disabling")):
            some = [(x, min(y, ceiling)) for x, y, disabling in points if disabling == bad]
            if some:
                kind = {"s": 20, "alpha": 0.75, "linewidths": 0, "color": colour, "marker": marker}
                axis.scatter(*zip(*some, strict=True), label=f"{label} ({len(some)})", **kind)
        ratio_axis(axis, ratios)
        axis.set_xlabel(r"key ratio  $(k_0 \cdot u)\,/\,(\bar k \cdot u)$")
        canvas.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, handletextpad=0.2)
        names = results["names"]
        axis.set_title(f"{readable(names['editor'])} on {Path(names['model']).name}: one mark per edit")
        return saved(canvas)


def _ceiling(ratios: Sequence[float]) -> float:
    """Return where infinite ratios are drawn: above all others."""
    return 3 * max([y for y in ratios if math.isfinite(y)], default=1.0)


def ratio_axis(axis: Any, ratios: Sequence[float]) -> None:
    """Draw a logarithmic axis of perplexity after / before, with the line above which an edit is disabling."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axhline(summary.DISABLING_PERPLEXITY, color="#444444", linewidth=0.7, linestyle=(0, (4, 3)))
    axis.set_yscale("log")
    finite = [y for y in ratios if math.isfinite(y)]
    axis.set_ylim(
        min([0.8, *(y / 1.3 for y in finite)]), 2 * max([2.0, *finite, min(_ceiling(ratios), max(ratios, default=2.0))])
    )
    few = max(finite, default=1.0) < 50  # then powers of ten alone would leave the axis bare
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("perplexity after / before")
    axis.grid(linewidth=0.4, alpha=0.4)
