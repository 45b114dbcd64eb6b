"""What the untouched model says to every probe, asked once before the first edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.edit_protocol import is_sequence
from errata.benchmarks.bench.measurements import held_out_texts, measured_ability, observed
from errata.editors.core import ranks
from errata.evaluate.probes import Case
from errata.evaluate.scoring import score

Part = Callable[[Callable[[], Any]], Any]
# Cases that are scored together, and written down as one part. Of a sequence a distribution over the vocabulary is held
# for each of their neighbours.
TOGETHER = 256
BEFORE = "before.json"


@dataclass(frozen=True)
class Baseline:
    """What the untouched model says.

    Attributes:
        observed: {case id: one observation per probe}.
        perplexity: Of the run's texts, as far as its last measurement reads them; None without texts.
        ability: {task of lm-eval: its score as plain values}; None where no task is asked.
        guard: Perplexity of the guard's texts; None without a guard.
        perplexity_tokens: How many tokens of the texts that predicts; None without texts, and in runs of older
            versions, whose every measurement reads all of them.
        part: {"perplexity", "tokens"} of the texts as far as the checkpoints of a sequence read them; None where they
            read as much as its end.
    """

    observed: Mapping[str, list[dict[str, Any]]]
    perplexity: float | None
    ability: Mapping[str, Mapping[str, Any]] | None = None
    guard: float | None = None
    perplexity_tokens: int | None = None
    part: Mapping[str, Any] | None = None


def baseline(bench: Bench, part: Part = lambda make: make()) -> Baseline:
    """Return what the untouched model says to every probe.

    Args:
        bench: On the untouched model.
        part: Called with what makes each part of it; may have it from an earlier start.
    """
    by_case: dict[str, list[dict[str, Any]]] = {}
    for start in range(0, len(bench.cases), TOGETHER):
        by_case |= part(partial(_by_case, bench, bench.cases[start : start + TOGETHER]))
    read = part(partial(_perplexity, bench))
    return Baseline(
        by_case, read["perplexity"], part(partial(measured_ability, bench)), None, read["tokens"], read["part"]
    )


def token_budget(bench: Bench, before: Baseline) -> int | None:
    """Return how many tokens a perplexity reads that is asked often; None: all."""
    return None if before.perplexity_tokens is None else bench.config.collapse.tokens


def _perplexity(bench: Bench) -> dict[str, Any]:
    """Return the untouched model's perplexity of the texts: as far as single edits read them, or, for a sequence, of
    all, and as far as its checkpoints read them."""
    budget = bench.config.collapse.tokens
    texts = held_out_texts(bench, budget)
    if texts is None:
        return {"perplexity": None, "tokens": None, "part": None}
    found = texts.perplexity()
    part = {"perplexity": found.value, "tokens": found.tokens}
    whole = held_out_texts(bench, None) if is_sequence(bench.config.protocol.name) else None
    if whole is None or whole.tokens == texts.tokens:
        return {**part, "part": None}
    return {"perplexity": whole.perplexity().value, "tokens": whole.tokens, "part": part}


def _by_case(bench: Bench, cases: Sequence[Case]) -> dict[str, list[dict[str, Any]]]:
    """What the model says to each case's probes as it stands."""
    said = ranks.share_out(cases, partial(_asked, bench))
    return {case.id: answers for case, answers in zip(cases, said, strict=True)}


def _asked(bench: Bench, cases: Sequence[Case]) -> list[list[dict[str, Any]]]:
    """What the model says, case by case; a prompt that many cases share is run once."""
    probes = [probe for case in cases for probe in case.probes]
    scores = score(bench.model, bench.tokenizer, probes, batch_tokens=bench.batch_tokens)
    answers = iter(observed(bench, probes, scores))
    return [[next(answers) for _ in case.probes] for case in cases]
