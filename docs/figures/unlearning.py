"""Figure and tables of unlearning in "Composing interventions": what edits and unlearnings leave of each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from errata.benchmarks.reports.naming import readable
from errata.benchmarks.reports.orders import order_panels
from errata.benchmarks.reports.panels import png

FIRST, LATER = "edit-unlearn", "unlearn-edit"
NAMED = {"rmu": "RMU", "ga": "gradient ascent", "gd": "gradient difference"}
METRICS = ("reliability", "generalization", "locality")
SHOWN = ("Reliability", "Generalization", "Forget set, answered", "Retain set, answered")
Row = Mapping[str, Any]


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw what is left of the edits, and of the facts to forget and to retain, in both orders."""
    panels = {panel.title: panel for panel in order_panels([_run(row) for row in data["runs"]], "probability")}
    return png([panels[title] for title in SHOWN], across=2)


def _run(row: Row) -> dict[str, Any]:
    """Return a row as the results of a run."""
    met = {"name": row["met"]}
    said = {"order": row["order"], "end": "again", "compress": {}, "unlearn": met, "steps": row["steps"]}
    return {
        "names": {"editor": row["method"]},
        "config": {"editor": {"name": row["method"]}, "compose": {"order": row["order"], "unlearn": met}},
        "composition": {**said, "average_bits": None, "forgetting": row["forgetting"]},
        "summary": row["summary"],
        "collapse": {"perplexity_ratio": row["perplexity"]},
    }


def edit_lines(data: Mapping[str, Any]) -> list[str]:
    """Return in Markdown what is left of the edits: reliability, generalization and locality by probability."""
    lines = ["| | | edited alone | edited, then unlearned | unlearned, then edited |", "|---|---|---:|---:|---:|"]
    for first, later in _pairs(data):
        told = [first["steps"]["edit"]["summary"], first["summary"], later["summary"]]
        cells = [
            " · ".join(f"{100 * own['probability'][metric]['mean']:.0f}" for metric in METRICS)
            + f" ({100 * own['set_f1']['reliability']['mean']:.0f})"
            for own in told
        ]
        lines.append(f"| {readable(first['method'])} | {NAMED[first['met']]} | {' | '.join(cells)} |")
    return lines


def forgotten_lines(data: Mapping[str, Any]) -> list[str]:
    """Return in Markdown what is left of the texts: answers to forget and to retain, losses, and the perplexity."""
    lines = [
        "| | | edited alone | unlearned alone | edited, then unlearned | unlearned, then edited | perplexity, times |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for first, later in _pairs(data):
        steps = [first["steps"]["edit"], later["steps"]["unlearn"]]
        told = [*(step["forgetting"] for step in steps), first["forgetting"]["end"], later["forgetting"]["end"]]
        cells = [f"{_answers(own)} ({own['forget']['loss']:.1f} · {own['retain']['loss']:.1f})" for own in told]
        ratios = f"{first['perplexity']:.3g} · {later['perplexity']:.3g}"
        lines.append(f"| {readable(first['method'])} | {NAMED[first['met']]} | {' | '.join(cells)} | {ratios} |")
    return lines


def _answers(own: Mapping[str, Any]) -> str:
    return " · ".join(f"{100 * own[name]['answers']:.0f}" for name in ("forget", "retain"))


def _pairs(data: Mapping[str, Any]) -> Iterator[tuple[Row, Row]]:
    later = {(row["method"], row["met"]): row for row in data["runs"] if row["order"] == LATER}
    for row in data["runs"]:
        if row["order"] == FIRST:
            yield row, later[row["method"], row["met"]]
