"""What a protocol works with: the configuration of a run and its live objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from errata.benchmarks.ability import AbilityConfig
from errata.benchmarks.bench.config import GuardConfig
from errata.benchmarks.bench.sequence_log import SequenceLog
from errata.benchmarks.runs.stopping import Stop
from errata.editors.core.editor import Editor
from errata.editors.core.progress import Progress, silent
from errata.evaluate.probes import Case, Probe

Write = Callable[[dict[str, Any], dict[str, float]], None]


@dataclass(frozen=True)
class Bench:
    """What a protocol works with.

    Attributes:
        editor: The method, on its model.
        cases: In the order of the edits.
        texts: Held-out texts for perplexity; none: leave it out.
        known: Facts that the untouched model knows; those of other subjects are asked again after every edit.
        batch_size: Edits computed together.
        batch_tokens: Tokens of a scoring pass.
        generation_tokens: Longest free answer; 0: leave free generation out.
        fluency_tokens: Length of the text behind an open prompt; 0: leave fluency out.
        perplexity_each: Whether perplexity is measured after every edit.
        eval_every: Edits between checkpoints of a sequence; None: only at its end.
        confidence: Of the intervals at checkpoints.
        seed: Of their bootstrap.
        ability: What lm-eval is to ask of the untouched model and at checkpoints; None: nothing.
        guard: The limits within which edits have to keep the model; None: there are none.
        track: Told of every checkpoint of a sequence.
        diary: Where a sequence writes down what it has done.
        stop: Asked between edits whether to go on.
        progress: Told of every edit that is done.
    """

    editor: Editor
    cases: Sequence[Case]
    texts: Sequence[str] = ()
    known: Sequence[Probe] = ()
    batch_size: int = 16
    batch_tokens: int = 8192
    generation_tokens: int = 0
    fluency_tokens: int = 0
    perplexity_each: bool = True
    eval_every: int | None = None
    confidence: float = 0.95
    seed: int = 0
    ability: AbilityConfig | None = None
    guard: GuardConfig | None = None
    track: Callable[[int, Mapping[str, Any]], object] = lambda *_: None
    diary: SequenceLog | None = None
    stop: Stop = field(default_factory=Stop)
    progress: Progress = silent

    @property
    def model(self) -> Any:
        return self.editor.model

    @property
    def tokenizer(self) -> Any:
        return self.editor.tokenizer
