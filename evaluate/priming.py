"""How far an edit's answer leaks into contexts that have nothing to do with the edit: memorization and priming.

    probes = prompts.probes(case, n=10)                      # evaluate/priming_prompts.py
    found = measure(model, tokenizer, probes, edit.applied())
    found.memorization.log10_s, found.priming.log10_s, found.by_place["relations"].delta_p

Both measures compare the probability of the first token of the new answer after the edit with that before it:

    S_mem   = P_after(x | edited prompt) / P_before(x | edited prompt)
    S_prime = mean over other prompts X of P_after(x | X) / P_before(x | X)

An edit that teaches its fact and nothing else has a large S_mem and an S_prime of 1. Without an edit, both are exactly
1. A mean of ratios is dominated by prompts at which the answer was very improbable, so the mean of the logarithms, the
median and the difference of the probabilities stand beside it.

Source: Sun et al. 2025, "How new data permeates LLM knowledge and how to dilute it" (arXiv 2504.09522). Its authors'
code is not public. Their test prefixes are about the keyword's theme; here the prompts are those of a dataset's records
(priming_prompts.py), and mean of logarithms and difference are added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean, median

from errata.editors.core.errors import ErrataError
from errata.editors.core.model.tokens import Tokenizer
from errata.evaluate.probes import FIRST_TOKEN_ALONE, Probe
from errata.evaluate.scoring import score
from errata.evaluate.scoring_plan import Model

MEMORIZATION, PRIMING = KINDS = FIRST_TOKEN_ALONE  # kinds of probes; the group of a priming probe is its place
SUBJECTS, RELATIONS, OPENINGS = "subjects", "relations", "openings"
PLACES = (SUBJECTS, RELATIONS, OPENINGS)


@dataclass(frozen=True)
class Ratios:
    """Probabilities of one token after some prompts, before and after an edit.

    Attributes:
        before: For each prompt the log-probability before the edit, in nats; at least one.
        after: The same after the edit, in the same order.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def _logs(self) -> list[float]:
        return [now - then for then, now in zip(self.before, self.after, strict=True)]

    @property
    def s(self) -> float:
        """Return S, the mean over prompts of P_after / P_before; infinite where it exceeds what a float can hold."""
        return 10**self.log10_s if self.log10_s < 308 else math.inf if self.is_finite else math.nan

    @property
    def log10_s(self) -> float:
        """Return log10 of S; NaN where a probability is NaN."""
        logs = self._logs
        top = max(logs)
        if not self.is_finite:
            return math.nan
        return (top + math.log(fmean(math.exp(value - top) for value in logs))) / math.log(10)

    @property
    def mean_log10(self) -> float:
        """Return the mean over prompts of log10(P_after / P_before)."""
        return fmean(self._logs) / math.log(10)

    @property
    def median_log10(self) -> float:
        """Return the median over prompts of log10(P_after / P_before); NaN where a probability is NaN."""
        return median(self._logs) / math.log(10) if self.is_finite else math.nan

    @property
    def delta_p(self) -> float:
        """Return the mean over prompts of P_after - P_before."""
        return fmean(math.exp(now) - math.exp(then) for then, now in zip(self.before, self.after, strict=True))

    @property
    def is_finite(self) -> bool:
        """Return whether all probabilities are numbers above 0."""
        return all(map(math.isfinite, (*self.before, *self.after)))

    @property
    def p_before(self) -> float:
        """Return the geometric mean of the probabilities before the edit."""
        return math.exp(fmean(self.before))


@dataclass(frozen=True)
class Priming:
    """What one edit does to the first token of its answer.

    Attributes:
        memorization: At the edited prompt.
        priming: At all other prompts that were asked; None where there are none.
        by_place: The same for each place that has prompts: "subjects", "relations", "openings".
    """

    memorization: Ratios
    priming: Ratios | None
    by_place: Mapping[str, Ratios]

    @property
    def selectivity(self) -> float | None:
        """Return log10 S_mem - log10 S_prime: by how much more the edit reaches its own prompt than the others."""
        return None if self.priming is None else self.memorization.log10_s - self.priming.log10_s


def measure(
    model: Model,
    tokenizer: Tokenizer,
    probes: Sequence[Probe],
    edited: AbstractContextManager[object],
    *,
    batch_tokens: int = 8192,
) -> Priming:
    """Return memorization and priming of one edit, of any method.

    Args:
        model: Without the edit.
        tokenizer: Its fast tokenizer.
        probes: Of one fact, as `PromptPool.probes` gives them; probes of other kinds are left out.
        edited: Puts the edit on the model while it is entered, as `edit.applied()`.
        batch_tokens: As of `score`.

    Raises:
        ErrataError: There is no probe at the edited prompt, or a prompt is longer than the model's positions.
    """
    asked = [probe for probe in probes if probe.kind in KINDS]
    before = score(model, tokenizer, asked, batch_tokens=batch_tokens)
    with edited:
        after = score(model, tokenizer, asked, batch_tokens=batch_tokens)
    return of_losses(asked, [s.nll_target for s in before], [s.nll_target for s in after])


def of_losses(probes: Sequence[Probe], before: Sequence[float | None], after: Sequence[float | None]) -> Priming:
    """Return memorization and priming of one fact from the losses of its probes.

    Args:
        probes: Of the kinds "memorization" and "priming".
        before: For each probe the negative log-probability of its target's first token before the edit, in nats.
        after: The same after the edit.

    Raises:
        ErrataError: There is no probe at the edited prompt.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for probe, then, now in zip(probes, before, after, strict=True):
        assert then is not None and now is not None, "every probe of priming has a target"
        place = MEMORIZATION if probe.kind == MEMORIZATION else str(probe.group)
        found.setdefault(place, []).append((-then, -now))
    if MEMORIZATION not in found:
        raise ErrataError(f"expected a probe of the kind {MEMORIZATION!r}, got those of {sorted(found)}")
    elsewhere = [pair for place, pairs in found.items() if place != MEMORIZATION for pair in pairs]
    return Priming(
        memorization=_ratios(found[MEMORIZATION]),
        priming=_ratios(elsewhere) if elsewhere else None,
        by_place={place: _ratios(found[place]) for place in PLACES if place in found},
    )


def _ratios(pairs: Sequence[tuple[float, float]]) -> Ratios:
    before, after = zip(*pairs, strict=True)
    return Ratios(before, after)
