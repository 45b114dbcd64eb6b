"""Two methods on the same cases: intervals, tests and corrections against scipy and against what is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from errata.evaluate.paired import difference, holm_adjusted, mcnemar, sign_flip_p_value


def test_shares_are_compared_by_mcnemars_exact_test_and_other_means_by_signs() -> None:
    assert difference([0, 1, 1], [1, 1, 0]).test == "mcnemar"
    assert difference([0, 1, 0.5], [1, 1, 0]).test == "permutation"


def test_mcnemar_looks_at_discordant_cases_alone() -> None:
    # 2 * (C(10, 0) + C(10, 1)) / 2^10
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)
    a, b = [1] * 9 + [0] + [1] * 50, [0] * 9 + [1] + [1] * 50
    found = difference(a, b)
    assert (found.wins, found.losses, found.n) == (1, 9, 60)
    assert found.p == pytest.approx(22 / 1024)
    assert found.is_significant


def test_flipped_signs_of_few_cases_are_exact_as_scipys() -> None:
    rng = np.random.default_rng(0)
    for n in (3, 7, 10):
        apart = rng.normal(0.4, 1, n).round(1)
        exact = stats.permutation_test((apart,), np.mean, permutation_type="samples", n_resamples=2**n)
        assert sign_flip_p_value(apart) == pytest.approx(exact.pvalue)


def test_flipped_signs_of_shares_are_mcnemars_test() -> None:
    apart = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 30)
    assert sign_flip_p_value(apart) == pytest.approx(mcnemar(9, 2))


def test_flipped_signs_of_many_cases_are_near_the_normal_limit_and_never_zero() -> None:
    rng = np.random.default_rng(1)
    apart = rng.normal(0.1, 1, 400)
    z = apart.sum() / np.sqrt((apart**2).sum())
    assert sign_flip_p_value(apart) == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.02)
    assert 0 < sign_flip_p_value(np.ones(400)) <= 1e-4 + 1e-12


def test_a_test_of_no_difference_rejects_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    rejected = [sign_flip_p_value(rng.normal(0, 1, 10)) < 0.05 for _ in range(400)]
    assert 0.02 < np.mean(rejected) < 0.08


def test_the_difference_is_b_minus_a_with_an_interval_around_it() -> None:
    rng = np.random.default_rng(3)
    hardness = rng.normal(0, 5, 100)
    a, b = hardness + rng.normal(0, 1, 100), hardness + rng.normal(1, 1, 100)
    found = difference(a.tolist(), b.tolist())
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(float((b - a).mean()))
    assert found.high - found.low < 1, "cases were not paired: their hardness is in the interval"
    turned = difference(b.tolist(), a.tolist())
    assert (turned.mean, turned.p) == (pytest.approx(-found.mean), found.p)


def test_a_handful_of_differing_cases_is_not_told_apart() -> None:
    found = difference([1.0] * 10, [0.5] * 4 + [1.0] * 6)
    assert found.high < 0
    assert found.p == 0.125
    assert not found.is_significant


def test_equal_runs_are_not_told_apart() -> None:
    found = difference([0.3, 0.9], [0.3, 0.9])
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert not found.is_significant


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 and 2"):
        difference([1], [1, 2])


def test_holm_multiplies_by_what_is_left_and_never_decreases() -> None:
    assert holm_adjusted([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm_adjusted([0.9, 0.8]) == [1.0, 1.0]
    assert holm_adjusted([]) == []


def test_an_infinite_value_is_the_highest_rank_of_wilcoxons_signed_ranks() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(0, 1, 9), rng.normal(0.5, 1, 9)
    b[2], b[8], a[8] = np.inf, np.inf, np.inf
    found = difference(a.tolist(), b.tolist())
    stand_in = b[:8] - a[:8]
    stand_in[2] = 100.0
    expected: Any = stats.wilcoxon(stand_in, method="exact")
    assert (found.test, found.n) == ("signed_rank", 9)
    assert found.p == pytest.approx(expected.pvalue)
    finite = [i for i in range(9) if i not in (2, 8)]
    assert found.mean == pytest.approx(float((b[finite] - a[finite]).mean()))


def test_cases_of_which_none_is_finite_have_no_mean_and_are_told_apart_by_their_ranks() -> None:
    found = difference([0.0] * 12, [np.inf] * 12)
    assert np.isnan([found.mean, found.low, found.high]).all()
    assert (found.wins, found.is_significant) == (12, True)
    assert difference([np.inf] * 12, [np.inf] * 12).p == 1.0


def test_a_case_without_a_value_tells_nothing_apart() -> None:
    pairs: Any = [0.1, 0.2, None, 0.5, np.nan], [0.1, 0.2, 0.3, 0.5, 0.0]
    found = difference(*pairs)
    assert (found.n, found.wins, found.losses, found.p) == (3, 0, 0, 1.0)
    assert not found.is_significant
    assert difference([np.nan, 0.2, np.inf], [1.0, 0.3, 1.0]) == difference([0.2, np.inf], [0.3, 1.0])
