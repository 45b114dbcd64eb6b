"""The part of a report's page that shows single edits: what failed, what held, and what the model said to it."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby

from errata.benchmarks.reports import glossary
from errata.benchmarks.reports.examples import MOST, Example, Examples
from errata.benchmarks.reports.groups import Group
from errata.evaluate import metrics

# Most examples of one kind of probe on the whole page, failed and held apart.
_ON_A_PAGE = 120


def examples_per_kind(rows: int) -> int:
    """Return how many examples of each kind of probe a row shows, so that the page stays small."""
    return max(1, min(MOST, _ON_A_PAGE // max(1, rows)))


def details(group: Group, most: int) -> str:
    """Return one closed element per row with a sample of its edits; nothing where all records are gone.

    Args:
        group: The rows.
        most: Most examples of one kind of probe that failed, and of those that held.
    """
    shown = [(label, own) for label, own in zip(group.labels, group.examples, strict=False) if own.shown]
    if not shown:
        return ""
    parts = "".join(_row(label, own, most) for label, own in shown)
    return f"<h3>What the model said</h3>{parts}"


def _row(label: str, own: Examples, most: int) -> str:
    failed, held = next(iter(own.counts.values()))
    title = next((title for name, title in glossary.SCORING_TITLES if name == own.scoring), own.scoring)
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Prompt", "Wanted", "Before", "After"))
    return (
        f'<details class="examples"><summary>{escape(label)}: {failed} of {failed + held} edited prompts failed'
        "</summary>"
        f'<p class="note">A sample. {escape(title)} decides whether an answer holds.</p>'
        f'<div class="scroll" tabindex="0" role="group" aria-label="Examples"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(_body(own, most))}</tbody></table></div></details>"
    )


def _body(own: Examples, most: int) -> Iterator[str]:
    for (kind, held), found in groupby(own.shown, key=lambda example: (example.kind, example.held)):
        count = own.counts[kind][held]
        verdict = "held" if held else "failed"
        heading = f"<div>{_title(kind)}<span>{count:,} {verdict}</span></div>"
        yield f'<tr class="band"><th scope="rowgroup" colspan="4">{heading}</th></tr>'
        yield from map(_example, list(found)[:most])


def _title(kind: str) -> str:
    """Return the title of the metric of a kind of probe."""
    return escape(next(metric.title for metric in metrics.declared() if metric.is_shown and kind in metric.kinds))


def _example(example: Example) -> str:
    reason = f"<small>{escape(example.reason)}</small>" if example.reason else ""
    cells = (example.wanted, example.before, example.after)
    mark = '<span class="held">✓</span>' if example.held else '<span class="failed">✗</span>'
    texts = "".join(f'<td class="text">{escape(text)}</td>' for text in cells)
    return f'<tr><td class="text">{mark} {escape(example.prompt)}{reason}</td>{texts}</tr>'
