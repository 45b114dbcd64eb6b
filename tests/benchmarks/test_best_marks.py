"""Which numbers of a table are marked best: the best, what a paired test cannot tell from it, and damage."""

from __future__ import annotations

import math

from result_values import results_with

from errata.benchmarks.reports import groups


def _marks(*columns: list[float]) -> list[tuple[bool, bool]]:
    """Whether each column of 0 and 1 is marked as the best, and as tied with it."""
    row = [groups.Cell(sum(values) / len(values), 0, 1, len(values)) for values in columns]
    values = [{str(i): {"p": {"m": value}} for i, value in enumerate(column)} for column in columns]
    marked = groups._marked(row, values, "p", "m", results_with("x"))
    return [(cell.is_best, cell.is_tied) for cell in marked if cell is not None]


def test_the_best_is_tied_with_what_a_paired_test_cannot_tell_from_it() -> None:
    assert _marks([1.0] * 20, [1.0] * 18 + [0.0] * 2, [0.0] * 20) == [(True, False), (False, True), (False, False)]


def test_equal_means_are_both_best_and_where_all_are_equal_none_is() -> None:
    assert _marks([1.0, 0.0], [0.0, 1.0], [0.0, 0.0])[:2] == [(True, False), (True, False)]
    assert _marks([1.0, 0.0], [0.0, 1.0]) == [(False, False), (False, False)]


def test_less_perplexity_is_better() -> None:
    row = [groups.Cell(mean, mean, mean, 1) for mean in (0.5, 0.1)]
    assert groups._best(row) == 0
    assert groups._best(row, lower=True) == 1


def test_damage_that_is_not_finite_is_counted_and_worse_than_any_number() -> None:
    runs = [results_with("rome"), results_with("memit"), results_with("emmet")]
    columns = [[0.5, 0.25, math.inf], [3.0, 3.0, 3.0], [math.inf] * 3]
    values = [{str(i): {"damage": {"drift": value}} for i, value in enumerate(column)} for column in columns]
    row = groups._damage(runs, values, "drift")
    cells = groups._marked(row, values, "damage", "drift", runs[0])
    assert [(cell.n, cell.not_finite, cell.is_best) for cell in cells if cell] == [
        (3, 1, False), (3, 0, True), (3, 3, False)
    ]  # fmt: skip
    assert row[0] is not None
    assert row[0].mean == 0.375
    assert row[2] is not None
    assert math.isnan(row[2].mean)
