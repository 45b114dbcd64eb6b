"""Heads on the facts of a dataset: ranked on some conflicts of memory and context, and scaled on others.

A conflict is a fact that the model knows, behind a sentence that says the record's new answer in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from errata.editors.core.errors import ConfigError, RequestError
from errata.editors.core.head_scaling import scale_heads
from errata.editors.core.locating.heads import (
    Answer,
    FalseContext,
    Head,
    HeadAttributions,
    Side,
    answers,
    attribute_heads,
    read_conflict,
)
from errata.editors.core.model.tokens import Tokenizer
from errata.editors.core.progress import Progress, silent
from errata.evaluate.intervals import bootstrap
from errata.evaluate.probes import Case

FACTORS = (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
SIDES: tuple[Side, ...] = ("memory", "context")
# Heads of each side that are listed.
LISTED = 5
# Questions that are asked at once, while facts are looked for that the model knows.
_ASKED = 32


@dataclass(frozen=True)
class KnownContexts:
    """The conflicts about facts that a model knows.

    Attributes:
        conflicts: In the order of the records.
        unknown: How many earlier facts it answered otherwise.
        unreadable: How many earlier ones had two answers that begin alike, or one that cannot be read.
    """

    conflicts: tuple[FalseContext, ...]
    unknown: int
    unreadable: int


def conflicts_of(cases: Sequence[Case]) -> list[FalseContext]:
    """Return a conflict per request that has a true answer beside the new one."""
    return [
        FalseContext(request.text, request.target_true, request.target, str(case.id), request.join, request.chat)
        for case in cases
        for request in case.requests
        if request.target_true is not None
    ]


def known_conflicts(
    model: Any, tokenizer: Tokenizer, conflicts: Sequence[FalseContext], n_facts: int | None = None
) -> KnownContexts:
    """Return the first conflicts whose questions, alone, the model answers from memory.

    Args:
        model: A decoder.
        tokenizer: Its tokenizer.
        conflicts: Those of a dataset.
        n_facts: Stop when there are that many; None: ask all.
    """
    found: list[FalseContext] = []
    unknown = unreadable = 0
    wanted = len(conflicts) if n_facts is None else n_facts
    for start in range(0, len(conflicts), _ASKED):
        some = conflicts[start : start + _ASKED]
        is_readable = [_is_readable(tokenizer, conflict) for conflict in some]
        asked = [conflict for conflict, can in zip(some, is_readable, strict=True) if can]
        told = iter(answers(model, tokenizer, asked, with_context=False))
        for conflict, can in zip(some, is_readable, strict=True):
            if len(found) == wanted:
                return KnownContexts(tuple(found), unknown, unreadable)
            if not can:
                unreadable += 1
            elif next(told).says == "memory":
                found.append(conflict)
            else:
                unknown += 1
    return KnownContexts(tuple(found), unknown, unreadable)


def _is_readable(tokenizer: Tokenizer, conflict: FalseContext) -> bool:
    try:
        read_conflict(tokenizer, conflict)
    except RequestError:
        return False
    return True


def head_report(
    model: Any,
    tokenizer: Tokenizer,
    known: KnownContexts,
    *,
    heads: Sequence[Head] | None = None,
    factors: Sequence[float] = FACTORS,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Rank heads on every second conflict, and scale the best of each side on the others.

    Args:
        model: A decoder, whose weights are as before when this returns.
        tokenizer: Its tokenizer.
        known: At least two conflicts.
        heads: The heads that are scaled, one after the other; None: the strongest of each side.
        factors: What they are multiplied by.
        progress: Is told what is done.

    Returns:
        Plain values: `attributions` (L, H) means in logits, `strongest` by side with intervals over facts, and
        `sweeps`, one per head, with an entry per factor. Its shares have 95 % intervals: `context`, `memory` and
        `other` of the answers behind the false sentence, and `remembered`, the share of the questions alone that are
        still answered from memory.

    Raises:
        ConfigError: there are fewer than two conflicts.
    """
    if len(known.conflicts) < 2:
        raise ConfigError(
            f"found {len(known.conflicts)} facts that the model knows and that have a new answer beside the true one; "
            f"expected at least 2 ({known.unknown} were answered otherwise, {known.unreadable} could not be used)"
        )
    ranked, measured = known.conflicts[::2], known.conflicts[1::2]
    found = attribute_heads(model, tokenizer, ranked, progress=progress)
    chosen = [found.strongest(side)[0] for side in SIDES] if heads is None else list(heads)
    sweeps = []
    for place, head in enumerate(chosen):
        sweeps.append({"head": str(head), "effects": _sweep(model, tokenizer, measured, head, factors)})
        progress(place + 1, len(chosen), "heads scaled")
    return {
        "counts": {
            "ranked": len(ranked),
            "measured": len(measured),
            "unknown": known.unknown,
            "unusable": known.unreadable,
        },
        "attributions": [[None if np.isnan(each) else each for each in row] for row in found.mean.tolist()],
        "strongest": {side: [_listed(found, head) for head in found.strongest(side, LISTED)] for side in SIDES},
        "difference": bootstrap(found.differences.tolist()).as_dict(),
        "sweeps": sweeps,
    }


def _listed(found: HeadAttributions, head: Head) -> dict[str, Any]:
    values = found.values[:, head.layer, head.index].tolist()
    return {"head": str(head), **bootstrap(values).as_dict()}


def _sweep(
    model: Any, tokenizer: Tokenizer, conflicts: Sequence[FalseContext], head: Head, factors: Sequence[float]
) -> list[dict[str, Any]]:
    effects = []
    for factor in factors:
        with scale_heads(model, {head: factor}).applied():
            told, alone = (answers(model, tokenizer, conflicts, with_context=context) for context in (True, False))
        shares = {side: _share(told, side) for side in ("context", "memory", "other")}
        differences = bootstrap([answer.difference for answer in told]).as_dict()
        effects.append({"factor": factor, **shares, "remembered": _share(alone, "memory"), "difference": differences})
    return effects


def _share(told: Sequence[Answer], says: str) -> dict[str, Any]:
    return bootstrap([float(answer.says == says) for answer in told]).as_dict()
