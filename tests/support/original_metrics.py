"""Metrics in the form in which the scripts of ROME, MEMIT and CounterFact+ report them.

The golden tests compare these numbers with those of the original scripts: they prove that the scores of
`errata.evaluate.scoring` are the originals' scores. errata itself reports `metrics.summarise` and
`metrics.papers_score`, which do not round.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean

import numpy as np

from errata.evaluate.metrics import Outcome, harmonic_mean, prefers_target
from errata.evaluate.scoring import ProbeScore

KINDS = ("rewrite", "paraphrase", "neighborhood", "distracting_neighborhood")


def magnitude(score: ProbeScore) -> float | None:
    """Return p(target) - p(other), the originals' "diff"; None without both answers.

    Each probability is the geometric mean over the tokens of the answer.
    """
    if score.nll_target is None or score.nll_other is None:
        return None
    return math.exp(-score.nll_target) - math.exp(-score.nll_other)


def counterfact_case(measured: Iterable[Outcome]) -> dict[str, float]:
    """Return one CounterFact case under the names of ROME's and MEMIT's scripts.

    `post_KIND_success` says whether the target is the more probable answer, `post_KIND_diff` is the `magnitude`, and
    `post_KIND_acc` says whether all tokens of the target are the most probable ones. All are means over the probes.
    """
    found: dict[str, list[float]] = {}
    for outcome in measured:
        kind, score = outcome.probe.kind, outcome.score
        if kind not in KINDS:
            continue
        values = {
            "success": prefers_target(score),
            "diff": magnitude(score),
            "acc": all(score.target_correct) if score.target_correct else None,
        }
        for name, value in values.items():
            if value is not None:
                found.setdefault(f"post_{kind}_{name}", []).append(float(value))
    return {name: fmean(values) for name, values in found.items()}


def zsre_case(measured: Iterable[Outcome]) -> dict[str, float]:
    """Return one zsRE case: `post_KIND_acc` is the share of correct tokens among all target tokens of that kind."""
    found: dict[str, list[bool]] = {}
    for outcome in measured:
        if outcome.probe.kind in KINDS and outcome.score.target_correct:
            found.setdefault(f"post_{outcome.probe.kind}_acc", []).extend(outcome.score.target_correct)
    return {name: fmean(flags) for name, flags in found.items()}


def summary(cases: Iterable[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Return mean and population standard deviation over cases, in percent to two digits, and `post_score`.

    The score is the harmonic mean of the rounded success rates, as the originals take it; its deviation is NaN.
    """
    cases = list(cases)
    names = dict.fromkeys(name for case in cases for name in case)
    found: dict[str, tuple[float, float]] = {}
    for name in names:
        values = np.array([case[name] for case in cases if name in case])
        found[name] = (float(np.around(values.mean() * 100, 2)), float(np.around(values.std() * 100, 2)))
    rates = [found[name][0] for kind in KINDS if (name := f"post_{kind}_success") in found]
    if len(rates) >= 3:
        found["post_score"] = (harmonic_mean(rates), math.nan)
    return found
