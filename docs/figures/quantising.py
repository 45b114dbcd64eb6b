"""The figure and the tables of "Quantising edited models": what each method's edits keep at 4 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from errata.benchmarks.reports.naming import readable
from errata.benchmarks.reports.panels import png
from errata.benchmarks.reports.survival import EDITED, UNTOUCHED, cell, panels

METRICS = ("reliability", "generalization", "locality")
SHIPPED = ("bfloat16", "bfloat16 rtn", "bfloat16 gptq")
PLAIN = ("float32 rtn", "float32 gptq")
Summary = Mapping[str, Any]


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw reliability, generalization and locality by teacher-forced tokens on the testbed, a row per method."""
    return png(panels(data["world"], "teacher_forced"), across=3)


def kept_lines(data: Mapping[str, Any]) -> list[str]:
    """Return in Markdown what the methods' edits have before and behind 4 bits, by comparison of probabilities."""
    lines = ["| | edited | bfloat16 | round to nearest | GPTQ | perplexity |", "|---|---:|---:|---:|---:|---:|"]
    lines += [_kept(readable(own["method"]), own, EDITED, SHIPPED) for own in data["world"]]
    first = data["world"][0]
    return [*lines, _kept("untouched", first, UNTOUCHED, (UNTOUCHED, *(f"{UNTOUCHED} {n}" for n in ("rtn", "gptq"))))]


def _kept(name: str, own: Summary, edited: str, steps: Sequence[str]) -> str:
    ratios = [own["steps"][step]["perplexity"] for step in (edited, *steps[1:])]
    shown = " · ".join("-" if ratio is None else f"{ratio:.3g}" for ratio in ratios)
    cells = [name, *(_shares(own, step) for step in (edited, *steps)), shown]
    return f"| {' | '.join(cells)} |"


def _shares(own: Summary, step: str) -> str:
    return " · ".join(f"{100 * own['steps'][step]['probability'][metric]['mean']:.0f}" for metric in METRICS)


def change_lines(data: Mapping[str, Any]) -> list[str]:
    """Return in Markdown the share of right tokens at 4 bits, and its change with an interval."""
    heads = [f"{metric}, {name}" for metric in METRICS[:2] for name in ("round to nearest", "GPTQ")]
    lines = [f"| | edited | {' | '.join(heads)} |", "|---|---:|---:|---:|---:|---:|"]
    for own in data["world"]:
        forced = {step: own["steps"][step]["teacher_forced"] for step in (EDITED, *SHIPPED)}
        edited = " · ".join(f"{100 * forced[EDITED][metric]['mean']:.0f}" for metric in METRICS[:2])
        told = [cell(forced[step][metric]) for metric in METRICS[:2] for step in SHIPPED[1:]]
        lines.append(f"| {' | '.join([readable(own['method']), edited, *told])} |")
    return lines


def grid_lines(data: Mapping[str, Any]) -> list[str]:
    """Return in Markdown how the updates lie on both grids, on both models."""
    lines = [
        "| | moved to another point | size, half steps | carried, round to nearest | carried, GPTQ |",
        "|---|---:|---:|---:|---:|",
    ]
    for model, rows in (("", data["world"]), (", real model", data["real"])):
        for own in sorted(rows, key=lambda one: one["grid"]["rtn"]["carried"]):
            rtn, other = own["grid"]["rtn"], own["grid"].get("gptq")
            carried = "-" if other is None else f"{other['carried']:.2g}"
            told = [f"{100 * rtn['moved']:.2g} %", f"{rtn['half_steps']:.2g}", f"{rtn['carried']:.2g}", carried]
            lines.append(f"| {' | '.join([readable(own['method']) + model, *told])} |")
    return lines


def rounded(value: Any) -> Any:
    """Return data with five digits per number, as the file holds them."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: rounded(entry) for name, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
