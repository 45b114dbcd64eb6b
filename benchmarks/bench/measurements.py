"""How a model is asked as it stands: scores, free texts, perplexity, retention, and lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from errata.benchmarks.ability import ability
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.bench.free_texts import new_tokens, written_as_it_stands, written_edited
from errata.benchmarks.datasets.json_records import Dropped
from errata.editors.core.forward.row_patches import RowPatches
from errata.evaluate import scoring_plan
from errata.evaluate.collapse import HeldOutTexts, perplexity
from errata.evaluate.probes import Case, Probe
from errata.evaluate.scoring import ProbeScore, score

NEIGHBORHOOD = ("neighborhood",)
ESSENCE_TOKENS = 100  # of a text about the subject, as in ROME's essence


def fitting(bench: Bench) -> tuple[Bench, list[Dropped]]:
    """The bench with the cases that can be asked on its model, and the others: of those a probe has no tokens, or more
    than the model has positions for."""
    bench = replace(bench, cases=[_short_essence(bench, case) for case in bench.cases])
    probes = [probe for case in bench.cases for probe in case.probes]
    new = [new_tokens(bench, probe) for probe in probes]
    reasons = iter(scoring_plan.unscorable_reasons(bench.model, bench.tokenizer, probes, new))
    kept, dropped = [], []
    for case in bench.cases:
        found = [reason for reason in (next(reasons) for _ in case.probes) if reason is not None]
        if found:
            dropped.append(Dropped(case.id, "probes", found[0]))
        else:
            kept.append(case)
    return replace(bench, cases=kept), dropped


def _short_essence(bench: Bench, case: Case) -> Case:
    """Return the case with its texts about the subject cut to ESSENCE_TOKENS."""
    return replace(case, probes=tuple(_cut(bench, p) if p.kind == "essence" else p for p in case.probes))


def _cut(bench: Bench, probe: Probe) -> Probe:
    text = f"{probe.prompt} {probe.target}"
    offsets = bench.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    end = offsets[min(ESSENCE_TOKENS, len(offsets)) - 1][1]
    kept = text[len(probe.prompt) + 1 : end].rstrip()
    return replace(probe, target=kept) if kept else probe


def scores_with_next(bench: Bench, probes: Sequence[Probe]) -> list[ProbeScore]:
    """Return scores, with the distribution of the next token after the neighbours' prompts."""
    return score(bench.model, bench.tokenizer, probes, batch_tokens=bench.batch_tokens, next_token=NEIGHBORHOOD)


def held_out_texts(bench: Bench, max_tokens: int | None) -> HeldOutTexts | None:
    """Return the run's texts for perplexity, as far as `max_tokens` predicted tokens; None where there are none."""
    if not bench.texts:
        return None
    return HeldOutTexts(
        bench.model, bench.tokenizer, bench.texts, max_tokens=max_tokens, batch_tokens=bench.batch_tokens
    )


def measured_perplexity(bench: Bench, n_texts: int | None = None) -> float | None:
    """Return the perplexity of the first `n_texts` texts (None: all); None where there are no texts."""
    if not bench.texts:
        return None
    return perplexity(bench.model, bench.tokenizer, bench.texts[:n_texts], batch_tokens=bench.batch_tokens).value


def measured_ability(bench: Bench) -> dict[str, dict[str, Any]] | None:
    """Return {task of lm-eval: its score as plain values} of the model as it stands; None where no task is asked."""
    if not bench.config.ability.tasks:
        return None
    return ability.plain(ability.measure(bench.model, bench.tokenizer, bench.config.ability))


def retention(bench: Bench, *, without: Collection[str] = ()) -> float | None:
    """Return the share of known facts whose every token is the likeliest.

    Args:
        bench: With the known facts.
        without: Subjects; facts that mention one are left out.
    """
    scores = score(
        bench.model, bench.tokenizer, known_of_others(bench, without=without), batch_tokens=bench.batch_tokens
    )
    return share_kept(scores)


def known_of_others(bench: Bench, *, without: Collection[str]) -> list[Probe]:
    """Return the known facts whose prompt mentions none of these subjects."""
    return [probe for probe in bench.known if not any(subject in probe.prompt for subject in without)]


def share_kept(scores: Sequence[ProbeScore]) -> float | None:
    """Return the share of known facts whose every token is the likeliest; None where there are none."""
    return sum(all(s.target_correct) for s in scores) / len(scores) if scores else None


def observed(
    bench: Bench, probes: Sequence[Probe], scores: Sequence[ProbeScore], *, with_texts: bool = True
) -> list[dict[str, Any]]:
    """Return scores and free texts of the model as it stands, as plain values: one dict per probe."""
    texts = written_as_it_stands(bench, probes) if with_texts else [{"text": None}] * len(probes)
    return [{**_plain(s), **written} for s, written in zip(scores, texts, strict=True)]


def observed_together(
    bench: Bench,
    patches: RowPatches,
    asked: Sequence[tuple[int, Sequence[Probe]]],
    scores: Sequence[Sequence[ProbeScore]],
) -> list[list[dict[str, Any]]]:
    """Return scores and free texts of several edits as plain values: one dict per probe.

    Args:
        bench: On the model without these edits.
        patches: The edits.
        asked: Probes with the edit that they are asked of.
        scores: Their scores.
    """
    flat = [(owner, probe) for owner, probes in asked for probe in probes]
    texts = iter(written_edited(bench, patches, flat))
    return [[{**_plain(s), **next(texts)} for s in own] for own in scores]


def _plain(scored: ProbeScore) -> dict[str, Any]:
    return {
        "nll_target": scored.nll_target,
        "nll_other": scored.nll_other,
        "target_correct": list(scored.target_correct),
        "other_correct": list(scored.other_correct),
        "target_choice": list(scored.target_choice),
    }
