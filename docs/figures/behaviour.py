"""The figure of "Behaviour edits": a formal direction in SmolLM2, over its strength, beside its baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from errata.benchmarks.reports.behaviour_chart import behaviour_picture, costs, kinds_picture


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw effect, likelihoods and cost of the addition over its strength as PNG."""
    return behaviour_picture(
        data["caa"], f"{data['model']}, caa, layer {data['layer']}, {data['n']} held-out contrasts"
    )


def picture_of_kinds(data: Mapping[str, Any]) -> bytes:
    """Draw effect, likelihoods and cost of every kind beside its random directions as PNG."""
    return kinds_picture(data["rows"], f"{data['model']}, {data['n']} held-out contrasts")


def strengths(data: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the page's table of strengths: the edit, its random directions, and the instruction."""
    found = data["caa"]
    ordered = sorted(found["steered"], key=lambda point: point["strength"])
    rows = [["untouched" if point["strength"] == 0 else "steered", *_cells(point)] for point in ordered]
    for point in sorted(found["random_directions"], key=lambda point: point["strength"]):
        rows.append([f"random, {len(point['seeds'])}", *_cells(point)])
    return [*rows, ["instruction", *_cells(found["prompted"])]]


def kinds(data: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the page's table of kinds, each with its random directions."""
    rows = []
    for row in data["rows"]:
        kind, comma, more = row["name"].partition(",")
        chance = row["random"]
        control = (
            ["-", "-"]
            if chance is None
            else [f"{_interval(chance['effect'])} ({len(chance['seeds'])})", f"{chance['kl']['mean']:.3f}"]
        )
        rows.append([f"`{kind}`{comma}{more}" if row["is_edit"] else kind, *_cells(row["steered"]), *control])
    return rows


def rounded(value: Any) -> Any:
    """Return plain values with four digits, as the data beside the figure have them."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _cells(point: Mapping[str, Any]) -> list[str]:
    rise, kl = costs(point)
    cost = ["-", "-"] if rise is None or kl is None else [f"{100 * rise:+.1f} %", f"{kl:.3f}"]
    strength = "-" if point["strength"] is None else f"{point['strength']:g}"
    changes = [f"{point[side]['mean']:+.2f}" for side in ("positive", "negative")]
    return [strength, f"{100 * point['share']:.0f} %", _interval(point["effect"]), *changes, *cost]


def _interval(found: Mapping[str, Any]) -> str:
    if found["low"] is None:  # of one direction
        return f"{found['mean']:+.2f}"
    half = (found["high"] - found["low"]) / 2
    return f"{found['mean']:+.2f} ± {half:.2f}"
