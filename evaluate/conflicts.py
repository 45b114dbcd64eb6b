"""What later edits do to earlier ones, and what an edit there and back leaves: ConflictEdit's and RoundEdit's scores.

The probability of an answer is exp(-mean negative log-probability per token), averaged over the prompts that ask for
it.

    first_success       1 if the first edit's answer is more probable than the one it replaces, right behind that edit
    second_success      the same of the second edit, made by itself on the untouched model
    conflict_score      1 if the answer of the last edit is more probable than that of the first, which it replaces
    conflict_magnitude  (p1 - p2) / p1, at least -1: p1 is the first answer's probability behind the first edit alone,
                        p2 that behind both
    tied_fact_damage    (p0 - p2) / p0 of a fact that both edits lean on; p0 is that of the untouched model
    round_success       half for an edit away after which the wrong answer is the more probable one, and half for an
                        edit back after which the true one is
    distortion          Jensen-Shannon divergence, in nats, of the distribution over all true answers, before and after
    ignore_rate         the share of the other true answers that became less probable
    failure_rate        1 if more than half of them did

Source: Li et al. 2024 (Unveiling the Pitfalls of Knowledge Editing for Large Language Models), sections 2 and 3, as
their experiments/summarize.py computes them. Their divergence is divided by the number of answers, since it calls a
mean over a batch for a vector; here it is not divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from errata.evaluate.outcomes import Outcome
from errata.evaluate.scoring import ProbeScore

Moment = Callable[[Outcome], ProbeScore | None]


def conflict_score(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return whether the prevailing answer is more probable than the superseded one, by their means over prompts."""
    new, old = (_mean([o for o in outcomes if o.probe.kind == kind], _after) for kind in ("prevailing", "superseded"))
    return {} if new is None or old is None else {"probability": float(new > old)}


def first_success(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return whether the first edit took, before the second was made."""
    return _won(outcomes, lambda outcome: outcome.between)


def second_success(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return whether the second edit takes where it is made by itself, so that no conflict is to blame."""
    return _won(outcomes, lambda outcome: outcome.by_itself)


def conflict_magnitude(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return by how much of it the superseded answer's probability fell with the later edits."""
    return _fall(outcomes, lambda outcome: outcome.between, least=-1.0)


def tied_fact_damage(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return by how much of it the probability of a tied fact fell."""
    return _fall(outcomes, lambda outcome: outcome.before)


def round_success(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the share of the two edits, away and back, whose answer is the more probable one right behind them."""
    there, back = ([o for o in outcomes if o.probe.kind == kind] for kind in ("left_object", "restored_object"))
    first = [_mean(own, lambda outcome: outcome.between) for own in (there, back)]
    last = [_mean(own, _after) for own in (there, back)]
    if first[0] is None or first[1] is None or last[0] is None or last[1] is None:
        return {}
    return {"probability": (float(first[0] > first[1]) + float(last[1] > last[0])) / 2}


def distortion(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the Jensen-Shannon divergence between the true answers' distributions before and after, in nats."""
    found = _by_answer(outcomes)
    if len(found) < 2:
        return {}
    then, now = ([pair[side] for pair in found.values()] for side in (0, 1))
    if not sum(then) > 0 or not sum(now) > 0:
        return {}
    p, q = ([value / sum(side) for value in side] for side in (then, now))
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return {"probability": (_divergence(p, middle) + _divergence(q, middle)) / 2}


def ignore_rate(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the share of the other true answers that became less probable."""
    found = _by_answer(outcomes)
    return {"probability": fmean(then > now for then, now in found.values())} if found else {}


def failure_rate(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return whether more than half of the other true answers became less probable."""
    return {scoring: float(share > 0.5) for scoring, share in ignore_rate(outcomes).items()}


def _after(outcome: Outcome) -> ProbeScore | None:
    return outcome.score


def _fall(outcomes: Sequence[Outcome], then: Moment, least: float = -math.inf) -> dict[str, float]:
    before, after = _mean(outcomes, then), _mean(outcomes, _after)
    if before is None or after is None or not before > 0:
        return {}
    return {"probability": max((before - after) / before, least)}


def _won(outcomes: Sequence[Outcome], moment: Moment) -> dict[str, float]:
    """Return whether the targets are more probable than the other answers, by their means over prompts."""
    new, old = _mean(outcomes, moment), _mean(outcomes, moment, of_other=True)
    return {} if new is None or old is None else {"probability": float(new > old)}


def _by_answer(outcomes: Sequence[Outcome]) -> Mapping[str, tuple[float, float]]:
    """Return the probability of each answer before and after; nothing where one was not measured."""
    answers = dict.fromkeys(o.probe.target for o in outcomes if o.probe.target is not None)
    found: dict[str, tuple[float, float]] = {}
    for answer in answers:
        own = [o for o in outcomes if o.probe.target == answer]
        then, now = _mean(own, lambda outcome: outcome.before), _mean(own, _after)
        if then is None or now is None:
            return {}
        found[answer] = (then, now)
    return found


def _mean(outcomes: Sequence[Outcome], moment: Moment, *, of_other: bool = False) -> float | None:
    """Return the mean probability of the targets, or of the other answers; None where one was not measured, or is not
    finite."""
    scores = [moment(outcome) for outcome in outcomes]
    losses = [None if score is None else (score.nll_other if of_other else score.nll_target) for score in scores]
    values = [None if loss is None else math.exp(-loss) for loss in losses]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(known) if known and len(known) == len(values) else None


def _divergence(p: Sequence[float], q: Sequence[float]) -> float:
    """Return KL(p || q) in nats; a term with p = 0 is 0."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
