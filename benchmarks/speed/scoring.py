"""How fast probes are scored and continued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from errata.benchmarks.speed.scoring_reference import by_record, nlls
from errata.benchmarks.speed.stage import Stage
from errata.benchmarks.speed.timing import TimedPair, timed
from errata.benchmarks.speed.whole_runs import chosen_cases
from errata.evaluate.generation import continuations
from errata.evaluate.probes import Case, Probe
from errata.evaluate.scoring import ProbeScore, score

NEW_TOKENS = 20
PROMPTS = 100


def compare(stage: Stage) -> list[TimedPair]:
    """Probabilities of all probes of some records, and greedy continuations of some of their prompts."""
    cases = chosen_cases(stage)
    return measure(stage.model, stage.tokenizer, cases, targets=(stage.target(3.0, 10.0), stage.target(3.0, 30.0)))


def measure(
    model: Any,
    tokenizer: Any,
    cases: Sequence[Case],
    *,
    new_tokens: int = NEW_TOKENS,
    targets: tuple[float | None, float | None] = (None, None),
) -> list[TimedPair]:
    """Scoring against the originals' batches, and generation against one prompt at a time.

    The agreement of scoring is the largest difference of a negative log-probability, relative to the largest of them;
    that of generation the share of continuations that differ. `settings` has the time of one answer at a time, too, and
    the agreement of the two plain ways as `floor`.
    """
    probes = [probe for case in cases for probe in case.probes if probe.target is not None]
    score(model, tokenizer, probes[:8])  # the first products of a process pay for threads and page faults
    found, fast = timed(lambda: score(model, tokenizer, probes))
    grouped, plain = timed(lambda: by_record(model, tokenizer, cases))
    single, singly = timed(lambda: nlls(model, tokenizer, [[probe] for probe in probes]))
    settings = {
        "probes": len(probes),
        "records": len(cases),
        "one_by_one_seconds": singly.seconds,
        "one_by_one_cpu_seconds": singly.cpu_seconds,
        "floor": distance(grouped, single),
    }
    agreement = distance(values(found), grouped)
    scoring = TimedPair("scoring", "probabilities", fast, plain, agreement, targets[0], settings)
    return [scoring, _generation(model, tokenizer, probes, new_tokens, targets[1])]


def values(scores: Sequence[ProbeScore]) -> list[float]:
    """Every negative log-probability there is, target before other."""
    return [nll for one in scores for nll in (one.nll_target, one.nll_other) if nll is not None]


def distance(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / max(map(abs, theirs))


def _generation(
    model: Any, tokenizer: Any, probes: Sequence[Probe], new_tokens: int, target: float | None
) -> TimedPair:
    prompts = [probe.prompt for probe in probes[:PROMPTS]]
    ours, fast = timed(lambda: continuations(model, tokenizer, prompts, new_tokens))
    plain, slow = timed(lambda: [continuations(model, tokenizer, [prompt], new_tokens)[0] for prompt in prompts])
    different = sum(a != b for a, b in zip(ours, plain, strict=True)) / len(prompts)
    settings = {"prompts": len(prompts), "new_tokens": new_tokens}
    return TimedPair("scoring", "generation", fast, slow, different, target, settings)
