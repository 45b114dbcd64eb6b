"""The figure and the tables of "Composing interventions": what edits keep in both orders, on two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
    """Draw reliability, generalization and locality by set F1 on the testbed, and reliability on the real model."""
    world, real = (order_panels([_run(row) for row in data[where]["runs"]], "set_f1") for where in ("world", "real"))
    # Names of rows take as much width as two panels, so that a panel stands by itself.
    titles = [*(panel.title for panel in world[:3]), f"{real[0].title}, on SmolLM2"]
    size = (5.4, 3.4)
    panels = [
        replace(panel, title=title, size=size) for panel, title in zip([*world[:3], real[0]], titles, strict=True)
    ]
    return png(panels, across=2)


def _run(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as the results of a run."""
    alone = row["alone"]
    steps = {} if alone is None else {"edit": {"summary": alone["summary"], "perplexity_ratio": alone["perplexity"]}}
    met = {"name": row["met"], **({"sparsity": row["sparsity"]} if "sparsity" in row else {})}
    said = {"order": row["order"], "end": "again", "compress": met, "unlearn": {}, "steps": steps, "average_bits": None}
    return {
        "names": {"editor": row["method"], **dict.fromkeys(("model", "dataset", "protocol"), "")},
        "config": {"editor": {"name": row["method"]}, "compose": {"order": row["order"], "compress": met}},
        "composition": said,
        "summary": row["summary"],
        "collapse": {"perplexity_ratio": row["perplexity"]},
    }


def order_lines(data: Mapping[str, Any], where: str) -> list[str]:
    """Return an order table in Markdown: reliability by probability and by set F1, and how far the orders differ.

    Args:
        data: Of the figure.
        where: Name of the model: `world` or `real`.
    """
    lines = [
        "| | | edited alone | edited first | edited later | later less first, set F1 | order-free error "
        "| order sensitivity |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for first, later in _pairs(data[where]["runs"]):
        told = [_reliabilities(one) for one in (first["alone"], first, later)]
        both = list(zip(*told[1:], strict=True))
        cells = [
            *(readable(first["method"]), _met(first), *map(_shares, told)),
            _interval(first["difference"]["set_f1"]),
            _shares([order_free_error(*pair) for pair in both]),
            _shares([order_sensitivity(*pair) for pair in both]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rest_lines(data: Mapping[str, Any], where: str) -> list[str]:
    """Return in Markdown what the order table leaves out: generalization and locality by set F1, and perplexity."""
    lines = [
        "| | | generalization: alone, first, later | locality: alone, first, later | perplexity: alone, first, later |",
        "|---|---|---:|---:|---:|",
    ]
    for first, later in _pairs(data[where]["runs"]):
        told = (first["alone"], first, later)
        cells = [_shares([one["summary"]["set_f1"][metric]["mean"] for one in told]) for metric in METRICS[1:]]
        cells.append(" · ".join(f"x {one['perplexity']:.2f}" for one in told))
        lines.append(f"| {readable(first['method'])} | {_met(first)} | {' | '.join(cells)} |")
    return lines


def _met(row: Mapping[str, Any]) -> str:
    sparsity = row.get("sparsity")
    return NAMED[row["met"]] + ("" if sparsity is None else f" {100 * sparsity:.0f} %")


def _interval(found: Mapping[str, float]) -> str:
    mean, low, high = (
        f"{100 * found[name]:+.0f}".replace("+0", "0").replace("-0", "0") for name in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]"


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
    later = {_key(row): row for row in rows if row["order"] == LATER}
    for row in rows:
        if row["order"] == FIRST:
            yield row, later[_key(row)]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["met"], row.get("sparsity")


def _reliabilities(row: Mapping[str, Any]) -> list[float]:
    return [row["summary"][scoring]["reliability"]["mean"] for scoring in ("probability", "set_f1")]


def _by_set(row: Mapping[str, Any]) -> list[float]:
    return [row["summary"]["set_f1"][metric]["mean"] for metric in METRICS]


def _shares(values: Sequence[float]) -> str:
    return " · ".join(f"{100 * value:.0f}" for value in values)
