"""How a model is asked as it stands: scores, free texts, perplexity, retention, and lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from errata.benchmarks import ability
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.datasets.json_records import Dropped
from errata.editors.core.contexts.asking import AskedPrompt, read_on
from errata.editors.core.forward.row_patches import UNTOUCHED, RowPatches
from errata.editors.core.model.reading import ReadPrompt, as_read
from errata.editors.core.model.tokens import prompt_ids
from errata.evaluate import scoring_plan
from errata.evaluate.collapse import HeldOutTexts, perplexity
from errata.evaluate.generation import continue_edited, generate
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import ProbeScore, score

NEIGHBORHOOD = ("neighborhood",)


def fitting(bench: Bench) -> tuple[Bench, list[Dropped]]:
    """The bench with the cases that can be asked on its model, and the others: of those a probe has no tokens, or more
    than the model has positions for."""
    probes = [probe for case in bench.cases for probe in case.probes]
    new = [_new_tokens(bench, probe) for probe in probes]
    reasons = iter(scoring_plan.unscorable_reasons(bench.model, bench.tokenizer, probes, new))
    kept, dropped = [], []
    for case in bench.cases:
        found = [reason for reason in (next(reasons) for _ in case.probes) if reason is not None]
        if found:
            dropped.append(Dropped(case.id, "probes", found[0]))
        else:
            kept.append(case)
    return replace(bench, cases=kept), dropped


def _new_tokens(bench: Bench, probe: Probe) -> int:
    """How many tokens are written behind a probe's prompt, at most."""
    if not probe.wants_text:
        return 0
    if probe.free.tokens is not None and probe.free.with_prompt:
        prompt = as_read(bench.tokenizer, probe.prompt, chat=probe.chat).text
        return max(1, probe.free.tokens - len(prompt_ids(bench.tokenizer, prompt)))
    if probe.free.tokens is not None:
        return probe.free.tokens
    generation = bench.config.generation
    return generation.fluency_tokens if probe.kind == "generation" else generation.tokens


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
    texts = _free_texts(bench, probes) if with_texts else [None] * len(probes)
    return [{**_plain(s), "text": text} for s, text in zip(scores, texts, strict=True)]


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

    def written(prompts: Sequence[tuple[int, ReadPrompt]], length: int) -> list[str]:
        found = continue_edited(patches, bench.tokenizer, prompts, length, batch_tokens=bench.batch_tokens)
        return [continuation.text for continuation in found]

    texts = iter(_texts(bench, flat, written))
    return [[{**_plain(s), "text": next(texts)} for s in own] for own in scores]


def _free_texts(bench: Bench, probes: Sequence[Probe]) -> list[str | None]:
    """What the model writes behind each probe's prompt as it stands."""

    def written(prompts: Sequence[tuple[int, ReadPrompt]], length: int) -> list[str]:
        texts = [prompt for _, prompt in prompts]
        return generate(bench.model, bench.tokenizer, texts, length, batch_tokens=bench.batch_tokens)

    return _texts(bench, [(UNTOUCHED, probe) for probe in probes], written)


def _texts(
    bench: Bench,
    asked: Sequence[tuple[int, Probe]],
    written: Callable[[Sequence[tuple[int, ReadPrompt]], int], list[str]],
) -> list[str | None]:
    """What stands behind each probe's prompt, as long as the probe wants it. One prompt can be an open one of one case
    and a neighbour of another, so that texts of different lengths are kept apart.

    Args:
        bench: With the lengths of texts.
        asked: Probes with the edit that they are asked of.
        written: Takes (edit, prompt) pairs and a bound on new tokens, and returns a text for each.
    """
    found: dict[tuple[int, ReadPrompt, int], str] = {}
    lengths = [_new_tokens(bench, probe) for _, probe in asked]
    prompts = read_on(bench.model, bench.tokenizer, [AskedPrompt(probe.prompt, probe.chat) for _, probe in asked])
    keys = [(owner, prompt, length) for (owner, _), prompt, length in zip(asked, prompts, lengths, strict=True)]
    for length in sorted(set(lengths) - {0}):
        wanted = list(dict.fromkeys((owner, prompt) for owner, prompt, own in keys if own == length))
        for (owner, prompt), text in zip(wanted, written(wanted, length), strict=True):
            found[owner, prompt, length] = text
    return [found.get(key) for key in keys]


def _plain(scored: ProbeScore) -> dict[str, Any]:
    return {
        "nll_target": scored.nll_target,
        "nll_other": scored.nll_other,
        "target_correct": list(scored.target_correct),
        "other_correct": list(scored.other_correct),
        "target_choice": list(scored.target_choice),
    }
