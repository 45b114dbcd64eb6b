"""From traces to layers: the effect of each layer's MLP at the last token of the subject, over some facts of a dataset.

    traced = traced_layers(model, tokenizer, facts, n_facts=12)
    traced.best_window(1)        # the layer whose MLP has the largest mean effect
    traced.best_window(5)        # five layers that follow each other, by the sum of their effects

ROME and MEMIT choose their layers in this way: where the MLPs at that token carry most of the fact (Meng et al. 2022,
"Locating and Editing Factual Associations in GPT", section 2; Meng et al. 2023, "Mass-Editing Memory in a Transformer",
section 4). Whether such layers are better to edit is another question, which `errata tune` measures.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from errata.benchmarks.runs.json_values import digest
from errata.editors.core.errors import ConfigError
from errata.editors.core.files.atomic import write_atomically
from errata.editors.core.files.plain_files import read_json
from errata.editors.core.files.tensor_cache import cache_folder
from errata.editors.core.locating.corruption import Noise
from errata.editors.core.locating.donors import TraceableFact
from errata.editors.core.locating.grids import Grid
from errata.editors.core.locating.many_facts import NO_DONOR, FactTraces, trace_facts
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.progress import Progress, silent

SWAP, NOISE = "swap", "s3"
_FORM = 1  # of the files in the cache


@dataclass(frozen=True)
class TracedLayers:
    """The effects of each layer's MLP at the last token of the subject.

    Attributes:
        corruption: "swap": another subject of the relation, and effects are shares of the logit difference; "s3":
            ROME's noise, and effects are changes of the answer's probability.
        effects: {fact: one effect per layer}, by denoising.
        counts: How many facts were traced, and how many left out by reason.
    """

    corruption: str
    effects: Mapping[str, Sequence[float]]
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def table(self) -> np.ndarray:
        """The effects, (facts, L)."""
        return np.array(list(self.effects.values()))

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return self.table.shape[1]

    def means(self) -> list[float]:
        """Return the mean effect of each layer over facts."""
        return self.table.mean(axis=0).tolist()

    def best_window(self, size: int) -> tuple[int, ...]:
        """Return the layers that follow each other with the largest sum of mean effects; the lowest of equal ones."""
        return max(windows(self.n_layers, size), key=lambda layers: (window_effect(self.means(), layers), -layers[0]))


def windows(n_layers: int, size: int) -> list[tuple[int, ...]]:
    """Return all runs of `size` layers that follow each other, from below."""
    return [tuple(range(first, first + size)) for first in range(n_layers - size + 1)]


def window_effect(effects: Sequence[float], layers: Sequence[int]) -> float:
    """Return the sum of the effects of some layers."""
    return float(sum(effects[layer] for layer in layers))


def traced_layers(
    model: Any,
    tokenizer: Tokenizer,
    facts: Sequence[TraceableFact],
    *,
    n_facts: int,
    named: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> TracedLayers:
    """Trace the first facts that the model knows, and return the effects of its MLPs at the subject's last token.

    Subjects are replaced by others of the same relation. Where no fact has such a donor, noise takes its place.

    Args:
        model: A decoder of transformers.
        tokenizer: Its tokenizer.
        facts: The facts; donors come from all of them.
        n_facts: How many are traced, at most.
        named: What names the model, such as its digest; with it, the result is kept in errata's cache, where a second
            call finds it.
        seed: Seed of the order of donors, and of the noise.
        progress: Is told how many facts are traced.

    Raises:
        ConfigError: no fact can be traced; the message counts the reasons.
        ArchitectureError: as `trace`.
    """
    path = None
    if named is not None:
        said = {"form": _FORM, "model": named, "n_facts": n_facts, "seed": seed}
        key = digest({**said, "facts": [dataclasses.astuple(fact) for fact in facts]})
        path = cache_folder(what="traces") / f"layers-{key[:32]}.json"
        if (kept := _read(path)) is not None:
            return kept
    found = _trace(model, tokenizer, facts, n_facts, seed, progress)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(dataclasses.asdict(found)) + "\n").encode())
    return found


def _read(path: Path) -> TracedLayers | None:
    """Return what the cache has; None where it has nothing, or something that was not written by this program."""
    try:
        found = TracedLayers(**read_json(path))
        return found if found.table.ndim == 2 else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _trace(
    model: Any, tokenizer: Tokenizer, facts: Sequence[TraceableFact], n_facts: int, seed: int, progress: Progress
) -> TracedLayers:
    options: dict[str, Any] = {
        "n_facts": n_facts,
        "grids": [Grid("mlp")],
        "tokens": "subject_last",
        "seed": seed,
        "progress": progress,
    }
    try:
        return _effects(trace_facts(model, tokenizer, facts, **options), SWAP)
    except ConfigError as error:
        if NO_DONOR not in str(error):
            raise
    return _effects(trace_facts(model, tokenizer, facts, Noise(NOISE, seed=seed + 1), **options), NOISE)


def _effects(found: FactTraces, corruption: str) -> TracedLayers:
    rows = {}
    for name, trace in zip(found.ids, found.traces, strict=True):
        if corruption == SWAP:
            effects = trace.effects("mlp", "logit_difference", normalised=True)
        else:
            effects = trace.effects("mlp", "probability")
        rows[name] = effects[0].tolist()  # there is one row, of the subject's last token
    return TracedLayers(corruption, rows, found.counts())
