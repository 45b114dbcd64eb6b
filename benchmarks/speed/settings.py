"""What is measured and how, from `name=value` words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from errata.benchmarks.speed.shapes import SHAPES
from errata.editors.core.config import build, check_least, did_you_mean
from errata.editors.core.errors import ConfigError

Phase = Literal[
    "targets",
    "keys",
    "solves",
    "statistics",
    "scoring",
    "end_to_end",
    "whole_runs",
    "edits",
    "grace",
    "tracing",
    "growth",
]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Everything that a measurement depends on, beside the machine."""

    phases: tuple[Phase, ...] = PHASES
    """What to measure, separated by commas."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where models and solves lie. A ratio is one of CPU seconds on cpu, of the clock's on cuda."""

    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Of the models, on both paths. tf32: float32 weights whose products a GPU may round."""

    shape: str = "gpt2"
    """The model, with random weights."""

    model: str | None = None
    """A real model in its place: a folder, as `errata bench` takes it."""

    tokenizer: str | None = None
    """A folder with a real tokenizer, for a model with random weights; without it, one of made-up words."""

    data: str | None = None
    """A file of CounterFact for the phases scoring, whole_runs, edits and tracing; without it, records are made up."""

    text: str | None = None
    """A file of texts for perplexity and second moments, in the phases whole_runs and edits; without it, they are made
    up."""

    requests: int = 32
    """Requests of the phases targets, keys and grace."""

    steps: int = 20
    """Iterations of the search for values, MEMIT's and GRACE's; none stops early."""

    batch: int = 100
    """Requests of a batch in the phases solves, end_to_end and growth."""

    earlier: int = 2000
    """Edits that AlphaEdit has made before the batch that is timed in the phase solves."""

    records: int = 40
    """Records of the phases scoring, whole_runs and edits, of 13 prompts with two answers each."""

    plain_records: int = 1000
    """Records that the phases whole_runs and edits edit the plain way, at most. That takes each record for itself, so
    that its seconds are scaled to all records, but not those that a batch spends once: perplexity and solves."""

    protocols: tuple[Literal["single", "batch"], ...] = ("single", "batch")
    """What the phase whole_runs runs: `single` with ROME, `batch` with MEMIT."""

    perplexity_texts: int = 64
    """Texts whose perplexity the phase whole_runs measures, on both paths."""

    texts: int = 128
    """Texts of the phase statistics."""

    keys: int = 100_000
    """Keys of the larger codebook of the phase grace."""

    traced: int = 1
    """Prompts of the phase tracing."""

    plain_cells: int = 0
    """Cells of each heat map that the plain way of the phase tracing runs, spread over it; 0: all. A plain cell always
    costs the same, so that its seconds are scaled to all."""

    grids: tuple[str, ...] = ("state", "mlp", "attention")
    """What the phase tracing traces, the first of them also alone; windows of 10 layers for mlp and attention."""

    growth_shape: str = "gpt2"
    """Sizes of the phase growth, whatever the shape of the others: one layer of it."""

    growth_to: int = 2000
    """Edits up to which the phase growth goes."""

    threads: int = 1
    """Threads of the CPU, for both paths."""

    seed: int = 0
    """Of weights, requests and texts."""

    out: str = "speed"
    """Folder for speed.json, speed.md and speed.png."""

    def __post_init__(self) -> None:
        counts = (
            "requests",
            "steps",
            "batch",
            "earlier",
            "records",
            "plain_records",
            "perplexity_texts",
            "texts",
            "keys",
            "traced",
            "growth_to",
            "threads",
        )
        check_least(self, dict.fromkeys(counts, 1))
        check_least(self, {"plain_cells": 0})
        for name in ("shape", "growth_shape"):
            if (shape := getattr(self, name)) not in SHAPES:
                raise ConfigError(f"{name}: unknown shape {shape!r}{did_you_mean(shape, SHAPES)}")
        if not self.phases:
            raise ConfigError(f"phases: expected some of {', '.join(PHASES)}")
        if not self.protocols:
            raise ConfigError("protocols: expected single, batch or both")
        if self.precision == "tf32" and self.device == "cpu":
            raise ConfigError("precision: tf32 is a precision of GPUs; give device=cuda, or precision=fp32")

    @classmethod
    def parsed(cls, arguments: Sequence[str]) -> SpeedConfig:
        """From words as typed.

        Raises:
            ConfigError: a word without `=`, a name given twice, an unknown name (with the nearest known one), a value
                of another type or out of range.
        """
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        for argument in arguments:
            name, equals, text = argument.partition("=")
            if not equals:
                raise ConfigError(f"expected name=value, got {argument!r}")
            if name in values:
                raise ConfigError(f"{name} is given twice")
            values[name] = _value(hints.get(name), text)
        return build(cls, values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _value(hint: Any, text: str) -> Any:
    if hint is int:
        try:
            return int(text)
        except ValueError:
            return text  # which `build` refuses by name
    return [word for word in text.split(",") if word] if get_origin(hint) is tuple else text
