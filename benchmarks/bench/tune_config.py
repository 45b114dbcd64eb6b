"""The configuration of `errata tune`. The defaults are stated here alone: hparams/tune.yaml takes them from these
classes, and `errata tune --help` shows the text below each field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from errata.benchmarks.bench.config import (
    CollapseConfig,
    Composed,
    DatasetConfig,
    GenerationConfig,
    ModelConfig,
    ScoringConfig,
    editor_name,
)
from errata.editors.core.config import check_least
from errata.editors.core.errors import ConfigError


@dataclass(frozen=True)
class TuneConfig(Composed):
    """The configuration of `errata tune`."""

    editor: Mapping[str, Any]
    """The method's name and its fields; the search begins with these."""
    model: ModelConfig
    dataset: DatasetConfig
    n_edits: int = 8
    """Development facts: every setting edits each of them by itself."""
    n_unseen: int = 24
    """Facts behind them, of other subjects, on which the settings found and those of the beginning are compared; 0:
    they are not compared."""
    n_traced: int = 12
    """Facts that are traced, of those that the model knows; 0: none, and the search begins around the rule by depth."""
    layers: tuple[int, ...] | Literal["all"] = ()
    """Layers to try, of methods with several the lowest; all: every one; none given: the best by the trace, its
    neighbours, and those of the method's rule."""
    neighbors: int = 2
    """Layers on each side of the best by the trace."""
    fields: tuple[str, ...] = ()
    """Fields to search, one after another; none given: those of layers, v_lr, lr, clamp_norm_factor and
    mom2_update_weight that the method has."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Values to try by field, as values.v_lr=[0.1,0.5]; of fields that are not named, a smaller and a larger one."""
    batch_size: int = 16
    """Edits computed together: only speed and memory."""
    seed: int = 0
    """Draws the order of the cases where the dataset is shuffled, donors, noise, and the bootstrap."""
    precision: str | None = None
    """float32, bfloat16, float64; null: as the weights are saved (float16 is loaded as float32)."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; null: a GPU where there is one."""
    out: str = "tuned"
    """The folder that gets errata.json, tune.json, tune.png and the runs of the search."""
    time_limit: float | None = None
    """Minutes after which the command ends cleanly behind an edit; the same command then goes on."""
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(tokens=0, fluency_tokens=0))
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    collapse: CollapseConfig = field(default_factory=lambda: CollapseConfig(n_texts=16, tokens=512, known_facts=0))
    confidence: float = 0.95
    """Confidence of the intervals."""

    def __post_init__(self) -> None:
        editor_name(self.editor)
        least = {"n_edits": 2, "n_unseen": 0, "n_traced": 0, "neighbors": 0, "batch_size": 1, "seed": 0}
        check_least(self, {**least, "time_limit": 0, "generation.tokens": 0, "scoring.batch_tokens": 1})
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence: expected a share between 0 and 1, got {self.confidence}")
        if self.n_unseen == 1:
            raise ConfigError("n_unseen: expected 0, or at least 2 facts to compare on, got 1")
        if self.dataset.known is not None:
            raise ConfigError("dataset.known is for errata bench; errata tune takes the cases that dataset.ids names")
