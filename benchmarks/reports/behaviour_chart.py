"""The picture of an edit of behaviour: what it does and what it costs over its strength, beside the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from errata.benchmarks.reports.palette import BLUE, MUTED, VERMILION
from errata.benchmarks.reports.panels import Panel, png

Point = Mapping[str, Any]


def behaviour_panels(study: Mapping[str, Any]) -> list[Panel]:
    """Return the panels of a study.

    Args:
        study: As `errata steer` writes it: `steered` and `random` lists of points, `prompted` a point or None.
    """
    return [
        Panel("effect", partial(_effect, study=study)),
        Panel("change of log p", partial(_likelihoods, study=study)),
        Panel("cost on general text", partial(_cost, study=study)),
        Panel("effect for its cost", partial(_trade, study=study)),
    ]


def behaviour_picture(study: Mapping[str, Any], title: str) -> bytes:
    """Return the panels of a study as PNG. Arguments as of `behaviour_panels`."""
    return png(behaviour_panels(study), across=4, title=title)


def _runs(study: Mapping[str, Any]) -> list[tuple[str, str, Sequence[Point]]]:
    """Return the lines of a panel, each with its name and colour; every random direction is one."""
    found = [("steered", VERMILION, study["steered"])]
    untouched = [point for point in study["steered"] if point["strength"] == 0]
    for number in dict.fromkeys(point["seed"] for point in study["random"]):
        mine = [*untouched, *(point for point in study["random"] if point["seed"] == number)]
        found.append(("random direction", BLUE, mine))
    return found


def _line(axis: Any, points: Sequence[Point], y: Callable[[Point], float], **look: Any) -> None:
    ordered = sorted((point for point in points if point["strength"] is not None), key=lambda point: point["strength"])
    axis.plot([point["strength"] for point in ordered], [y(point) for point in ordered], markersize=3, **look)


def _effect(axis: Any, *, study: Mapping[str, Any]) -> None:
    for name, colour, points in _runs(study):
        _line(axis, points, lambda point: point["effect"]["mean"], marker="o", color=colour, label=name)
        if colour == VERMILION:
            ordered = sorted(points, key=lambda point: point["strength"])
            ends = [[point["effect"][end] for point in ordered] for end in ("low", "high")]
            axis.fill_between([point["strength"] for point in ordered], *ends, color=colour, alpha=0.15, linewidth=0)
    if study.get("prompted"):
        axis.axhline(study["prompted"]["effect"]["mean"], color=MUTED, linestyle="--", label="instruction")
    axis.axhline(0, color=MUTED, linewidth=0.6)
    axis.set_xlabel("strength")
    axis.set_ylabel("standard deviations")


def _likelihoods(axis: Any, *, study: Mapping[str, Any]) -> None:
    for side, dash in (("positive", "-"), ("negative", ":")):
        look = {"color": VERMILION, "linestyle": dash, "marker": "o", "label": f"{side} continuation"}
        _line(axis, study["steered"], lambda point, side=side: point[side]["mean"], **look)
    axis.axhline(0, color=MUTED, linewidth=0.6)
    axis.set_xlabel("strength")
    axis.set_ylabel("nats per token")


def _cost(axis: Any, *, study: Mapping[str, Any]) -> None:
    for name, colour, points in _runs(study):
        measured = [point for point in points if point["drift"]]
        _line(axis, measured, lambda point: point["drift"]["kl"], marker="o", color=colour, label=name)
    axis.set_xlabel("strength")
    axis.set_ylabel("KL, nats per token")


def _trade(axis: Any, *, study: Mapping[str, Any]) -> None:
    for name, colour, points in _runs(study):
        measured = sorted((point for point in points if point["drift"]), key=lambda point: point["strength"])
        costs, effects = [p["drift"]["kl"] for p in measured], [p["effect"]["mean"] for p in measured]
        axis.plot(costs, effects, marker="o", markersize=3, color=colour, label=name)
    axis.axhline(0, color=MUTED, linewidth=0.6)
    axis.set_xlabel("KL, nats per token")
    axis.set_ylabel("standard deviations")
