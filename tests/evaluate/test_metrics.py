"""What the numbers mean: pure functions of scores, and intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import original_metrics
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from errata.editors.core.request import EditRequest
from errata.evaluate.intervals import Interval, bootstrap, bootstrap_of_means
from errata.evaluate.metrics import (
    METRIC_OF_KIND,
    SCORINGS,
    Outcome,
    case_values,
    harmonic_mean,
    outcomes,
    papers_score,
    prefers_target,
    success_by_scoring,
    summarise,
    unchanged_by_scoring,
)
from errata.evaluate.probes import KINDS, Case, Kind, Probe
from errata.evaluate.scoring import ProbeScore

REWRITE = Probe("rewrite", "The capital of Varland is", "Brast", "Oslen")
NEIGHBOR = Probe("neighborhood", "The capital of Tarvos is", "Oslen", "Brast")


def scored(target: float | None, other: float | None = None, correct: tuple[bool, ...] = (), **more: Any) -> ProbeScore:
    return ProbeScore(target, other, correct, (), **more)


# --- one probe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "other", "wins"),
    [
        (1.0, 2.0, True),
        (2.0, 1.0, False),
        (1.0, 1.0, False),
        (1.0, None, None),
        (None, 1.0, None),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (1.0, math.inf, True),
    ],
)
def test_the_target_wins_only_when_it_is_strictly_more_likely(
    target: float | None, other: float | None, wins: bool | None
) -> None:
    assert prefers_target(scored(target, other)) is wins


@given(st.floats(0, 50), st.floats(0, 50))
def test_the_magnitude_has_the_sign_of_the_preference(target: float, other: float) -> None:
    one = scored(target, other)
    value = original_metrics.magnitude(one)
    assert value is not None
    assert -1 <= value <= 1
    assert value == pytest.approx(math.exp(-target) - math.exp(-other))
    assert prefers_target(one) or value <= 0


def test_every_scoring_judges_a_probe_on_its_own_data() -> None:
    score = scored(1.0, 2.0, (True, False, True, True))
    assert success_by_scoring(Outcome(REWRITE, score)) == {"probability": 1.0, "teacher_forced": 0.75}
    spoken = success_by_scoring(Outcome(REWRITE, score, text=" a town called Brast."))
    assert spoken == {"probability": 1.0, "teacher_forced": 0.75, "generation": 0.0, "generation_containment": 1.0}
    assert success_by_scoring(Outcome(Probe("generation", "Varland"), scored(None), text=" is cold")) == {}


def test_unchanged_compares_with_the_untouched_model_not_with_the_target() -> None:
    before = scored(2.0, 1.0, (False, False), target_choice=(5, 6))
    after = scored(3.0, 1.5, (False, False), target_choice=(5, 7))
    outcome = Outcome(NEIGHBOR, after, before, " Quelm", " Quelm")
    assert unchanged_by_scoring(outcome) == {"probability": 1.0, "teacher_forced": 0.5, "generation": 1.0}
    assert success_by_scoring(outcome)["probability"] == 0.0
    assert unchanged_by_scoring(Outcome(NEIGHBOR, after)) == {}
    assert unchanged_by_scoring(Outcome(NEIGHBOR, after, text=" a", text_before=" b")) == {"generation": 0.0}
    broken = scored(math.nan, math.nan, (False, False), target_choice=(-1, -1))
    assert unchanged_by_scoring(Outcome(NEIGHBOR, broken, before)) == {"probability": 0.0, "teacher_forced": 0.0}


# --- one case -------------------------------------------------------------------------------------------------------


def case_of(*probes: Probe) -> Case:
    return Case("1", EditRequest("The capital of {} is", "Varland", "Brast", "Oslen"), probes)


def test_every_kind_with_a_metric_is_averaged_under_its_name() -> None:
    probes = [Probe(kind, f"{kind} {i}", "a", "b") for kind in KINDS for i in range(2)]
    scores = [scored(1.0, 2.0, (True, False)), scored(2.0, 1.0, (True, True))] * len(KINDS)
    values = case_values(outcomes(case_of(*probes), scores))
    assert values == {
        "probability": dict.fromkeys(METRIC_OF_KIND.values(), 0.5),
        "teacher_forced": dict.fromkeys(METRIC_OF_KIND.values(), 0.75),
    }


def test_tokens_are_averaged_before_probes() -> None:
    probes = (REWRITE, Probe("rewrite", "other", "a", "b"))
    scores = [scored(1, 2, (True,)), scored(1, 2, (False, False, False))]
    assert case_values(outcomes(case_of(*probes), scores))["teacher_forced"] == {"reliability": 0.5}
    # The originals' zsRE scripts weigh every token alike instead.
    assert original_metrics.zsre_case(outcomes(case_of(*probes), scores)) == {"post_rewrite_acc": 0.25}


def test_locality_is_reported_against_the_target_and_against_the_untouched_model() -> None:
    before = [scored(2.0, 1.0, (False,), target_choice=(9,))]
    after = [scored(2.0, 1.0, (False,), target_choice=(9,))]
    texts = {NEIGHBOR.prompt: " Quelm"}
    values = case_values(outcomes(case_of(NEIGHBOR), after, before=before, texts=texts, texts_before=texts))
    assert values["probability"] == {"locality": 0.0, "locality_unchanged": 1.0}
    assert values["teacher_forced"] == {"locality": 0.0, "locality_unchanged": 1.0}
    assert values["generation"] == {"locality": 0.0, "locality_unchanged": 1.0}
    assert values["generation_containment"] == {"locality": 0.0}


def test_scores_that_do_not_belong_to_the_probes_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        outcomes(case_of(REWRITE, NEIGHBOR), [scored(1, 2)])


# --- many cases -----------------------------------------------------------------------------------------------------


def test_the_summary_counts_only_cases_that_have_the_metric() -> None:
    cases = [{"probability": {"reliability": 1.0}}, {"probability": {"reliability": 0.0, "locality": 1.0}}]
    summary = summarise(cases)
    assert summary["probability"]["reliability"]["mean"] == 0.5
    assert summary["probability"]["reliability"]["n"] == 2
    assert summary["probability"]["locality"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    assert summarise([]) == {}
    assert set(summary) <= set(SCORINGS)


SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(("reliability", "locality"), SHARES)), min_size=1))
def test_summaries_of_shares_are_shares(data: list[dict[str, list[float]]]) -> None:
    cases = [{"probability": {name: sum(v) / len(v) for name, v in case.items()}} for case in data]
    for metrics in summarise(cases, resamples=50).values():
        for value in metrics.values():
            assert 0 <= value["low"] <= value["high"] <= 1 + 1e-12
            assert 0 <= value["mean"] <= 1 + 1e-12


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=5))
def test_the_harmonic_mean_is_scipys(values: list[float]) -> None:
    assert harmonic_mean(values) == pytest.approx(scipy.stats.hmean(values))
    assert harmonic_mean([*values, 0.0]) == 0.0


def test_the_counterfact_score_takes_three_rates_or_four() -> None:
    rates = {"reliability": 1.0, "generalization": 0.5, "locality": 0.5}
    score = papers_score([{"probability": rates}], "probability")
    assert score is not None and score.mean == pytest.approx(0.6)
    score = papers_score([{"probability": {**rates, "distracting_locality": 0.25}}], "probability")
    assert score is not None and score.mean == pytest.approx(4 / (1 + 2 + 2 + 4))
    assert papers_score([{"probability": {"reliability": 1.0}}], "probability") is None


def test_the_score_of_cases_is_the_harmonic_mean_of_their_means_with_an_interval_around_it() -> None:
    rng = np.random.default_rng(0)
    rates = (("reliability", 0.9), ("generalization", 0.6), ("locality", 0.7))
    cases = [{"p": {name: float(rng.random() < rate) for name, rate in rates}} for _ in range(50)]
    cases[0]["p"].pop("locality")  # a case may lack a metric, and then does not count towards it
    means = [float(np.mean([case["p"][name] for case in cases if name in case["p"]])) for name, _ in rates]
    found = papers_score(cases, "p")
    assert found is not None
    assert found.mean == pytest.approx(harmonic_mean(means))
    assert found.low < found.mean < found.high
    assert papers_score([{"p": {"reliability": 1.0, "locality": 1.0}}], "p") is None


def test_the_originals_names_are_in_percent_with_two_digits() -> None:
    kinds: tuple[Kind, ...] = ("rewrite", "paraphrase", "neighborhood")
    probes = [Probe(kind, kind, "a", "b") for kind in kinds]
    good, bad = scored(0.0, math.inf, (True, True)), scored(math.inf, 0.0, (True, False))
    cases = [
        original_metrics.counterfact_case(outcomes(case_of(*probes), scores))
        for scores in ([good, good, good], [good, bad, good], [good, good, bad])
    ]
    summary = original_metrics.summary(cases)
    assert summary["post_rewrite_success"] == (100.0, 0.0)
    assert summary["post_paraphrase_success"] == (66.67, 47.14)
    assert summary["post_paraphrase_diff"] == (33.33, 94.28)
    assert summary["post_neighborhood_acc"] == (66.67, 47.14)
    assert summary["post_score"][0] == pytest.approx(3 / (1 / 100 + 2 / 66.67))


# --- intervals ------------------------------------------------------------------------------------------------------


def test_the_interval_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).normal(size=40)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    ours = bootstrap(list(values), seed=3)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_intervals_repeat_with_the_seed_and_move_with_it() -> None:
    values = [0.0, 0.2, 0.9, 1.0, 0.4, 0.5]
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.0, 0.2, 0.9, 1.0, 0.4, 0.5]
    whole = bootstrap(values)
    monkeypatch.setattr("errata.evaluate.intervals._VALUES_AT_ONCE", 37)
    assert bootstrap(values) == whole


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3, 0.3], [0.1] * 1000])
def test_without_variation_the_interval_is_the_value(values: list[float]) -> None:
    assert bootstrap(values) == Interval(values[0], values[0], values[0], len(values))


def test_a_wider_confidence_gives_a_wider_interval_and_more_cases_a_narrower_one() -> None:
    values = [0.0, 1.0] * 20
    narrow, wide = bootstrap(values, confidence=0.5), bootstrap(values, confidence=0.99)
    assert wide.low < narrow.low < 0.5 < narrow.high < wide.high
    many = bootstrap(values * 10)
    assert many.high - many.low < bootstrap(values).high - bootstrap(values).low


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        interval = bootstrap(list(rng.binomial(1, 0.4, size=60).astype(float)), seed=seed, resamples=400)
        covered += interval.low <= 0.4 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_of_one_mean_is_the_bootstraps_and_of_a_sum_allows_for_pairing() -> None:
    rng = np.random.default_rng(1)
    a, noise = rng.random(40), 0.01 * rng.random(40)
    one = bootstrap_of_means([a.tolist()], lambda means: means[..., 0])
    plain = bootstrap(a.tolist())
    assert (one.low, one.high) == pytest.approx((plain.low, plain.high))
    apart = bootstrap_of_means([a.tolist(), (a + noise).tolist()], lambda means: means[..., 1] - means[..., 0])
    assert 0 < apart.low < float(noise.mean()) < apart.high < 0.01
    with pytest.raises(ValueError, match="every column"):
        bootstrap_of_means([[math.nan, math.nan]], lambda means: means[..., 0])


def test_no_values_are_refused_and_values_that_are_not_finite_give_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap([])
    interval = bootstrap([1.0, math.nan])
    assert math.isnan(interval.low)
    assert interval.n == 2
