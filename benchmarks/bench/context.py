"""What a protocol works with: the configuration of a run and its live objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from errata.benchmarks.bench.config import BenchConfig, GuardConfig
from errata.benchmarks.bench.sequence_log import SequenceLog
from errata.benchmarks.runs.phase_memory import PhaseMemory
from errata.benchmarks.runs.stopping import Stop
from errata.editors.core.editor import Editor
from errata.editors.core.progress import Progress, silent
from errata.evaluate.canonical_sets import CanonicalSet
from errata.evaluate.probes import Case, Probe

Write = Callable[[dict[str, Any], dict[str, float]], None]
"""Takes a finished record and its seconds."""


@dataclass(frozen=True)
class Bench:
    """What a protocol works with.

    Attributes:
        config: The configuration of the run: batch sizes, lengths of answers, limits, seeds.
        editor: The method, on its model.
        cases: In the order of the edits.
        texts: Held-out texts for perplexity; empty: perplexity is left out.
        canonical: What a set of canonical examples asks as a whole; None of other datasets.
        known: Facts that the untouched model knows; those of other subjects are asked again after every edit.
        track: Called with every checkpoint of a sequence.
        log: Where a sequence records what it has done; None for single edits.
        stop: Asked between edits whether to go on.
        progress: Called after every edit.
        memory: The most memory that each phase has in use.
    """

    config: BenchConfig
    editor: Editor
    cases: Sequence[Case]
    texts: Sequence[str] = ()
    canonical: CanonicalSet | None = None
    known: Sequence[Probe] = ()
    track: Callable[[int, Mapping[str, Any]], object] = lambda *_: None
    log: SequenceLog | None = None
    stop: Stop = field(default_factory=Stop)
    progress: Progress = silent
    memory: PhaseMemory = field(default_factory=PhaseMemory)

    @property
    def model(self) -> Any:
        """The model that is edited."""
        return self.editor.model

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.editor.tokenizer

    @property
    def batch_tokens(self) -> int:
        """Tokens of one forward pass, padding included."""
        return self.config.scoring.batch_tokens

    @property
    def guard(self) -> GuardConfig | None:
        """The limits within which edits have to keep the model; None without a guard."""
        return None if self.config.guard.name == "none" else self.config.guard
