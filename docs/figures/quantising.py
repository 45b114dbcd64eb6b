"""The figure and the tables of "Quantising edited models": what each method's edits keep at 4 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from errata.benchmarks.reports.naming import INTERVENTIONS, readable
from errata.benchmarks.reports.panels import png
from errata.benchmarks.reports.survival import EDITED, UNTOUCHED, cell, panels

METRICS = ("reliability", "generalization", "locality")
QUANTISED = ("float32 rtn", "float32 gptq")
PRECISIONS = ("float32", "bfloat16")
Summary = Mapping[str, Any]


def picture(data: Mapping[str, Any]) -> bytes:
    """Draw reliability, generalization and locality by teacher-forced tokens on the testbed, a row per method."""
    return png(panels(data["world"], "teacher_forced"), across=3)


def kept_lines(data: Mapping[str, Any]) -> list[str]:
    """Return in Markdown what the methods' edits have before and behind 4 bits, by comparison of probabilities."""
    lines = ["| | edited | round to nearest | GPTQ | perplexity |", "|---|---:|---:|---:|---:|"]
    lines += [_kept(readable(own["method"]), own, (EDITED, *QUANTISED)) for own in data["world"]]
    steps = (UNTOUCHED, *(f"{UNTOUCHED} {name}" for name in ("rtn", "gptq")))
    return [*lines, _kept("untouched", data["world"][0], steps)]


def _kept(name: str, own: Summary, steps: Sequence[str]) -> str:
    ratios = [own["steps"][step]["perplexity"] for step in steps]
    shown = " · ".join("-" if ratio is None else f"{ratio:.3g}" for ratio in ratios)
    return f"| {' | '.join([name, *(_shares(own, step) for step in steps), shown])} |"


def _shares(own: Summary, step: str) -> str:
    return " · ".join(f"{100 * own['steps'][step]['probability'][metric]['mean']:.0f}" for metric in METRICS)


def rounded_lines(data: Mapping[str, Any]) -> list[str]:
    """Return in Markdown the share of right tokens of edited prompts, merged in float32 and in bfloat16."""
    names = [f"{precision}{said}" for said in ("", ", round to nearest", ", GPTQ") for precision in PRECISIONS]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for own in data["world"]:
        if "bfloat16" in own["steps"]:
            steps = [f"{precision}{step}" for step in ("", " rtn", " gptq") for precision in PRECISIONS]
            told = [100 * own["steps"][step]["teacher_forced"]["reliability"]["mean"] for step in steps]
            lines.append(f"| {' | '.join([readable(own['method']), *(f'{value:.1f}' for value in told)])} |")
    return lines


def change_lines(data: Mapping[str, Any]) -> list[str]:
    """Return in Markdown the share of right tokens at 4 bits, and its change with an interval."""
    heads = [f"{metric}, {name}" for metric in METRICS[:2] for name in ("round to nearest", "GPTQ")]
    lines = [f"| | edited | {' | '.join(heads)} |", "|---|---:|---:|---:|---:|---:|"]
    for own in data["world"]:
        forced = {step: own["steps"][step]["teacher_forced"] for step in (EDITED, *QUANTISED)}
        edited = " · ".join(f"{100 * forced[EDITED][metric]['mean']:.0f}" for metric in METRICS[:2])
        told = [cell(forced[step][metric]) for metric in METRICS[:2] for step in QUANTISED]
        lines.append(f"| {' | '.join([readable(own['method']), edited, *told])} |")
    return lines


def grid_lines(data: Mapping[str, Any]) -> list[str]:
    """Return in Markdown how the updates lie on the grid of rounding to nearest, the least carried first."""
    lines = ["| | moved to another point | size, half steps | carried |", "|---|---:|---:|---:|"]
    named = {readable(own["method"]): own["grid"]["rtn"] for own in data["world"]}
    named |= {f"{_real_name(row)}, real model": row["grid"] for row in data["real"] if "grid" in row}
    for name, grid in sorted(named.items(), key=lambda entry: entry[1]["carried"]):
        lines.append(f"| {name} | {100 * grid['moved']:.2g} % | {grid['half_steps']:.2g} | {grid['carried']:.2g} |")
    return lines


def real_lines(data: Mapping[str, Any]) -> list[str]:
    """Return in Markdown what edits of the real model have before and behind 4 bits."""
    lines = [
        "| | | edited | at 4 bits | right tokens, edited | at 4 bits | perplexity |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in data["real"]:
        told = [
            " · ".join(f"{100 * row[step][scoring][metric]['mean']:.0f}" for metric in METRICS[:places])
            for scoring, places in (("probability", 3), ("teacher_forced", 2))
            for step in ("edited", "after")
        ]
        ratios = " · ".join(f"{ratio:.3g}" for ratio in row["perplexity"])
        lines.append(f"| {' | '.join([_real_name(row), INTERVENTIONS[row['compress']], *told, ratios])} |")
    return lines


def _real_name(row: Summary) -> str:
    steps = row["num_steps"]
    return readable(row["method"]) + ("" if steps is None else f", {steps} steps")


def rounded(value: Any) -> Any:
    """Return data with five digits per number, as the file holds them."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: rounded(entry) for name, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
