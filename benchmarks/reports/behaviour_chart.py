"""The picture of an edit of behaviour: what it does and what it costs over its strength, beside the baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any

from errata.benchmarks.reports.palette import BLUE, MUTED, VERMILION
from errata.benchmarks.reports.panels import Panel, png

Point = Mapping[str, Any]
_RANDOM = "random directions"


def behaviour_panels(study: Mapping[str, Any]) -> list[Panel]:
    """Return the panels of a study.

    Args:
        study: As `errata steer` writes it: `steered` a list of points, `random_directions` a list of means over random
            directions (`RandomBaseline.as_dict`), `prompted` a point or None.
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


def costs(point: Point) -> tuple[float | None, float | None]:
    """Return the rise of the loss and the KL of an edit or an instruction, or their means over random directions."""
    if "drift" in point:
        drift = point["drift"]
        return (None, None) if drift is None else (drift["rise"]["value"], drift["kl"])
    return (None, None) if point["kl"] is None else (point["rise"]["mean"], point["kl"]["mean"])


def kinds_panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Return the panels that compare kinds of edits, each with its random directions below it.

    Args:
        rows: Each with `name`, `is_edit`, `steered` (a point) and `random` (as of `RandomBaseline.as_dict`, or None).
    """
    size = (3.6, 0.42 * len(rows) + 0.9)
    return [
        Panel("effect", partial(_kinds, rows=rows, of="effect"), size),
        Panel("change of log p", partial(_kinds_likelihoods, rows=rows), size),
        Panel("cost on general text", partial(_kinds, rows=rows, of="kl"), size),
    ]


def kinds_picture(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Return the comparison of kinds as PNG. Arguments as of `kinds_panels`."""
    return png(kinds_panels(rows), across=3, title=title)


def _kinds(axis: Any, *, rows: Sequence[Mapping[str, Any]], of: str) -> None:
    for place, name, colour, point in _places(rows):
        found = _span(point, of)
        if found is not None:
            mean, low, high = found
            axis.plot([mean], [place], marker="o", markersize=4, linestyle="", color=colour, label=name)
            axis.plot([low, high], [place, place], color=colour, linewidth=1.2)
    _name_kinds(axis, rows)
    if of == "kl":
        axis.set_xscale("log")
        axis.set_xlim(left=min(found[0] for *_, point in _places(rows) if (found := _span(point, of))) / 2)
    axis.set_xlabel("KL, nats per token" if of == "kl" else "standard deviations")


def _kinds_likelihoods(axis: Any, *, rows: Sequence[Mapping[str, Any]]) -> None:
    for place, _, colour, point in _places(rows):
        for side, fill in (("positive", colour), ("negative", "none")):
            look = {"marker": "o", "markersize": 4, "markerfacecolor": fill, "color": colour, "linestyle": ""}
            axis.plot([point[side]["mean"]], [place], **look)
    _name_kinds(axis, rows)
    axis.set_xlabel("nats per token; filled: positive, empty: negative")


def _places(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, str, str, Point]]:
    """Yield where each point stands, what it is, its colour, and the point."""
    for place, row in enumerate(rows):
        name, colour = ("edit", VERMILION) if row["is_edit"] else (row["name"], MUTED)
        yield place - 0.14 * (row["random"] is not None), name, colour, row["steered"]
        if row["random"] is not None:
            yield place + 0.14, _RANDOM, BLUE, row["random"]


def _span(point: Point, of: str) -> tuple[float, float, float] | None:
    found = point["drift"] if of == "kl" and "drift" in point else point[of]
    if found is None:
        return None
    if of == "kl" and "kl" in found:
        return found["kl"], found["kl"], found["kl"]
    ends = [found[end] if _is_number(found[end]) else found["mean"] for end in ("low", "high")]
    least = 1e-9 if of == "kl" else ends[0]  # a logarithmic axis has no zero: the line leaves the picture
    return found["mean"], max(ends[0], least), ends[1]


def _name_kinds(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    axis.axvline(0, color=MUTED, linewidth=0.6)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)


