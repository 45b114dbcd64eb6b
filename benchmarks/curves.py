"""The picture of sequences: scores of all edits so far, and what is left of the model, against their number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.benchmarks import figures
from errata.benchmarks.figures import CURVE, STYLE
from errata.benchmarks.naming import Results, labels, readable
from errata.benchmarks.store import number

METRICS = (("reliability", "Reliability"), ("generalization", "Generalization"), ("locality", "Locality"))


def draw(runs: Sequence[Results]) -> bytes | None:
    """A panel a measure, a line a run; None where no run has checkpoints.

    Scores are probability comparisons over all edits so far, with their intervals; facts kept are those of subjects
    that the sequence never edits; perplexity is relative to the untouched model's.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    checkpoints = [json.loads((Path(run["folder"]) / CURVE).read_text(encoding="utf-8")) for run in runs]
    if not any(checkpoints):
        return None
    has_facts = any(point["retention"] is not None for points in checkpoints for point in points)
    titles = [*(title for _, title in METRICS), *(["Known facts kept"] if has_facts else []), "Perplexity"]
    with rc_context(STYLE):
        canvas = Figure(figsize=(1.9 * len(titles) + 0.4, 2.5), layout="constrained")
        axes = canvas.subplots(1, len(titles), squeeze=False)[0]
        for points, name, colour in zip(checkpoints, labels(runs), figures.colours(runs), strict=True):
            _lines(axes, points, readable(name), colour, has_facts=has_facts)
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title)
            axis.set_xlabel("edits")
            axis.set_xlim(left=0)
            axis.grid(linewidth=0.4, alpha=0.5)
        for axis in axes[:-1]:
            axis.set_ylim(0, 104)
        axes[0].set_ylabel("%")
        axes[-1].set_ylabel("after / before")
        axes[-1].set_ylim(0, 1.1 * max(1.0, axes[-1].get_ylim()[1]))
        canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=max(2, len(runs)))
        return figures.png(canvas)


def _lines(axes: Any, points: Sequence[Mapping[str, Any]], name: str, colour: str, *, has_facts: bool) -> None:
    edits = [point["edits"] for point in points]
    style = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.3}
    for axis, (metric, _) in zip(axes, METRICS, strict=False):
        found = [point["summary"].get("probability", {}).get(metric) for point in points]
        some = [(x, entry) for x, entry in zip(edits, found, strict=True) if entry is not None]
        axis.plot([x for x, _ in some], [100 * entry["mean"] for _, entry in some], label=name, **style)
        bounds = [[100 * entry[bound] for _, entry in some] for bound in ("low", "high")]
        axis.fill_between([x for x, _ in some], *bounds, color=colour, alpha=0.15, linewidth=0)
    if has_facts:
        kept = [(x, 100 * p["retention"]) for x, p in zip(edits, points, strict=True) if p["retention"] is not None]
        axes[len(METRICS)].plot([x for x, _ in kept], [y for _, y in kept], **style)
    ratios = [(x, p["perplexity_ratio"]) for x, p in zip(edits, points, strict=True)]
    measured = [(x, number(ratio)) for x, ratio in ratios if ratio is not None]
    axes[-1].plot([x for x, _ in measured], [y for _, y in measured], **style)
