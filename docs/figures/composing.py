"""The figure and the tables of "Composing interventions": what edits keep in both orders, on two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.benchmarks.reports.naming import readable
from errata.benchmarks.reports.orders import order_panels
from errata.benchmarks.reports.panels import png
from errata.evaluate.orders import order_free_error, order_sensitivity

FIRST, LATER = "edit-compress", "compress-edit"
QUANTISED = ("rtn", "gptq")
NAMED = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "rtn": "round to nearest", "gptq": "GPTQ"}
METRICS = ("reliability", "generalization", "locality")


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw reliability, generalization and locality on the testbed, and reliability by set F1."""
    panels = order_panels([_run(row) for row in data["world"]["runs"]], "probability")
    return png(panels[:4], across=2)


def _run(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as the results of a run."""
    alone = row["alone"]
    steps = {} if alone is None else {"edit": {"summary": alone["summary"], "perplexity_ratio": alone["perplexity"]}}
    met = {"name": row["met"]}
    said = {"order": row["order"], "end": "again", "compress": met, "unlearn": {}, "steps": steps, "average_bits": None}
    return {
        "names": {"editor": row["method"]},
        "config": {"editor": {"name": row["method"]}, "compose": {"order": row["order"], "compress": met}},
        "composition": said,
        "summary": row["summary"],
        "collapse": {"perplexity_ratio": row["perplexity"]},
    }


def order_lines(data: Mapping[str, Any]) -> list[str]:
    """Return the order table of the testbed in Markdown: reliability by probability and by set F1."""
    lines = [
        "| | | edited alone | edited first | edited later | order-free error | order sensitivity |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for first, later in _pairs(data["world"]["runs"]):
        told = [_reliabilities(one) for one in (first["alone"], first, later)]
        both = list(zip(*told[1:], strict=True))
        cells = [
            *(readable(first["method"]), NAMED[first["met"]], *map(_shares, told)),
            _shares([order_free_error(*pair) for pair in both]),
            _shares([order_sensitivity(*pair) for pair in both]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def kept_lines(data: Mapping[str, Any]) -> list[str]:
    """Return in Markdown what each method's edits keep at 4 bits: reliability, generalization, locality by set F1."""
    lines = ["| | float32 | " + " | ".join(NAMED[name] for name in QUANTISED) + " |", "|---|---:|---:|---:|"]
    rows = [row for row in data["world"]["runs"] if row["order"] == FIRST]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["met"]: row for row in rows if row["method"] == method}
        told = [own[QUANTISED[0]]["alone"], *(own[name] for name in QUANTISED)]
        lines.append(f"| {readable(method)} | {' | '.join(_shares(_by_set(one)) for one in told)} |")
    return lines


def _pairs(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    later = {(row["method"], row["met"]): row for row in rows if row["order"] == LATER}
    for row in rows:
        if row["order"] == FIRST:
            yield row, later[row["method"], row["met"]]


def _reliabilities(row: Mapping[str, Any]) -> list[float]:
    return [row["summary"][scoring]["reliability"]["mean"] for scoring in ("probability", "set_f1")]


def _by_set(row: Mapping[str, Any]) -> list[float]:
    return [row["summary"]["set_f1"][metric]["mean"] for metric in METRICS]


def _shares(values: Sequence[float]) -> str:
    return " · ".join(f"{100 * value:.0f}" for value in values)


def real_lines(data: Mapping[str, Any]) -> list[str]:
    """Return the table of the real model in Markdown: reliability, generalization, locality by set F1, perplexity."""
    kinds = ("rewrite", "paraphrase", "neighborhood")
    lines = ["| | probability | set F1 | perplexity |", "|---|---:|---:|---:|"]
    for name, row in data["real"]["rows"].items():
        told = [_shares([row[kind][scoring] for kind in kinds]) for scoring in ("probability", "set_f1")]
        words = " ".join(readable(word.strip(",")) + word[len(word.strip(",")) :] for word in name.split(" "))
        for short, long in NAMED.items():
            words = words.replace(short, long)
        lines.append(f"| {words} | {' | '.join(told)} | {row['perplexity']:.3g} |")
    return lines
