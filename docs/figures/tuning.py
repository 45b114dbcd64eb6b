"""The figure of "Finding settings": trace and edits by layer of a real model and of the testbed's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from errata.benchmarks.reports.panels import png
from errata.benchmarks.tuning import pictures

_SHARES = ("efficacy", "paraphrase", "specificity")


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw all panels of the first search, and of the other shapes how trace and edits go together, as PNG."""
    first, *others = data["searches"]
    found = pictures.panels(first)
    for search in others:
        if search["is_drawn"]:
            last = pictures.localisation_panels(search)[-1]
            found.append(replace(last, title=last.title.replace("Both", search["label"])))
    return png(found, across=4)


def gains(data: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of gains: one per search."""
    rows = []
    for search in data["searches"]:
        unseen = search["unseen"]
        rows.append(
            [
                search["label"],
                _changes(search),
                _signed(search["development"]["gain"]),
                _signed(unseen["gain"]),
                *(_shares(unseen["papers"][end]) for end in ("start", "found")),
                " and ".join(f"{unseen['collapse'][end]['neighborhood_kl']:.2g}" for end in ("start", "found")),
            ]
        )
    return rows


def correlations(data: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the table of correlations: one per search."""
    rows = []
    for search in data["searches"]:
        there = search["localisation"]
        within, names = there["within_facts"], ("score", "reliability", "locality")
        found = [_signed(there["correlations"][name], digits=2) for name in names]
        rows.append(
            [
                search["label"],
                str(len(there["layers"])),
                *found,
                "-" if within is None else f"{_signed(within, digits=2)}, {within['n']}",
            ]
        )
    return rows


def _changes(search: Mapping[str, Any]) -> str:
    """Return which fields a search has changed, and to what; "nothing" if none."""
    start, found = search["start"], search["found"]
    changed = {name: value for name, value in found.items() if value != start.get(name)}
    shown = (f"`{name}` {value[0] if isinstance(value, list) else f'{value:g}'}" for name, value in changed.items())
    return ", ".join(shown) or "nothing"


def _shares(papers: Mapping[str, Any]) -> str:
    return " · ".join(f"{100 * papers[name]['mean']:.0f}" for name in _SHARES)


def _signed(entry: Mapping[str, float], digits: int = 3) -> str:
    mean, low, high = (f"{entry[end]:+.{digits}f}" for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
