"""What was measured on one probe, and how far the probe is answered as expected: pure functions of scores and texts.

Free answers are read as the probe says (`FreeAnswer`): the part of the text that counts is looked up for every answer
that the probe needs, in any of its spellings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from errata.evaluate.answer_forms import is_exact, word_f1
from errata.evaluate.generation import Match, match_answer
from errata.evaluate.probes import FreeAnswer, Probe
from errata.evaluate.scoring import ProbeScore


@dataclass(frozen=True)
class Outcome:
    """What was measured on one probe: its score, its greedy continuation, and both from the untouched model.

    Attributes:
        probe: What was asked.
        score: Of the edited model.
        before: Of the untouched model.
        text: What the edited model wrote.
        text_before: What the untouched model wrote.
        between: Score of the model that carries the case's first edit and not its later ones, of edits in turn.
        by_itself: Score of the model that carries the case's last edit and no other.
        wild: What the edited model wrote up to a stop string, as WILD reads answers.
        wild_before: The same of the untouched model.
        measured: Shares by scoring that were measured when the text was written: verdicts of a judge, BLEU, ROUGE-L.
    """

    probe: Probe
    score: ProbeScore
    before: ProbeScore | None = None
    text: str | None = None
    text_before: str | None = None
    between: ProbeScore | None = None
    wild: str | None = None
    wild_before: str | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    by_itself: ProbeScore | None = None


def prefers_target(score: ProbeScore) -> bool | None:
    """Return whether the target is strictly more probable than the other answer; None without both, False for NaN."""
    if score.nll_target is None or score.nll_other is None:
        return None
    return score.nll_target < score.nll_other


def token_accuracy(correct: Sequence[bool]) -> float | None:
    """Return the share of an answer's tokens that are the most probable ones; None for no answer."""
    return fmean(correct) if correct else None


def spoken(text: str, free: FreeAnswer) -> str:
    """Return the part of a text that counts as the answer; empty where the cue that it follows is absent."""
    if free.after is not None:
        text = text.partition(free.after)[2]
    return text if free.until is None else text.lstrip().partition(free.until)[0]


def match_probe(probe: Probe, text: str) -> Match:
    """Return whether a free text answers a probe.

    It contains the answer if it contains all answers that the probe needs, each in any spelling. It is exact if it
    also begins with one of them; a text that is searched for substrings is exact if it contains the answer.
    """
    part = spoken(text, probe.free)
    if probe.free.matching == "substring":
        whole = probe.prompt + part
        holds = all(any(spelling in whole for spelling in spellings) for spellings in probe.answers)
        return Match(exact=holds, contained=holds)
    found = [[match_answer(part, spelling) for spelling in spellings] for spellings in probe.answers]
    contained = all(any(match.contained for match in matches) for matches in found)
    return Match(contained and any(match.exact for matches in found for match in matches), contained)


def success_by_scoring(outcome: Outcome) -> dict[str, float]:
    """Return per scoring how far the probe is answered as expected, from 0 to 1. Scorings without data are absent."""
    match = None
    if outcome.text is not None and outcome.probe.target is not None:
        match = match_probe(outcome.probe, outcome.text)
    # Behind a cue or an answer that the model writes itself, the answer is not what follows the prompt.
    is_next = outcome.probe.free.after is None and not outcome.probe.follow_ups
    spellings = outcome.probe.answers[0] if len(outcome.probe.answers) == 1 else None
    wild = None if spellings is None else outcome.wild
    return _present(
        probability=prefers_target(outcome.score) if is_next else None,
        teacher_forced=token_accuracy(outcome.score.target_correct) if is_next else None,
        generation=match and match.exact,
        generation_containment=match and match.contained,
        wild=None if wild is None or spellings is None else is_exact(wild, spellings),
        wild_f1=None if wild is None or spellings is None else word_f1(wild, spellings),
        **outcome.measured,
    )


def unchanged_by_scoring(outcome: Outcome) -> dict[str, float]:
    """Return per scoring how far the untouched model's answer stays, from 0 to 1. Scorings without data are absent.

    A model whose probabilities are NaN prefers neither answer, and so keeps none.
    """
    same_text = None if None in (outcome.text, outcome.text_before) else outcome.text == outcome.text_before
    same_wild = None if None in (outcome.wild, outcome.wild_before) else outcome.wild == outcome.wild_before
    if outcome.before is None:
        return _present(generation=same_text, wild=same_wild)
    now, then = prefers_target(outcome.score), prefers_target(outcome.before)
    choices = list(zip(outcome.score.target_choice, outcome.before.target_choice, strict=True))
    return _present(
        probability=None if now is None else now == then and not _is_nan(outcome.score),
        teacher_forced=fmean(a == b for a, b in choices) if choices else None,
        generation=same_text,
        wild=same_wild,
    )


def _is_nan(score: ProbeScore) -> bool:
    return any(nll is not None and math.isnan(nll) for nll in (score.nll_target, score.nll_other))


def _present(**values: float | None) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None}
