"""What the attributions of some facts say together: components, layers, and how well margins are predicted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from errata.benchmarks.runs.json_values import encodable
from errata.editors.core.files.atomic import write_atomically
from errata.editors.core.locating.attribution import Attribution

NUMBERS, COMPONENTS, PICTURE = "attribution.json", "components.jsonl", "attribution.png"
CONFIDENCE, RESAMPLES = 0.95, 1000
# Points of a scatter plot that are kept, and significant digits of what the files hold.
_POINTS, _DIGITS = 400, 7


def summarise_attribution(found: Attribution, facts: Sequence[str], *, top: int = 10, seed: int = 0) -> dict[str, Any]:
    """Return the averages of an attribution over its facts as plain values.

    Args:
        found: The attribution.
        facts: What each row asks.
        top: How many components are listed that help most, and that hurt most.
        seed: Of the percentile bootstrap over facts, whose 95 % intervals are given.

    Returns:
        `for` and `against`: the components with the largest and the smallest mean weight, each with name, layer, kind,
        mean, low and high (None with a single fact). `sums`: {kind: [sum of the mean weights per layer]}. `checks`: per
        keep rate the correlation of each fact with their mean, and points of predicted and measured margins, both less
        the fact's mean.
    """
    each = found.components.each
    means = found.weights.mean(0)
    order = means.argsort(descending=True, stable=True).tolist()
    drawn = np.random.default_rng(seed).integers(0, len(facts), (RESAMPLES, len(facts)))

    def entry(index: int) -> dict[str, Any]:
        component = each[index]
        low, high = _interval(found.weights[:, index].numpy(), drawn)
        plain = {"name": component.name, "layer": component.layer, "kind": component.kind}
        return {**plain, "mean": float(means[index]), "low": low, "high": high}

    layers = sorted({component.layer for component in each})
    sums = {component.kind: dict.fromkeys(layers, 0.0) for component in each}
    for component, mean in zip(each, means.tolist(), strict=True):
        sums[component.kind][component.layer] += mean
    count = min(top, len(order) // 2)
    return {
        "facts": [
            {"fact": fact, "margin": margin, "least": least}
            for fact, margin, least in zip(facts, found.margins.tolist(), found.least.tolist(), strict=True)
        ],
        "n_components": len(each),
        "n_masks": found.n_masks,
        "keep": found.keep,
        "layers": layers,
        "sums": {kind: list(of_layer.values()) for kind, of_layer in sums.items()},
        "for": [entry(i) for i in order[:count]],
        "against": [entry(i) for i in order[::-1][:count]],
        "checks": [_check(check, drawn) for check in found.checks],
    }


def _check(check: Any, drawn: np.ndarray) -> dict[str, Any]:
    low, high = _interval(check.correlations.numpy(), drawn)
    pair = [(part - part.mean(0)).flatten() for part in (check.predicted, check.measured)]
    # Drawn, since a fixed stride over masks and facts may meet the same few facts again and again.
    shown = np.sort(np.random.default_rng(0).permutation(len(pair[0]))[:_POINTS])
    return {
        "keep": check.keep,
        "masks": len(check.measured),
        "mean": float(check.correlations.mean()),
        "low": low,
        "high": high,
        "correlations": check.correlations.tolist(),
        "predicted": _rounded(pair[0][shown].tolist()),
        "measured": _rounded(pair[1][shown].tolist()),
    }


def _interval(values: np.ndarray, drawn: np.ndarray) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    ends = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[drawn].mean(1), (ends, 1 - ends))
    return float(low), float(high)


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]


def write_attribution(
    folder: Path, settings: Mapping[str, Any], found: Attribution, summary: Mapping[str, Any], picture: bytes
) -> None:
    """Write settings and averages, one line per component with its weight for each fact, and the picture.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"name": component.name, "weights": _rounded(weights)})
        for component, weights in zip(found.components.each, found.weights.T.tolist(), strict=True)
    ]
    write_atomically(folder / COMPONENTS, "".join(f"{line}\n" for line in lines).encode())
    numbers = json.dumps(encodable({"settings": settings, **summary}), allow_nan=False)
    write_atomically(folder / NUMBERS, f"{numbers}\n".encode())
    write_atomically(folder / PICTURE, picture)
