"""The figure of "Leaks": what each method teaches against what it leaks, and which facts leak the most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from errata.benchmarks.reports.naming import readable
from errata.benchmarks.reports.palette import GREY, LOOKS
from errata.benchmarks.reports.panels import Panel, png

_CURED = ("memorization", "priming", "selectivity")


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw two panels as PNG: methods with and without ignore_top, and facts by how rare their answer was."""
    rows = [row for row in data["testbed"]["rows"] if row["editor"] in data["shown"]]
    return png(
        [
            Panel("Taught and leaked", partial(_methods, rows=rows), (4.2, 3.4)),
            Panel("Rare answers leak more", partial(_facts, rows=rows, names=data["facts_of"]), (4.2, 3.4)),
        ],
        across=2,
    )


def _methods(axis: Any, *, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]  # arrows cross some names
    top = max(row["memorization"]["mean"] for row in rows)
    free = 0.0  # where the next name above the marks may stand
    for row in sorted(rows, key=lambda row: row["priming"]["mean"]):
        look, at = LOOKS[row["editor"]], (row["priming"]["mean"], row["memorization"]["mean"])
        if row["ignore_top"] is not None:
            to = (row["ignore_top"]["priming"]["mean"], row["ignore_top"]["memorization"]["mean"])
            axis.annotate("", to, at, arrowprops={"arrowstyle": "->", "color": look.colour, "lw": 0.9, "alpha": 0.8})
        axis.plot(*at, marker=look.marker, color=look.colour, markersize=5.5, linestyle="")
        name = {"s": readable(row["editor"]), "color": look.colour, "fontsize": 7.5, "path_effects": halo, "zorder": 4}
        if at[1] < top - 0.25 and at[0] < 0.5:  # above its mark, since arrows end to the right of it
            axis.text(at[0] - 0.28, at[1] + 0.42, va="center", **name)
        elif at[1] < top - 0.25:
            axis.text(at[0] + 0.07, at[1], va="center", **name)
        else:
            over = max(at[0], free)
            axis.plot([at[0], over], [at[1], top + 0.12], color=look.colour, linewidth=0.5, alpha=0.7, zorder=1)
            axis.text(over, top + 0.15, rotation=65, rotation_mode="anchor", va="center", **name)
            free = over + 0.17
    axis.set_xlabel(r"priming, mean $\log_{10}$ S$_{prime}$")
    axis.set_ylabel(r"memorization, mean $\log_{10}$ S$_{mem}$")
    axis.set_ylim(0, top + 1)
    axis.set_xlim(0, None)
    axis.grid(linewidth=0.4, alpha=0.4)


def _facts(axis: Any, *, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    for row in rows:
        if row["editor"] in names:
            look = LOOKS[row["editor"]]
            kind = {"marker": look.marker, "color": look.colour, "markersize": 3.5, "linestyle": "", "alpha": 0.8}
            axis.plot(*zip(*row["facts"], strict=True), **kind)
    for place, row in enumerate(row for row in rows if row["editor"] in names):
        rho, name = row["rarity"]["mean"], readable(row["editor"])
        place_of = {"x": 0.99, "y": 0.98 - 0.065 * place, "transform": axis.transAxes, "ha": "right", "va": "top"}
        axis.text(s=f"{name}, Spearman {rho:+.2f}", color=LOOKS[row["editor"]].colour, fontsize=7.5, **place_of)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_xlabel(r"$\log_{10}$ P of the new answer before the edit")
    axis.set_ylabel(r"$\log_{10}$ S$_{prime}$ of the fact")
    axis.grid(linewidth=0.4, alpha=0.4)


def methods(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of the page's table of methods; those over fewer facts than the others say how many."""
    facts = max(row["priming"]["n"] for row in rows)
    return [
        [
            readable(row["editor"]) + ("" if row["priming"]["n"] == facts else f" ({row['priming']['n']} facts)"),
            _number(row["memorization"]["mean"]),
            _interval(row["priming"]),
            _number(row["mean_log10"]["mean"]),
            _number(100 * row["delta_p"]["mean"]),
            *(_number(row[place]["mean"]) if place in row else "-" for place in ("subjects", "relations", "openings")),
            _interval(row["rarity"]),
            f"{row['took']}",
        ]
        for row in rows
    ]


def cures(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the rows of the page's table of ignore_top: each number without and with it."""
    found = []
    for row in rows:
        if (top := row["ignore_top"]) is not None:
            pairs = [" → ".join(_number(own[name]["mean"]) for own in (row, top)) for name in _CURED]
            found.append([readable(row["editor"]), *pairs, f"{row['took']} → {top['took']}"])
    return found


def _interval(entry: Mapping[str, float]) -> str:
    return f"{_number(entry['mean'])} ({_number(entry['low'])} to {_number(entry['high'])})"


def _number(value: float) -> str:
    """Return a number with two digits; one that rounds to zero has no sign."""
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text
