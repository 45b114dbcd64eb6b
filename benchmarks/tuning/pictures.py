"""The picture of a search: the trace, the layers that were tried, how both go together, and the gains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from errata.benchmarks.reports.naming import readable
from errata.benchmarks.reports.palette import BLUE, MUTED, VERMILION
from errata.benchmarks.reports.panels import Panel, png

GREEN, PURPLE = "#009e73", "#332288"
METRICS = (
    ("reliability", BLUE, "o"),
    ("generalization", GREEN, "s"),
    ("locality", VERMILION, "^"),
    ("distracting_locality", "#cc79a7", "v"),
)
# Where the name of a point may stand, the first choice first, in points of type.
_BESIDE = ((7.0, 5.0), (-7.0, 5.0), (7.0, -5.0), (-7.0, -5.0), (0.0, 9.0), (0.0, -9.0), (11.0, 0.0), (-11.0, 0.0))
_UNITS: Mapping[str, str] = MappingProxyType(
    {"swap": "share of the logit difference", "s3": "change of the answer's probability"}
)


def picture(result: Mapping[str, Any]) -> bytes:
    """Draw the panels of a tune.json as PNG."""
    return png(panels(result), across=4)


def panels(result: Mapping[str, Any]) -> list[Panel]:
    """Return the panels of a tune.json: those of layers where they were traced and tried, and the gains."""
    found = localisation_panels(result)
    if result["unseen"] is not None:
        found.append(Panel("Found against the beginning", partial(_gains, result=result)))
    return found or [Panel(f"{readable(result['names']['editor'])}: scores", partial(_scores, result=result))]


def localisation_panels(result: Mapping[str, Any]) -> list[Panel]:
    """Return the trace by layer, the success of edits by layer, and one over the other; nothing without a trace."""
    trace, there = result["trace"], result["localisation"]
    if trace is None:
        return []
    unit = _UNITS[trace["corruption"]]
    found = [Panel("Trace of the MLPs", partial(_trace, trace=trace, unit=unit))]
    if there is None:
        return found
    name = readable(result["names"]["editor"])
    rho = there["correlations"].get("score")
    said = "" if rho is None else f": rank correlation {rho['mean']:+.2f}"
    return [
        *found,
        Panel(f"{name}: edits by layer, n = {there['score'][0]['n']}", partial(_by_layer, there=there)),
        Panel(f"Both{said}", partial(_scatter, there=there, unit=unit)),
    ]


def _trace(axis: Any, *, trace: Mapping[str, Any], unit: str) -> None:
    layers = range(len(trace["mean"]))
    axis.plot(layers, trace["mean"], color=PURPLE, linewidth=1.3)
    axis.fill_between(layers, trace["low"], trace["high"], color=PURPLE, alpha=0.2, linewidth=0)
    axis.axhline(0, color=MUTED, linewidth=0.6)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel(f"layer, subject's last token, n = {len(trace['facts'])}")
    axis.set_ylabel(unit)
    axis.grid(linewidth=0.4, alpha=0.4)


def _by_layer(axis: Any, *, there: Mapping[str, Any]) -> None:
    layers = [choice[0] for choice in there["layers"]]
    for name, colour, marker in METRICS:
        values = [(layer, entry[name]) for layer, entry in zip(layers, there["metrics"], strict=True) if name in entry]
        if values:
            axis.plot(
                *zip(*values, strict=True),
                color=colour,
                marker=marker,
                markersize=3.5,
                linewidth=0.9,
                label=name.replace("_", " "),
            )
    score = there["score"]
    ends = list(zip(*(_bars(entry) for entry in score), strict=True))
    means = [entry["mean"] for entry in score]
    axis.errorbar(layers, means, yerr=ends, color=PURPLE, marker="D", markersize=4, linewidth=1.3, label="score")
    axis.set_ylim(0, 1.04)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("layer" if len(there["layers"][0]) == 1 else "lowest layer")
    axis.set_ylabel("preference for the right answer")
    axis.grid(linewidth=0.4, alpha=0.4)


def _scatter(axis: Any, *, there: Mapping[str, Any], unit: str) -> None:
    means = [entry["mean"] for entry in there["score"]]
    points = list(zip(there["effect"], means, strict=True))
    axis.plot(there["effect"], means, color=PURPLE, marker="D", markersize=4, linestyle="none")
    axis.margins(0.1)
    for choice, at, corner in zip(there["layers"], points, _corners(points), strict=True):
        name = {"fontsize": 7, "color": MUTED, "ha": "center", "va": "center"}
        axis.annotate(str(choice[0]), at, xytext=corner, textcoords="offset points", **name)
    axis.set_xlabel(f"effect, {unit}")
    axis.set_ylabel("score of edits")
    axis.grid(linewidth=0.4, alpha=0.4)


def _corners(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return where the name of each point stands beside it, in points of type, so that no two share a place."""
    spans = [max(values) - min(values) or 1.0 for values in zip(*points, strict=True)]
    shown = [(190 * x / spans[0], 120 * y / spans[1]) for x, y in points]  # about as large as a panel
    taken, corners = list(shown), []
    for x, y in shown:
        chosen = max(_BESIDE, key=lambda d: min(min(math.dist((x + d[0], y + d[1]), other) for other in taken), 7.0))
        corners.append(chosen)
        taken.append((x + chosen[0], y + chosen[1]))
    return corners


def _gains(axis: Any, *, result: Mapping[str, Any]) -> None:
    parts = [(name, result[name]) for name in ("development", "unseen")]
    for place, (_, part) in enumerate(parts):
        for end, colour, marker, shift in (("start", MUTED, "o", -0.09), ("found", VERMILION, "D", 0.09)):
            _point(axis, place + shift, part["score"][end], colour, marker, end if place == 0 else None)
    axis.set_xticks(range(len(parts)), [f"{name}\n{part['n']} facts" for name, part in parts])
    axis.set_xlim(-0.5, len(parts) - 0.5)
    axis.set_ylim(0, 1.04)
    axis.set_ylabel("score of edits")
    axis.grid(linewidth=0.4, alpha=0.4, axis="y")


def _scores(axis: Any, *, result: Mapping[str, Any]) -> None:
    entries: Sequence[Mapping[str, Any]] = result["tried"]
    for place, entry in enumerate(entries):
        _point(axis, place, entry["score"], VERMILION if entry["kept"] else MUTED, "D", None)
    axis.set_ylim(0, 1.04)
    axis.set_xlabel("settings, in the order in which they were tried")
    axis.set_ylabel("score of edits")
    axis.grid(linewidth=0.4, alpha=0.4)


def _point(axis: Any, x: float, score: Mapping[str, float], colour: str, marker: str, label: str | None) -> None:
    down, up = _bars(score)
    axis.errorbar(
        [x],
        [score["mean"]],
        yerr=[[down], [up]],
        color=colour,
        marker=marker,
        markersize=5,
        linestyle="none",
        label=label,
    )


def _bars(score: Mapping[str, float]) -> tuple[float, float]:
    """Return the lengths of an error bar down and up; a narrow bootstrap interval may lie beside the mean."""
    return max(0.0, score["mean"] - score["low"]), max(0.0, score["high"] - score["mean"])
