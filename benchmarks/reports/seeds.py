"""Runs that differ in their seed alone, as one run: the mean of each number over seeds, and its standard deviation.

    row = combined([run_of_seed_0, run_of_seed_1, run_of_seed_2])
    row["seeds"]                                        # 3
    row["summary"]["probability"]["reliability"]        # {"mean", "low", "high", "n", "deviation"}

`low` and `high` are one standard deviation away from the mean, so that pictures draw the deviation as they draw an
interval. The cases of all seeds are the union of their cases; the value of a case is its mean over the seeds that have
it. Two rows are compared over these cases, because a case that two seeds share is no second observation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, geometric_mean, stdev
from typing import Any

from errata.benchmarks.reports.naming import SEEDS, Results
from errata.benchmarks.runs.json_values import number
from errata.evaluate.metrics import Values

# Parts of results.json that hold means with intervals, and parts that hold plain numbers.
_TABLES, _NUMBERS, _COUNTS = ("summary", "before"), ("collapse", "speed"), ("counts",)


def combined(runs: Sequence[Results]) -> Results:
    """Return the runs as one.

    Args:
        runs: Runs that differ in their seed alone, at least one.

    Returns:
        The run itself if there is only one. Else a mapping like a results.json, with means over the seeds, counts that
        are summed, `seeds`, the number of seeds, and `members`, the runs.
    """
    if len(runs) == 1:
        return runs[0]
    first = runs[0]
    merged = {**first, "seeds": len(runs), "members": list(runs)}
    config = {name: value for name, value in first["config"].items() if name not in SEEDS}
    merged["config"] = {**config, "seed": first["config"]["seed"]}
    for part in _TABLES:
        merged[part] = _tables([run[part] for run in runs])
    for part in _NUMBERS:
        merged[part] = {name: _mean(name, [run[part].get(name) for run in runs]) for name in first[part]}
    for part in _COUNTS:
        merged[part] = {name: sum(run[part].get(name, 0) for run in runs) for name in first[part]}
    if "took" in first:
        merged["took"] = sum(run.get("took", 0) for run in runs)
    if "doubts" in first:
        doubts = Counter[str]()
        for run in runs:
            doubts.update(run.get("doubts", {}))
        merged["doubts"] = dict(doubts)
    merged["papers"] = _row([run.get("papers", {}) for run in runs])
    merged["warnings"] = list(dict.fromkeys(warning for run in runs for warning in run["warnings"]))
    return merged


def members(run: Results) -> Sequence[Results]:
    """Return the runs of a row, one for each seed."""
    return run.get("members", [run])


def _tables(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scorings = dict.fromkeys(name for part in parts for name in part)
    return {name: _row([part.get(name, {}) for part in parts]) for name in scorings}


def _row(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean over seeds of each metric that a table has; other entries are those of the first seed."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        there = [part[name] for part in parts if name in part]
        found[name] = over_seeds(there) if isinstance(there[0], Mapping) else there[0]
    return found


def over_seeds(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean over seeds of one metric, its standard deviation between them, and the cases of a seed.

    `n` is that of the seed with the fewest cases.
    """
    mean, deviation = mean_and_deviation([entry["mean"] for entry in entries])
    ends = {"low": mean - deviation, "high": mean + deviation}
    return {"mean": mean, **ends, "n": min(entry["n"] for entry in entries), "deviation": deviation}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean, and the standard deviation of a sample; 0 for a single value, NaN if a value is not finite."""
    mean = fmean(values)
    if not math.isfinite(mean):
        return mean, math.nan
    return mean, stdev(values) if len(values) > 1 else 0.0


def _mean(name: str, values: Sequence[Any]) -> float | None:
    """Return the mean of a number over seeds: of perplexities the geometric mean, of worst ones the worst."""
    numbers = [number(value) for value in values if value is not None]
    if not numbers:
        return None
    if name.endswith("_worst"):
        return max(numbers)
    return geometric_mean(numbers) if name.startswith("perplexity") and min(numbers) > 0 else fmean(numbers)


def mean_values(each: Sequence[Mapping[str, Values]]) -> dict[str, Values]:
    """Return the values of all cases over seeds: of a case that several seeds have, the mean.

    Args:
        each: For each seed, {case id: {scoring: {metric: value}}}.
    """
    collected: dict[str, dict[str, dict[str, list[float]]]] = {}
    for values in each:
        for case, tables in values.items():
            for scoring, metrics in tables.items():
                table = collected.setdefault(case, {}).setdefault(scoring, {})
                for metric, value in metrics.items():
                    table.setdefault(metric, []).append(value)
    return {
        case: {scoring: {m: fmean(values) for m, values in table.items()} for scoring, table in tables.items()}
        for case, tables in collected.items()
    }
