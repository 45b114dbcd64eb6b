"""Trace many facts: those that the model knows, each with noise or with another subject of its relation.

A fact that cannot be traced is left out and counted, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from errata.editors.core.errors import ConfigError, RequestError
from errata.editors.core.locating.answer_scores import Direction
from errata.editors.core.locating.corruption import Noise, ScaledNoise, Swap, scaled_noise
from errata.editors.core.locating.donors import AskedFact, TraceableFact, ask, find_donor
from errata.editors.core.locating.grids import Grid
from errata.editors.core.locating.tracing import GRIDS, FactTrace, Tokens, trace
from errata.editors.core.model.architecture import Architecture, describe
from errata.editors.core.model.texts import TextSource, read_texts
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.progress import Progress, silent

UNREADABLE, UNKNOWN, NO_DONOR = "cannot be read", "answered otherwise", "no donor found"
# Texts whose embeddings give the covariance of the rules m and t5.
_TEXTS = 200


@dataclass(frozen=True)
class LeftOutFact:
    """A fact that was not traced, and why: UNREADABLE, UNKNOWN or NO_DONOR, with a detail for the reader."""

    id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class FactTraces:
    """The traces of many facts.

    Attributes:
        ids: Their names, in the order of the traces.
        traces: One per fact.
        left_out: The facts before the last traced one that were not traced.
    """

    ids: tuple[str, ...]
    traces: tuple[FactTrace, ...]
    left_out: tuple[LeftOutFact, ...]

    def counts(self) -> dict[str, int]:
        """Return how many facts were traced, and how many left out by reason."""
        reasons = [entry.reason for entry in self.left_out]
        return {"traced": len(self.traces), **{reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}}


def trace_facts(
    model: Any,
    tokenizer: Tokenizer,
    facts: Sequence[TraceableFact],
    corruption: Noise | None = None,
    *,
    n_facts: int | None = None,
    grids: Sequence[Grid] = GRIDS,
    direction: Direction = "denoising",
    tokens: Tokens = "all",
    seed: int = 0,
    texts: TextSource = "factbook",
    batch_tokens: int = 8192,
    progress: Progress = silent,
) -> FactTraces:
    """Trace the facts that the model knows, in their order.

    Args:
        model: A decoder of transformers.
        tokenizer: Its tokenizer.
        facts: The facts; donors come from all of them.
        corruption: The noise; None: another subject of the same relation, by symmetric token replacement.
        n_facts: Stop when that many are traced; None: trace all.
        grids: As in `trace`.
        direction: As in `trace`.
        tokens: As in `trace`.
        seed: Seed of the order of donors.
        texts: For noise of the rules `m` and `t5`: texts whose embeddings give its covariance.
        batch_tokens: Bound on the tokens that run at once.
        progress: Is told how many facts are traced.

    Raises:
        ConfigError: no fact can be traced; the message counts the reasons.
        ArchitectureError: as `trace`.
    """
    architecture = describe(model)
    scaled = None if corruption is None else scaled_for(architecture, tokenizer, corruption, facts, texts)
    ids, traces, left_out = [], [], list[LeftOutFact]()
    wanted = len(facts) if n_facts is None else n_facts
    for asked, changed in _chosen(architecture, tokenizer, facts, scaled, seed, left_out):
        fact = asked.fact
        traces.append(
            trace(
                model,
                tokenizer,
                fact.prompt,
                fact.subject,
                changed,
                answer=fact.answer,
                chat=fact.chat,
                grids=grids,
                direction=direction,
                tokens=tokens,
                batch_tokens=batch_tokens,
            )
        )
        ids.append(fact.id)
        progress(len(traces), wanted, "facts")
        if len(traces) == wanted:
            break
    found = FactTraces(tuple(ids), tuple(traces), tuple(left_out))
    if not traces:
        raise _none_traced(found, len(facts))
    return found


def _none_traced(found: FactTraces, asked: int) -> ConfigError:
    """Return the error that counts why no fact was traced."""
    counts = ", ".join(f"{count} {reason}" for reason, count in found.counts().items() if count)
    example = f"; the first: {found.left_out[0].id}: {found.left_out[0].detail}" if found.left_out else ""
    return ConfigError(f"none of {asked} facts can be traced: {counts or 'there are none'}{example}")


def _chosen(
    architecture: Architecture,
    tokenizer: Tokenizer,
    facts: Sequence[TraceableFact],
    noise: ScaledNoise | None,
    seed: int,
    left_out: list[LeftOutFact],
) -> Iterator[tuple[AskedFact, ScaledNoise | Swap]]:
    """Yield each fact that the model knows with what it is corrupted by; note the others."""
    for fact in facts:
        try:
            asked = ask(architecture, tokenizer, fact)
        except RequestError as error:
            left_out.append(LeftOutFact(fact.id, UNREADABLE, str(error)))
            continue
        if asked.said != asked.answer:
            said, expected = tokenizer.decode([asked.said]), tokenizer.decode([asked.answer])
            left_out.append(LeftOutFact(fact.id, UNKNOWN, f"the model says {said!r}, and {expected!r} was expected"))
            continue
        changed = noise or find_donor(architecture, tokenizer, asked, facts, seed=seed)
        if changed is None:
            left_out.append(LeftOutFact(fact.id, NO_DONOR, f"no other subject fits {fact.subject!r}"))
            continue
        yield asked, changed


def scaled_for(
    architecture: Architecture,
    tokenizer: Tokenizer,
    noise: Noise,
    facts: Sequence[TraceableFact],
    texts: TextSource = "factbook",
) -> ScaledNoise:
    """Return the noise with its scale: deviations of the subjects of all facts, or the covariance of texts.

    Without facts, deviations are those of the whole vocabulary.
    """
    subjects = None
    if noise.needs_subjects and facts:
        names = dict.fromkeys(fact.subject for fact in facts)
        subjects = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in names]
    read = None
    if noise.needs_texts:
        most = architecture.max_positions
        read = [tokenizer(text)["input_ids"][:most] for text in read_texts(texts, max_texts=_TEXTS)]
    return scaled_noise(architecture, noise, subjects=subjects, texts=read)
