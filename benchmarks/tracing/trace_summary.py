"""What the traces of many facts say together: the effect by class of tokens and layer, with intervals over facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from errata.editors.core.locating.answer_scores import METRICS, Metric
from errata.editors.core.locating.donors import TraceableFact
from errata.editors.core.locating.many_facts import FactTraces
from errata.editors.core.locating.token_classes import CLASSES, effects_by_class
from errata.editors.core.locating.tracing import FactTrace
from errata.evaluate.probes import Case

CONFIDENCE, RESAMPLES = 0.95, 1000


def facts_of(cases: Sequence[Case]) -> list[TraceableFact]:
    """Return the facts of a dataset that have a subject and a true answer, each with the relation that donors share.

    Of a record with two answers, it is the true one that counts; otherwise the one that the record teaches. Facts
    whose records name no relation share one if their prompts differ in the subject alone.
    """
    found = []
    for case in cases:
        for request in case.requests:
            if request.subject is None:
                continue
            template = "{}".join(request.template)
            relation = case.reference[0] if case.reference else template
            answer = request.target_true or request.target
            found.append(TraceableFact(template, request.subject, answer, relation, str(case.id), request.chat))
    return found


def is_normalised(traces: Sequence[FactTrace], metric: Metric) -> bool:
    """Return whether averages of a metric are of shares: for the logit difference, where subjects were replaced.

    Donors are chosen so that the whole way is long. With noise it may be short, and a share of it means little.
    """
    return metric == "logit_difference" and all(trace.corruption.startswith("the subject") for trace in traces)


def summarise(found: FactTraces, *, seed: int = 0) -> dict[str, Any]:
    """Return counts and averages of many traces as plain values.

    `effects` has for each grid and metric the classes of tokens, and for each class the mean effect per layer with the
    ends of its 95 % interval (percentile bootstrap over facts), the number of tokens, and the layer of the largest
    mean. See `answer_scores.effect` for what an effect is; `normalised` lists the metrics whose effects are shares.
    """
    traces = found.traces
    drawn = np.random.default_rng(seed).integers(0, len(traces), (RESAMPLES, len(traces)))
    normalised = [metric for metric in METRICS if is_normalised(traces, metric)]
    scores = ("probability", "logit_difference", "kl")
    ends = {
        moment: {score: float(np.mean([getattr(trace, moment)[score] for trace in traces])) for score in scores}
        for moment in ("clean", "corrupted")
    }
    return {
        "counts": found.counts(),
        "left_out": [asdict(entry) for entry in found.left_out],
        "means": ends,
        "normalised": normalised,
        "effects": {
            grid: {metric: _by_class(traces, grid, metric, drawn, metric in normalised) for metric in METRICS}
            for grid in traces[0].grids
        },
    }


def _by_class(
    traces: Sequence[FactTrace], grid: str, metric: Metric, drawn: np.ndarray, normalised: bool
) -> dict[str, dict[str, Any]]:
    sums = effects_by_class(traces, grid, metric, normalised=normalised)
    means, resampled = sums.means(), sums.drawn_means(drawn)
    found = {}
    for place, name in enumerate(CLASSES):
        tokens = int(sums.counts[:, place].sum())
        if not tokens:
            continue
        there = resampled[:, place][~np.isnan(resampled[:, place]).any(axis=1)]
        low, high = np.percentile(there, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)], axis=0)
        found[name] = {
            "mean": means[place].tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "tokens": tokens,
            "best_layer": int(means[place].argmax()),
        }
    return found


def best_cells(effects: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, int, float, float, float]]:
    """Return (class, layer, mean, low, high) of the layer with the largest mean in each class of a summary."""
    rows = []
    for name, entry in effects.items():
        layer = entry["best_layer"]
        rows.append((name, layer, *(entry[end][layer] for end in ("mean", "low", "high"))))
    return rows
