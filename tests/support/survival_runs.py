"""A small run of `errata survive` on the bundled model, that several tests compare with."""

from __future__ import annotations

from typing import Any

from errata.benchmarks.bench.config import BenchConfig

COMPRESS = {"name": "magnitude", "sparsity": 0.5}
WORDS = (
    *("edit.num_steps=12", "edit.lr=0.005", "compress=magnitude", "compress.sparsity=0.5", "device=cpu"),
    *("dataset=world_counterfact", "dataset.probes=1", "n_edits=2", "collapse.n_texts=2"),
)


def config_of_survival(**said: Any) -> BenchConfig:
    """Return two edits by a few steps of FT-M, as the words of the command say it."""
    return BenchConfig.of(
        {
            "editor": {"name": "ft_m", "num_steps": 12, "lr": 5e-3},
            "model": {"name": "world"},
            "dataset": {"name": "world_counterfact", "probes": 1},
            "protocol": {"name": "batch"},
            "device": "cpu",
            "n_edits": 2,
            "collapse": {"n_texts": 2},
            **said,
        }
    )
