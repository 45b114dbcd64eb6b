"""How fast second moments are collected."""

from __future__ import annotations

import tempfile

import torch

from errata.benchmarks.speed import synthetic
from errata.benchmarks.speed.stage import Stage
from errata.benchmarks.speed.statistics_reference import reference_moments
from errata.benchmarks.speed.timing import TimedPair, difference, timed
from errata.editors.core.moments.second_moments import Moments, second_moments

MAX_LENGTH = 256


def compare(stage: Stage) -> list[TimedPair]:
    """All edited layers over one corpus, ours with hashing and writing the cache, against the originals' batches."""
    texts = synthetic.texts(stage.words, stage.config.texts, stage.config.seed)
    modules = {layer: stage.architecture.down(layer) for layer in stage.layers}

    def ours(some: list[str]) -> Moments:
        with tempfile.TemporaryDirectory() as folder:
            return second_moments(
                stage.model, stage.tokenizer, stage.layers, some, max_length=MAX_LENGTH, cache_dir=folder
            )

    def plain(some: list[str]) -> dict[int, torch.Tensor]:
        return reference_moments(
            stage.model, stage.tokenizer, modules, some, max_length=MAX_LENGTH, dtype=torch.float32, grouped=True
        )

    plain(texts[:2])  # the first products of a process pay for threads and page faults
    found, fast = timed(lambda: ours(texts))
    theirs, slow = timed(lambda: plain(texts))
    agreement = max(difference(found.matrices[layer], C.cpu()) for layer, C in theirs.items())
    settings = {"layers": list(stage.layers), "texts": len(texts), "tokens": found.tokens, "max_length": MAX_LENGTH}
    target = stage.target(1.8, 20.0 if stage.config.precision == "bf16" else 3.0)
    return [TimedPair("statistics", "second moments", fast, slow, agreement, target, settings)]
