"""How a model is asked as it stands: scores, free texts, perplexity, retention, and lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from errata.benchmarks import ability
from errata.benchmarks.bench.context import Bench
from errata.benchmarks.datasets.json_records import Dropped
from errata.editors.core.contexts.asking import AskedPrompt, read_on
from errata.editors.core.model.reading import ReadPrompt, as_read
from errata.editors.core.model.tokens import prompt_ids
from errata.evaluate import scoring
from errata.evaluate.collapse import perplexity
from errata.evaluate.generation import generate
from errata.evaluate.probes import Probe
from errata.evaluate.scoring import ProbeScore, score

NEIGHBORHOOD = ("neighborhood",)


def fitting(bench: Bench) -> tuple[Bench, list[Dropped]]:
    """The bench with the cases that can be asked on its model, and the others: of those a probe has no tokens, or more
    than the model has positions for."""
    probes = [probe for case in bench.cases for probe in case.probes]
    new = [_new_tokens(bench, probe) for probe in probes]
    reasons = iter(scoring.unscorable_reasons(bench.model, bench.tokenizer, probes, new))
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
    probes = [probe for probe in bench.known if not any(subject in probe.prompt for subject in without)]
    if not probes:
        return None
    scores = score(bench.model, bench.tokenizer, probes, batch_tokens=bench.batch_tokens)
    return sum(all(s.target_correct) for s in scores) / len(probes)


def observed(
    bench: Bench, probes: Sequence[Probe], scores: Sequence[ProbeScore], *, with_texts: bool = True
) -> list[dict[str, Any]]:
    """Return scores and free texts of the model as it stands, as plain values: one dict per probe."""
    texts = _free_texts(bench, probes) if with_texts else [None] * len(probes)
    return [{**_plain(s), "text": text} for s, text in zip(scores, texts, strict=True)]


def _free_texts(bench: Bench, probes: Sequence[Probe]) -> list[str | None]:
    """What the model writes behind each probe's prompt, as long as the probe wants it. One prompt can be an open one of
    one case and a neighbour of another, so that texts of different lengths are kept apart."""
    asked = [AskedPrompt(probe.prompt, probe.chat) for probe in probes]
    prompts = read_on(bench.model, bench.tokenizer, asked)
    groups = [(probe.kind == "generation", _new_tokens(bench, probe)) for probe in probes]
    texts = {
        group: _written(bench, [p for p, own in zip(prompts, groups, strict=True) if own == group], group[1])
        for group in dict.fromkeys(groups)
    }
    return [texts[group].get(prompt) for prompt, group in zip(prompts, groups, strict=True)]


def _written(bench: Bench, prompts: Sequence[ReadPrompt], length: int) -> dict[ReadPrompt, str]:
    """What the model writes behind each of the prompts, `length` tokens at most; nothing for a length of 0."""
    distinct = list(dict.fromkeys(prompts))
    if not distinct or not length:
        return {}
    texts = generate(bench.model, bench.tokenizer, distinct, length, batch_tokens=bench.batch_tokens)
    return dict(zip(distinct, texts, strict=True))


def _plain(scored: ProbeScore) -> dict[str, Any]:
    return {
        "nll_target": scored.nll_target,
        "nll_other": scored.nll_other,
        "target_correct": list(scored.target_correct),
        "other_correct": list(scored.other_correct),
        "target_choice": list(scored.target_choice),
    }
