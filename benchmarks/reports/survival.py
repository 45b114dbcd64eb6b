"""The table and the picture of `errata survive`: what edits keep once they are merged and compressed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from errata.benchmarks.reports.naming import INTERVENTIONS, readable
from errata.benchmarks.reports.palette import MUTED, look
from errata.benchmarks.reports.panels import Panel
from errata.evaluate.intervals import bootstrap
from errata.evaluate.paired import difference

METRICS = ("reliability", "generalization", "locality")
EDITED, UNTOUCHED = "edited", "untouched"
_MARKERS: Mapping[str, str] = {"rtn": "o", "gptq": "s", "torchao": "^"}
Found = Mapping[str, Any]


def steps_of(found: Found) -> list[str]:
    """Return the steps behind the edit, in their order."""
    return [step for step in found["steps"] if step.partition(" ")[0] not in (UNTOUCHED, EDITED)]


def said(step: str) -> str:
    """Return a step in words: "bfloat16, GPTQ"."""
    return ", ".join(INTERVENTIONS.get(word, word) for word in step.split(" "))


def values(found: Found, step: str, scoring: str, metric: str) -> list[float]:
    """Return a metric behind a step, one value per fact, NaN where a fact has none."""
    return [math.nan if v is None else float(v) for v in found["steps"][step]["values"][scoring][metric]]


def mean(found: Found, step: str, scoring: str, metric: str) -> float:
    """Return the mean of a metric behind a step; NaN where no fact has it."""
    own = [value for value in values(found, step, scoring, metric) if not math.isnan(value)]
    return math.fsum(own) / len(own) if own else math.nan


def perplexity_ratio(found: Found, step: str) -> float | None:
    """Return how many times the untouched model's perplexity a step has, as the geometric mean over edited models."""
    own, base = found["steps"][step]["perplexity"], found["steps"][UNTOUCHED]["perplexity"][0]
    if base is None or None in own:
        return None
    return math.exp(math.fsum(math.log(float(value) / float(base)) for value in own) / len(own))


def summary(found: Found) -> dict[str, Any]:
    """Return the numbers of a method without its facts: for a table, a picture, or a file."""
    steps: dict[str, Any] = {}
    for step in found["steps"]:
        own: dict[str, dict[str, dict[str, Any]]] = {
            scoring: {
                metric: dict(bootstrap(known).as_dict())
                for metric in METRICS
                if (known := [v for v in values(found, step, scoring, metric) if not math.isnan(v)])
            }
            for scoring in ("probability", "teacher_forced")
        }
        if step in steps_of(found):
            for scoring, metrics in own.items():
                for metric, entry in metrics.items():
                    apart = difference(*(values(found, name, scoring, metric) for name in (EDITED, step)))
                    entry["change"] = [apart.mean, apart.low, apart.high]
        steps[step] = {**own, "perplexity": perplexity_ratio(found, step)}
    return {
        "method": found["names"]["editor"],
        "model": found["names"]["model"],
        "n": found["n"],
        "groups": found["groups"],
        "refused": len(found["refused"]),
        "same_weights": found["same_weights"],
        "steps": steps,
        "grid": found["grid"],
    }


HEADS = ("method", "n", "step", "reliability", "generalization", "locality", "perplexity", "moved", "carried")


def rows(summaries: Sequence[Mapping[str, Any]], scoring: str) -> list[list[str]]:
    """Return a row per method and step: percent, the change with its interval behind steps, and the grid's numbers."""
    return [
        [readable(own["method"]), _number(own), said(step), *_cells(own, step, scoring)]
        for own in summaries
        for step in own["steps"]
    ]


def _number(own: Mapping[str, Any]) -> str:
    """Return how many facts were asked, and how many of them the method refused to edit: "30, 2 refused"."""
    return f"{own['n']}, {own['refused']} refused" if own["refused"] else f"{own['n']}"


def _cells(own: Mapping[str, Any], step: str, scoring: str) -> list[str]:
    entry, name = own["steps"][step], step.partition(" ")[2]
    # It is measured on the first precision of the merged model.
    first = next((each for each in steps_of(own) if each.partition(" ")[2] == name), None)
    grid = own["grid"].get(name, {}) if step == first else {}
    moved, carried = grid.get("moved"), grid.get("carried")
    ratio = entry["perplexity"]
    return [
        *(cell(entry[scoring].get(metric)) for metric in METRICS),
        "-" if ratio is None else f"{ratio:.3g}",
        "-" if moved is None else f"{100 * moved:.2g} %",
        "-" if carried is None else f"{carried:.2g}",
    ]


def cell(entry: Mapping[str, Any] | None) -> str:
    """Return a mean in percent, and the change with its interval where there is one: "90 (-10: -20 to 0)"."""
    if entry is None:
        return "-"
    shown = f"{100 * entry['mean']:.0f}"
    if "change" not in entry:
        return shown
    change, low, high = (f"{100 * value:+.0f}".replace("+0", "0").replace("-0", "0") for value in entry["change"])
    return f"{shown} ({change}: {low} to {high})"


def panels(summaries: Sequence[Mapping[str, Any]], scoring: str, metrics: Sequence[str] = METRICS) -> list[Panel]:
    """Return a panel per metric: a row per method, a tick for the edited model, and a mark per compressed one."""
    # A folder that was merged and not compressed has the edited model's scores.
    steps = list(dict.fromkeys(step for own in summaries for step in own["steps"] if " " in step))
    steps = [step for step in steps if not step.startswith(UNTOUCHED)]
    size = (3.4, 1.0 + 0.26 * len(summaries))
    return [
        Panel(metric.capitalize(), partial(_draw, found=summaries, steps=steps, scoring=scoring, metric=metric), size)
        for metric in metrics
    ]


def _draw(axis: Any, *, found: Sequence[Mapping[str, Any]], steps: Sequence[str], scoring: str, metric: str) -> None:
    for row, own in enumerate(found):
        colour = look(own["method"]).colour
        entries = {step: own["steps"][step][scoring].get(metric) for step in (EDITED, *steps) if step in own["steps"]}
        means = {step: 100 * entry["mean"] for step, entry in entries.items() if entry is not None}
        if not means:
            continue
        axis.plot([min(means.values()), max(means.values())], [row, row], color=colour, linewidth=1.2, alpha=0.5)
        axis.plot([means[EDITED]], [row], marker="|", markersize=10, color=MUTED, linestyle="none", clip_on=False)
        for step in steps:
            if step in means:
                style = _style(step, colour)
                axis.plot([means[step]], [row], markeredgecolor=colour, zorder=3, clip_on=False, **style)
    for step in steps:
        axis.plot([], [], label=said(step), markeredgecolor=MUTED, **_style(step, MUTED))
    axis.plot([], [], marker="|", markersize=9, color=MUTED, linestyle="none", label="edited, float32")
    axis.set_yticks(range(len(found)), [readable(own["method"]) for own in found])
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_xlim(-2, 102)
    axis.set_xlabel("%")
    axis.grid(axis="x")


def _style(step: str, colour: str) -> dict[str, Any]:
    """Return the look of a step: a marker per compression, filled where the merged model is in float32."""
    precision, _, name = step.partition(" ")
    marker = _MARKERS.get(name, "D")
    fill = colour if precision == "float32" else "none"
    return {"marker": marker, "markersize": 5, "markerfacecolor": fill, "linestyle": "none"}
