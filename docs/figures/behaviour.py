"""The figure of "Behaviour edits": a formal direction in SmolLM2, over its strength, beside its baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from errata.benchmarks.reports.behaviour_chart import behaviour_picture

_KINDS = ("caa, behind the first token", "ace", "ace, all positions", "leace", "ablate", "ablate_weights")
_KINDS += ("surgery", "surgery, stronger", "iti")


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw effect, likelihoods and cost of the addition over its strength as PNG."""
    return behaviour_picture(
        data["caa"], f"{data['model']}, caa, layer {data['layer']}, {data['n']} held-out contrasts"
    )


def strengths(data: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the page's table of strengths: the edit, its random directions, and the instruction."""
    found = data["caa"]
    ordered = sorted(found["steered"], key=lambda point: point["strength"])
    rows = [["untouched" if point["strength"] == 0 else "steered", *_cells(point)] for point in ordered]
    rows += [["random direction", *_cells(point)] for point in sorted(found["random"], key=lambda p: p["strength"])]
    return [*rows, ["instruction", *_cells(found["prompted"])]]


def kinds(data: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the page's table of the other kinds, each with the random direction where it was measured."""
    rows = []
    for name in _KINDS:
        if name in data["kinds"]:
            mine = data["kinds"][name]
            control = _interval(mine["random"]["effect"]) if "random" in mine else "-"
            kind, comma, more = name.partition(",")
            rows.append([f"`{kind}`{comma}{more}", *_cells({**mine["steered"], "strength": mine["strength"]}), control])
    return rows


def rounded(value: Any) -> Any:
    """Return plain values with four digits, as the data beside the figure have them."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _cells(point: Mapping[str, Any]) -> list[str]:
    drift = point["drift"]
    cost = ["-", "-"] if drift is None else [f"{100 * drift['rise']['value']:+.1f} %", f"{drift['kl']:.3f}"]
    strength = "-" if point["strength"] is None else f"{point['strength']:g}"
    changes = [f"{point[side]['mean']:+.2f}" for side in ("positive", "negative")]
    return [strength, f"{100 * point['share']:.0f} %", _interval(point["effect"]), *changes, *cost]


def _interval(found: Mapping[str, float]) -> str:
    half = (found["high"] - found["low"]) / 2
    return f"{found['mean']:+.2f} ± {half:.2f}"
