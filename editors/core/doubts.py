"""Signs in an edit's report that it will not hold or will damage the model, each with a warning that says what to do.

    search     the search for the value ended with the answer less likely than not
    distance   the updates ended farther from the value than they began
    share      the updates went little of the way to the value
    size       the update is larger than the weight that it changes
    tokens     the model does not choose every token of the answer, by a method that patches until it does

A report is judged by the numbers that it has; a method that reports none of them is never doubted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from errata.editors.core.errors import DoubtfulEditWarning

# Mean negative log probability of the answer's tokens: above this, they have less than even odds.
FAILED_SEARCH = math.log(2)
# Below this share of the way, the value is hardly written.
SMALL_SHARE = 0.25
# Norm of an update over that of its weight. On SmolLM2-135M-Instruct edits that worked had 0.003 to 0.2.
LARGE_UPDATE = 1.0

MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "search": "the search for the value ended with the answer less likely than not",
        "distance": "the updates ended farther from the value than they began",
        "share": "the updates went less than a quarter of the way to the value",
        "size": "the update is larger than the weight that it changes",
        "tokens": "the edited model does not choose every token of the answer",
    }
)
ADVICE: Mapping[str, str] = MappingProxyType(
    {
        "search": "give more v_num_grad_steps, a larger clamp_norm_factor, or other layers",
        "distance": "edit one layer: layers=[...]",
        "share": "give weaker regularisation",
        "size": "give a smaller clamp_norm_factor, more text for the second moments, or another layer",
        "tokens": "give a larger factor, more max_patches or other layers",
    }
)


def doubts(report: Mapping[str, Any]) -> list[str]:
    """Return which signs a report shows, by their names in MEANINGS."""
    found = []
    final = report.get("final")
    if isinstance(final, Mapping) and final.get("nll", 0.0) > FAILED_SEARCH:
        found.append("search")
    distances = [*report.get("distances", ()), report.get("distance_after", 0.0)]
    if distances[-1] > distances[0]:
        found.append("distance")
    elif (written := report.get("written")) is not None and written < SMALL_SHARE:
        found.append("share")
    if (report.get("update_ratio") or 0.0) > LARGE_UPDATE:
        found.append("size")
    if report.get("wrong_tokens"):
        found.append("tokens")
    return found


def warn_of_doubts(reports: Sequence[dict[str, Any]], advice: Mapping[str, str]) -> None:
    """Write the signs into the reports, as `doubts`, and warn once per sign.

    Args:
        reports: One per request; each names its request.
        advice: What to do, by sign, where a method knows better than ADVICE.
    """
    shown: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        if "doubts" in report:  # a part of a larger edit, warned of before
            continue
        if names := doubts(report):
            report["doubts"] = names
        for name in names:
            shown.setdefault(name, []).append(report)
    for name, doubtful in shown.items():
        warnings.warn(
            DoubtfulEditWarning(
                f"{_requests(doubtful, len(reports))}: {MEANINGS[name]} ({_figures(name, doubtful)}); "
                f"{advice.get(name, ADVICE[name])}",
                sign=name,
            ),
            stacklevel=5,
        )


def _requests(doubtful: Sequence[Mapping[str, Any]], count: int) -> str:
    if len(doubtful) == 1:
        return f"request {doubtful[0]['request']}"
    return f"{len(doubtful)} of {count} requests, the first {doubtful[0]['request']}"


def _figures(name: str, doubtful: Sequence[Mapping[str, Any]]) -> str:
    """Return the worst figure behind a sign."""
    if name == "search":
        return f"its probability is {math.exp(-max(report['final']['nll'] for report in doubtful)):.2g} per token"
    if name == "share":
        return f"{100 * min(report['written'] for report in doubtful):.0f} %"
    if name == "size":
        return f"{max(report['update_ratio'] for report in doubtful):.2g} times its norm"
    if name == "tokens":
        worst = max(doubtful, key=lambda report: len(report["wrong_tokens"]))
        return f"wrong are {len(worst['wrong_tokens'])} of its {worst['tokens']}"
    worst = max(doubtful, key=lambda report: report["distance_after"])
    return f"distances {', '.join(f'{d:.3g}' for d in (*worst['distances'], worst['distance_after']))}"
