"""The checkpoints of a sequence: what the model says to the edits so far, while it carries them, and at the end.

The end asks about every edit. A checkpoint asks about a sample of them, so that all checkpoints together cost a fixed
share of the end, however many edits there are. Every case has a number that the seed draws once; the sample of a
checkpoint are the edits so far with the lowest numbers. So most cases of one checkpoint are asked again at the next,
and what the untouched model says to their neighbours is computed once and kept.

Nothing here depends on where a run was killed: the untouched model is asked case by case, and samples are drawn by the
seed alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from errata.benchmarks.bench.baseline import TOGETHER, Baseline, token_budget
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.measurements import (
    NEIGHBORHOOD,
    held_out_texts,
    measured_ability,
    observed,
    retention,
    scores_with_next,
)
from errata.benchmarks.bench.sequence_log import EditOutcome, SequenceLog
from errata.benchmarks.runs.partial_results import PartialResults
from errata.editors.core import ranks
from errata.evaluate.collapse import HeldOutTexts, next_token_kl
from errata.evaluate.probes import Case

# A checkpoint asks about all edits of a sequence that is no longer than this.
ALL_OF = 100
# What all checkpoints together may cost as a share of the end, and how many edits each asks about at least.
SHARE, LEAST = 0.3, 20
# Bytes of distributions that are kept of the untouched model: 2^30 are 5,000 prompts and 50,000 tokens in float32.
_KEPT_BYTES = 2**30


def sample_size(wanted: int | None, edits: int, every: int | None) -> int:
    """Return how many edits a checkpoint asks about, at most.

    Args:
        wanted: `eval_sample` of the configuration.
        edits: Edits of the sequence.
        every: Edits between checkpoints.
    """
    if wanted is not None or every is None or edits <= ALL_OF:
        return edits if wanted is None else wanted
    checkpoints = max(1, math.ceil(edits / every) - 1)  # the last one is the end
    return max(LEAST, int(SHARE * edits / checkpoints))


def sampled(count: int, size: int, edits: int, seed: int) -> list[int]:
    """Return the indices of `size` of the first `count` of all edits, ascending; all of them if there are no more."""
    if count <= size:
        return list(range(count))
    numbers = random.Random(f"checkpoints {seed}").sample(range(edits), edits)
    return sorted(sorted(range(count), key=lambda i: numbers[i])[:size])


class Checkpoints:
    """What a sequence is asked at its checkpoints and at its end.

    Args:
        bench: The sequence.
        before: What the untouched model says.
        log: Where parts of an evaluation are written down.
    """

    def __init__(self, bench: Bench, before: Baseline, log: SequenceLog) -> None:
        self._bench, self._before, self._log = bench, before, log
        self._untouched: dict[str, list[Tensor]] = {}
        self._texts: dict[bool, HeldOutTexts | None] = {}

    def evaluated(
        self, made: Sequence[EditOutcome], *, is_end: bool
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Return a record for each edit that is asked about, as the model stands, and its scores in lm-eval's tasks.

        Args:
            made: What became of the edits so far.
            is_end: Whether all of them are asked about, and free texts are written.
        """
        bench, count = self._bench, len(made)
        parts = self._log.parts(count, bench.stop)
        shared = parts.kept(partial(self._shared, is_end=is_end))
        size = count if is_end else sample_size(bench.config.eval_sample, len(bench.cases), bench.config.eval_every)
        places = sampled(count, size, len(bench.cases), bench.config.seed)
        records = self._recorded(parts, places, made, shared, is_end=is_end)
        able = parts.kept(partial(measured_ability, bench))
        self._log.seconds({"checkpoint": count, "evaluation": parts.seconds})
        return records, able

    def at_strength(
        self, made: Sequence[EditOutcome], strength: float, measured: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Return a record for each edit as the model stands, which carries all of them at a strength.

        Args:
            made: What became of the edits.
            strength: It.
            measured: Perplexities, which are known already.
        """
        # All digits: two strengths that look alike must not share their parts.
        parts = self._log.parts(f"{len(made)} at {strength!r}", self._bench.stop)
        shared = {**measured, "retention": parts.kept(partial(retention, self._bench))}
        records = self._recorded(parts, range(len(made)), made, shared, is_end=False)
        self._log.seconds({"checkpoint": f"{len(made)} at {strength:g}", "evaluation": parts.seconds})
        return records

    def as_it_stands(self, made: Sequence[EditOutcome], label: str) -> list[dict[str, Any]]:
        """Return a record for each edit as the model stands, without free texts.

        Args:
            made: What became of the edits.
            label: Names the evaluation.
        """
        parts = self._log.parts(label, self._bench.stop)
        shared = parts.kept(partial(self._shared, is_end=True))
        records = self._recorded(parts, range(len(made)), made, shared, is_end=False)
        self._log.seconds({"checkpoint": label, "evaluation": parts.seconds})
        return records

    def _recorded(
        self,
        parts: PartialResults,
        places: Sequence[int],
        made: Sequence[EditOutcome],
        shared: Mapping[str, Any],
        *,
        is_end: bool,
    ) -> list[dict[str, Any]]:
        """Return a record for each place, as the model stands."""
        bench, records = self._bench, []
        for start in range(0, len(places), TOGETHER):
            chosen = places[start : start + TOGETHER]
            cases = [bench.cases[place] for place in chosen]
            said = parts.kept(partial(ranks.share_out, cases, partial(self._asked, is_end=is_end)))
            for place, (answers, drift) in zip(chosen, said, strict=True):
                record = _record(place, bench.cases[place], made[place], self._before, answers)
                records.append({**record, "neighborhood_kl": drift, **shared})
        return records

    def _shared(self, *, is_end: bool) -> dict[str, Any]:
        """What is measured of the model and not of an edit."""
        part = self._before.part
        is_whole = is_end or part is None
        if is_whole not in self._texts:
            budget = None if is_end else token_budget(self._bench, self._before)
            self._texts[is_whole] = held_out_texts(self._bench, budget)
        texts = self._texts[is_whole]
        return {
            "perplexity": None if texts is None else texts.perplexity().value,
            "perplexity_before": self._before.perplexity if is_whole or part is None else part["perplexity"],
            "retention": retention(self._bench),
        }

    def _asked(self, cases: Sequence[Case], *, is_end: bool) -> list[tuple[list[dict[str, Any]], float | None]]:
        """What the model says to each case's probes as it stands, and how far predictions for neighbours have moved."""
        bench = self._bench
        probes = [probe for case in cases for probe in case.probes]
        scores = scores_with_next(bench, probes)
        answers = iter(observed(bench, probes, scores, with_texts=is_end))
        then = self._all_untouched(cases) if is_end else [one for case in cases for one in self._kept(case)]
        now = [scored.logprobs for scored in scores if scored.logprobs is not None]
        moved = iter([next_token_kl(a, b) for a, b in zip(now, then, strict=True)])
        found = []
        for case in cases:
            drifts = [next(moved) for probe in case.probes if probe.kind in NEIGHBORHOOD]
            drift = math.fsum(drifts) / len(drifts) if drifts else None
            found.append(([next(answers) for _ in case.probes], drift))
        return found

    def _all_untouched(self, cases: Sequence[Case]) -> list[Tensor]:
        """Return the untouched model's distributions behind the prompts of all neighbours."""
        probes = [probe for case in cases for probe in case.probes if probe.kind in NEIGHBORHOOD]
        with self._bench.editor.ledger.untouched():
            scores = scores_with_next(self._bench, probes)
        return [scored.logprobs for scored in scores if scored.logprobs is not None]

    def _kept(self, case: Case) -> list[Tensor]:
        """Return the untouched model's distributions of one case, which are computed once if there is room for them."""
        if case.id not in self._untouched:
            found = self._all_untouched([case])
            held = sum(one.nbytes for kept in (*self._untouched.values(), found) for one in kept)
            if held > _KEPT_BYTES:
                return found
            self._untouched[case.id] = found
        return self._untouched[case.id]


def _record(
    place: int, case: Case, made: EditOutcome, before: Baseline, answers: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "place": place,
        "sequence": True,
        "case": case.id,
        **case.asked(),
        "status": made.status,
        "reason": made.reason,
        "warnings": list(made.warnings),
        "diagnostics": dict(made.report),
        "guard": made.guard,
        "perplexity_before": before.perplexity,
        "probes": [
            {**probe.as_dict(), "before": was, "after": now}
            for probe, was, now in zip(case.probes, before.observed[case.id], answers, strict=True)
        ],
    }
