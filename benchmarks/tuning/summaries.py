"""What a search has found, as the plain values of tune.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from errata.benchmarks.bench.command_line import command
from errata.benchmarks.bench.config import BenchConfig, editor_config, editor_name
from errata.benchmarks.bench.tune_config import TuneConfig
from errata.benchmarks.runs import environment
from errata.benchmarks.runs.results import SCHEMA_VERSION
from errata.benchmarks.tracing.traced_layers import TracedLayers, window_effect
from errata.benchmarks.tuning.setting_scores import Values, gain_of, metric_means, score_of
from errata.evaluate.intervals import bootstrap
from errata.evaluate.metrics import harmonic_mean
from errata.evaluate.rank_correlation import spearman

# The fewest choices of layers whose ranks are compared.
_LEAST_CHOICES = 4
# The fewest facts over which correlations within facts are averaged.
LEAST_FACTS = 3


class MeasuredSetting(Protocol):
    """A setting with the values of its facts, as `tune.Tried`."""

    @property
    def facts(self) -> Mapping[str, Values]: ...
    @property
    def results(self) -> Mapping[str, Any]: ...


def heading(config: TuneConfig, base: BenchConfig, model: Any) -> dict[str, Any]:
    """Return what the search was of, and what it was computed with."""
    editor = editor_config(base.editor, base.model, seed=base.seed)
    return {
        "schema_version": SCHEMA_VERSION,
        "names": {"editor": editor_name(base.editor), "model": config.model.name, "dataset": config.dataset.name},
        "bench": command(base, editor),
        "config": {name: value for name, value in asdict(config).items() if name not in ("out", "time_limit")},
        "versions": environment.versions(),
        "machine": environment.machine(model),
    }


def of_trace(traced: TracedLayers | None, config: TuneConfig) -> dict[str, Any] | None:
    """Return the mean effect of each layer with its interval over facts; None where nothing was traced."""
    if traced is None:
        return None
    columns = traced.table.T.tolist()
    found = [bootstrap(values, seed=config.seed, confidence=config.confidence) for values in columns]
    return {
        "corruption": traced.corruption,
        "counts": dict(traced.counts),
        "facts": list(traced.effects),
        "mean": [entry.mean for entry in found],
        "low": [entry.low for entry in found],
        "high": [entry.high for entry in found],
    }


def gain(found: MeasuredSetting, start: MeasuredSetting, config: TuneConfig) -> dict[str, Any]:
    """Return how much better some settings are than those of the beginning on the same facts, and what they cost."""
    mine, other = list(found.facts.values()), list(start.facts.values())
    return {
        "n": len(mine),
        "score": {"start": _score(other, config), "found": _score(mine, config)},
        "gain": gain_of(mine, other, seed=config.seed, confidence=config.confidence).as_dict(),
        "metrics": {"start": metric_means(other), "found": metric_means(mine)},
        "papers": {"start": start.results["papers"], "found": found.results["papers"]},
        "collapse": {"start": start.results["collapse"], "found": found.results["collapse"]},
        "cpu_seconds_per_edit": {
            name: one.results["speed"]["cpu_seconds_per_edit"] for name, one in (("start", start), ("found", found))
        },
    }


def _score(facts: Sequence[Values], config: TuneConfig) -> dict[str, Any]:
    return score_of(facts, seed=config.seed, confidence=config.confidence).as_dict()


def localisation(
    traced: TracedLayers | None, tried: Sequence[tuple[Sequence[int], MeasuredSetting]], config: TuneConfig
) -> dict[str, Any] | None:
    """Return how the effect of layers in the trace and the success of edits there go together; None without a trace.

    `correlations` has, for the score and each metric, Spearman's correlation over the choices of layers with its
    bootstrap interval over these choices, where there are enough. `within_facts` is the mean over facts that were both
    traced and edited of the correlation within one fact, with its interval over facts.

    The question is that of Hase et al. 2023, "Does Localization Inform Editing?". They correlate over facts at each
    layer, and this is over layers.
    """
    if traced is None or not tried:
        return None
    means = traced.means()
    effects = [window_effect(means, layers) for layers, _ in tried]
    facts = [list(one.facts.values()) for _, one in tried]
    scores = {"score": [_score(values, config) for values in facts]}
    metrics = [metric_means(values) for values in facts]
    columns: dict[str, list[float]] = {"score": [entry["mean"] for entry in scores["score"]]}
    columns |= {name: [entry[name] for entry in metrics] for name in metrics[0]}
    options: dict[str, Any] = {"seed": config.seed, "confidence": config.confidence}
    is_enough = len(tried) >= _LEAST_CHOICES
    return {
        "layers": [list(layers) for layers, _ in tried],
        "effect": effects,
        "score": scores["score"],
        "metrics": metrics,
        "correlations": {
            name: spearman(effects, values, **options).as_dict() for name, values in columns.items() if is_enough
        },
        "within_facts": _within_facts(traced, tried, options) if is_enough else None,
    }


def _within_facts(
    traced: TracedLayers, tried: Sequence[tuple[Sequence[int], MeasuredSetting]], options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the mean correlation within one fact; None where too few facts were both traced and edited."""
    found = []
    for name, effects in traced.effects.items():
        if not all(one.facts.get(name) for _, one in tried):
            continue
        by_layer = [window_effect(effects, layers) for layers, _ in tried]
        scores = [harmonic_mean(list(one.facts[name].values())) for _, one in tried]
        value = spearman(by_layer, scores, resamples=1).mean
        found += [] if math.isnan(value) else [value]
    return bootstrap(found, **options).as_dict() if len(found) >= LEAST_FACTS else None
