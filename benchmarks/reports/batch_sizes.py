"""The panels of a study of batch sizes: scores and damage of the same edits against the size of their batches.

Each method has one line. A method whose runs differ in more than the size of their batches has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from errata.benchmarks.reports.figures import ratio_axis
from errata.benchmarks.reports.glossary import measured_titles
from errata.benchmarks.reports.naming import Results, differing, readable
from errata.benchmarks.reports.palette import look
from errata.benchmarks.reports.panels import Panel
from errata.benchmarks.runs.json_values import number
from errata.benchmarks.runs.results import is_sequence

# Returns a mean and the interval around it; None where it was not measured.
Value = Callable[[Results], tuple[float, float, float] | None]
_ALONG = ("reliability", "generalization", "locality")


def panels(runs: Sequence[Results], scoring: str) -> list[Panel]:
    """Return scores, known facts kept and perplexity against the batch size; nothing where no method has two sizes.

    Args:
        runs: Of one group.
        scoring: The one that the dataset's papers use.
    """
    lines = _lines(runs)
    if not lines:
        return []
    titles = measured_titles(runs, scoring)
    values: list[tuple[str, Value]] = [("Score", _score)]
    values += [(title, partial(_metric, scoring=scoring, name=name)) for name, title in titles if name in _ALONG]
    values.append(("Known facts kept", _kept))
    shown = [(title, value) for title, value in values if any(map(value, runs))]
    found = [Panel(f"{title}, %", partial(_shares, lines=lines, value=value)) for title, value in shown]
    if any(_ratio(run) is not None for run in runs):
        found.append(Panel("Perplexity", partial(_perplexities, lines=lines)))
    return found


def _lines(runs: Sequence[Results]) -> dict[str, list[Results]]:
    """Return {method: its runs by the size of their batches}, for methods whose runs differ in nothing else."""
    if not is_sequence(runs[0]):
        return {}
    by_method: dict[str, list[Results]] = {}
    for run in runs:
        by_method.setdefault(run["names"]["editor"], []).append(run)
    return {
        method: sorted(own, key=_size) for method, own in by_method.items() if list(differing(own)) == ["batch_size"]
    }


def _size(run: Results) -> int:
    return run["config"]["batch_size"]


def _score(run: Results) -> tuple[float, float, float] | None:
    return _percent(run["papers"].get("score"))


def _metric(run: Results, *, scoring: str, name: str) -> tuple[float, float, float] | None:
    return _percent(run["summary"].get(scoring, {}).get(name))


def _percent(entry: Mapping[str, float] | None) -> tuple[float, float, float] | None:
    return None if entry is None else (100 * entry["mean"], 100 * entry["low"], 100 * entry["high"])


def _kept(run: Results) -> tuple[float, float, float] | None:
    kept = run["collapse"]["retention"]
    return None if kept is None else (100 * kept, 100 * kept, 100 * kept)


def _ratio(run: Results) -> float | None:
    ratio = run["collapse"]["perplexity_ratio"]
    return None if ratio is None else number(ratio)


def _shares(axis: Any, *, lines: Mapping[str, Sequence[Results]], value: Value) -> None:
    for method, runs in lines.items():
        some = [(_size(run), *found) for run in runs if (found := value(run)) is not None]
        if some:
            sizes, mean, low, high = zip(*some, strict=True)
            below, above = zip(*((m - a, b - m) for m, a, b in zip(mean, low, high, strict=True)), strict=True)
            axis.errorbar(sizes, mean, yerr=(_positive(below), _positive(above)), elinewidth=0.9, **_style(method))
    axis.set_ylim(0, 104)
    _sizes(axis, lines)


def _positive(lengths: Sequence[float]) -> list[float]:
    """Return the lengths without the negative rests that rounding leaves of a bar of no length."""
    return [max(0.0, length) for length in lengths]


def _perplexities(axis: Any, *, lines: Mapping[str, Sequence[Results]]) -> None:
    ratios = []
    for method, runs in lines.items():
        some = [(_size(run), ratio) for run in runs if (ratio := _ratio(run)) is not None]
        if some:
            axis.plot(*zip(*some, strict=True), **_style(method))
            ratios += [ratio for _, ratio in some]
    ratio_axis(axis, ratios)
    axis.set_ylabel("after / before")
    _sizes(axis, lines)


def _style(method: str) -> dict[str, Any]:
    own = look(method)
    line = {"color": own.colour, "linewidth": 1.4, "label": readable(method)}
    return {**line, "marker": own.marker, "markersize": 5, "markeredgewidth": 0}


def _sizes(axis: Any, lines: Mapping[str, Sequence[Results]]) -> None:
    """Draw the axis of sizes, logarithmic."""
    sizes = sorted({_size(run) for runs in lines.values() for run in runs})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.set_xlabel("edits in a batch, logarithmic")
    axis.grid()
