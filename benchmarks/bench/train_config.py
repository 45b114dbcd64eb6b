"""The configuration of `errata train`. The defaults are stated here alone: hparams/train.yaml takes them from these
classes, and `errata train --help` shows the text below each field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from errata.benchmarks.bench.config import Composed, DatasetConfig, ModelConfig
from errata.editors.core.config import check_least
from errata.editors.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to train."""

    steps: int = 1200
    """Steps at most."""
    eval_every: int = 200
    """Steps between evaluations on the held-out cases."""
    patience: int | None = 5
    """Evaluations without a better one after which training stops; null: never."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    decay: float = 0.75
    """Share of the steps, at their end, over which learning rates fall to zero, linearly."""
    edits_at_once: int | None = None
    """Edits of a step whose passes are in memory together; null: all."""

    def __post_init__(self) -> None:
        names = ("steps", "eval_every", "patience", "checkpoint_every", "edits_at_once")
        check_least(self, dict.fromkeys(names, 1))
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay: expected a share from 0 to 1, got {self.decay}")

    def rate(self, step: int) -> float:
        """Return the factor of the learning rates at step `step`, counted from 0."""
        falling = self.decay * self.steps
        return min(1.0, (self.steps - step) / falling) if falling else 1.0


@dataclass(frozen=True)
class RowsConfig:
    """How many rows of each kind the loss of one edit reads, besides its own prompt."""

    paraphrases: int = 1
    """The same fact in other words: the answer is the new one, too."""
    neighbors: int = 2
    """Prompts of the case about other subjects, which keep their answers."""
    distracting: int = 1
    """The same prompts behind a sentence that states the edit."""
    attributes: int = 1
    """Prompts of the case about subjects for which the new answer is true, which keep it."""
    alike: int = 4
    """Prompts in the words of the edit about subjects of other cases and their neighbours, which keep their answers."""
    others: int = 1
    """Prompts of other cases, which keep their answers."""
    texts: int = 0
    """Pieces of running text, on which no prediction may change."""
    text_tokens: int = 32
    """Tokens of such a piece; each counts as much as a token of an answer."""
    reworded: float = 0.0
    """Share of the edits that are made in other words than the case has (benchmarks/training/augmentation.py)."""
    retargeted: float = 1.0
    """Share of the edits that are made to another answer than the case has."""
    renamed: float = 0.8
    """Share of the edits that are made about a subject with a made-up name."""

    def __post_init__(self) -> None:
        names = ("paraphrases", "neighbors", "distracting", "attributes", "alike", "others", "texts")
        check_least(self, dict.fromkeys(names, 0) | {"text_tokens": 2}, "rows.")
        for name in ("reworded", "retargeted", "renamed"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"rows.{name}: expected a share from 0 to 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Composed, Schedule):
    """The configuration of `errata train`."""

    editor: Mapping[str, Any]
    """The method's name and its fields."""
    model: ModelConfig
    dataset: DatasetConfig
    n_cases: int | None = None
    """Cases to train on, at most; null: all."""
    held_out: int = 64
    """About this number of them, of subjects of their own, decide when to stop."""
    rows: RowsConfig = field(default_factory=RowsConfig)
    text: str | None = None
    """Running text for `rows.texts`: a file, or name:config:split of the hub; null: the model folder's own."""
    n_texts: int = 2000
    """How many texts of it are read, at most."""
    seed: int = 0
    """Draws the first network, what is held out, the order of the cases and their rows."""
    precision: str | None = None
    """float32, bfloat16, float64; null: as the weights are saved."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; null: a GPU where there is one."""
    out: str = "trained"
    """The folder in which the training's folder is made."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, {"n_cases": 2, "held_out": 1, "n_texts": 1, "seed": 0})
        if self.dataset.known is not None:
            raise ConfigError("dataset.known is for errata bench; training takes the cases that n_cases and ids name")
        if self.dataset.probes is not None:
            raise ConfigError("dataset.probes is for errata bench; training draws from all probes of a case")