def _line(axis: Any, points: Sequence[Point], y: Callable[[Point], float], **look: Any) -> None:
    ordered = sorted((point for point in points if point["strength"] is not None), key=lambda point: point["strength"])
    axis.plot([point["strength"] for point in ordered], [y(point) for point in ordered], markersize=3, **look)


def _band(axis: Any, points: Sequence[Point], of: Callable[[Point], Mapping[str, float]], colour: str) -> None:
    """Draw the intervals of points; one direction alone has none."""
    drawn = sorted((point for point in points if _is_number(of(point)["low"])), key=lambda point: point["strength"])
    ends = [[of(point)[end] for point in drawn] for end in ("low", "high")]
    axis.fill_between([point["strength"] for point in drawn], *ends, color=colour, alpha=0.15, linewidth=0)


def _is_number(value: float | str | None) -> bool:
    return isinstance(value, float | int) and isfinite(value)  # a file writes NaN as a text


def _with_zero(study: Mapping[str, Any]) -> list[Point]:
    """Return the means over random directions, with the untouched model between them."""
    untouched = [point for point in study["steered"] if point["strength"] == 0]
    return [*untouched, *study["random_directions"]] if study["random_directions"] else []


def _effect(axis: Any, *, study: Mapping[str, Any]) -> None:
    for name, colour, points in (("edit", VERMILION, study["steered"]), (_RANDOM, BLUE, _with_zero(study))):
        if points:
            _line(axis, points, lambda point: point["effect"]["mean"], marker="o", color=colour, label=name)
            _band(axis, points, lambda point: point["effect"], colour)
    if study.get("prompted"):
        axis.axhline(study["prompted"]["effect"]["mean"], color=MUTED, linestyle="--", label="instruction")
    axis.axhline(0, color=MUTED, linewidth=0.6)
    axis.set_xlabel("strength")
    axis.set_ylabel("standard deviations")


def _likelihoods(axis: Any, *, study: Mapping[str, Any]) -> None:
    for colour, points in ((VERMILION, study["steered"]), (BLUE, _with_zero(study))):
        for side, dash in (("positive", "-"), ("negative", ":")):
            look = {"color": colour, "linestyle": dash, "marker": "o"}
            if colour == VERMILION:
                look["label"] = f"{side} continuation"
            _line(axis, points, lambda point, side=side: point[side]["mean"], **look)
    axis.axhline(0, color=MUTED, linewidth=0.6)
    axis.set_xlabel("strength")
    axis.set_ylabel("nats per token")


def _cost(axis: Any, *, study: Mapping[str, Any]) -> None:
    for name, colour, points in (("edit", VERMILION, study["steered"]), (_RANDOM, BLUE, _with_zero(study))):
        measured = [point for point in points if costs(point)[1] is not None]
        if measured:
            _line(axis, measured, lambda point: costs(point)[1] or 0.0, marker="o", color=colour, label=name)
    untouched = {"low": 0.0, "high": 0.0}
    drawn = [each for each in _with_zero(study) if costs(each)[1] is not None]
    _band(axis, drawn, lambda point: point.get("kl", untouched), BLUE)
    if study.get("prompted") and (kl := costs(study["prompted"])[1]) is not None:
        axis.axhline(kl, color=MUTED, linestyle="--", label="instruction")
    axis.set_xlabel("strength")
    axis.set_ylabel("KL, nats per token")


def _trade(axis: Any, *, study: Mapping[str, Any]) -> None:
    for name, colour, points in (("edit", VERMILION, study["steered"]), (_RANDOM, BLUE, _with_zero(study))):
        measured = sorted((p for p in points if costs(p)[1] is not None), key=lambda point: point["strength"])
        if measured:
            effects = [point["effect"]["mean"] for point in measured]
            axis.plot([costs(p)[1] for p in measured], effects, marker="o", markersize=3, color=colour, label=name)
    if study.get("prompted") and (kl := costs(study["prompted"])[1]) is not None:
        effect = study["prompted"]["effect"]["mean"]
        axis.plot([kl], [effect], marker="D", markersize=4, linestyle="", color=MUTED)
    axis.axhline(0, color=MUTED, linewidth=0.6)
    axis.set_xlabel("KL, nats per token")
    axis.set_ylabel("standard deviations")
