"""Examples for a report: edits that failed and edits that held, with what the model said before and after.

Only a few of each are kept, evenly spread over the run, and long texts are cut: the page stays small.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from errata.benchmarks.runs import summary
from errata.benchmarks.runs.json_values import number
from errata.evaluate import metrics

# Most examples of one kind of probe that failed or held, and most characters of a text.
MOST, LONGEST = 3, 160


@dataclasses.dataclass(frozen=True)
class Example:
    """One probe of one edit.

    Attributes:
        case: The edit's id.
        kind: Of the probe.
        held: Whether it was answered as wanted, under the scoring of the report.
        prompt: What was asked.
        wanted: The answer of a perfect edit.
        before, after: What the model said; where no text was generated, which of the two answers was more probable.
        reason: Why the edit was refused or undone; None if it was made.
    """

    case: str
    kind: str
    held: bool
    prompt: str
    wanted: str
    before: str
    after: str
    reason: str | None


@dataclasses.dataclass(frozen=True)
class Examples:
    """A sample of a run's probes: `shown`, of `failed` and `held` probes per kind.

    Attributes:
        scoring: The scoring under which a probe failed or held.
        counts: {kind of probe: (failed, held)}.
        shown: Failed probes first, kind by kind.
    """

    scoring: str
    counts: Mapping[str, tuple[int, int]]
    shown: Sequence[Example]


def examples_of(records: Sequence[Mapping[str, Any]], scoring: str) -> Examples:
    """Return a sample of what a run recorded.

    Args:
        records: The run's records.
        scoring: The scoring under which a probe failed or held.
    """
    kinds = {kind for metric in metrics.declared() if metric.is_shown for kind in metric.kinds}
    by_kind: dict[str, tuple[list[Example], list[Example]]] = {}
    for record in sorted(records, key=lambda record: record["place"]):
        for entry, outcome in zip(summary.installed_probes(record), summary.outcomes(record), strict=True):
            value = metrics.success_by_scoring(outcome).get(scoring)
            if value is not None and entry["kind"] in kinds:
                failed, held = by_kind.setdefault(entry["kind"], ([], []))
                (held if value == 1 else failed).append(_example(record, entry, held=value == 1))
    counts = {kind: (len(failed), len(held)) for kind, (failed, held) in by_kind.items()}
    shown = [example for failed, held in by_kind.values() for example in (*_spread(failed), *_spread(held))]
    return Examples(scoring, counts, shown)


def _spread(found: Sequence[Example]) -> Sequence[Example]:
    """Return at most `MOST` of them, evenly spread."""
    step = math.ceil(len(found) / MOST)
    return found[::step] if step else []


def _example(record: Mapping[str, Any], entry: Mapping[str, Any], *, held: bool) -> Example:
    return Example(
        case=str(record["case"]),
        kind=entry["kind"],
        held=held,
        prompt=shortened(entry["prompt"]),
        wanted=shortened(entry["target"] or ""),
        before=_said(entry, entry["before"]),
        after=_said(entry, entry["after"] or entry["before"]),
        reason=record["reason"],
    )


def _said(entry: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
    """Return what the model wrote, or else how probable the answers were to it, per token."""
    if answer["text"] is not None:
        return shortened(answer["text"].strip())
    asked = ((entry["target"], answer["nll_target"]), (entry["other"], answer["nll_other"]))
    known = sorted((number(nll), said) for said, nll in asked if said is not None and nll is not None)
    return shortened("; ".join(f"{said} ({100 * math.exp(-nll):.3g} %)" for nll, said in known))


def shortened(text: str) -> str:
    """Return a text in one line, cut where it is long."""
    plain = " ".join(text.split())
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST - 1]}…"
