"""Numbers of a run: means, ratios, times, and which edits count as disabling."""

from __future__ import annotations

import math
from typing import Any

import pytest

from errata.benchmarks.bench import run_results
from errata.benchmarks.runs import summary


def _record(ratio: float | str | None, *, retention: float | None = None) -> dict[str, Any]:
    said = {"nll_target": 1.0, "nll_other": 2.0, "target_correct": [True], "other_correct": [], "target_choice": [1]}
    probe = {
        "kind": "rewrite",
        "prompt": "x",
        "target": "a",
        "other": "b",
        "before": {**said, "text": None},
        "after": None,
    }
    return {
        "place": 0,
        "case": "1",
        "status": "ok",
        "reason": None,
        "warnings": [],
        "diagnostics": {},
        "perplexity_before": 2.0,
        "perplexity": ratio if isinstance(ratio, str) or ratio is None else 2.0 * ratio,
        "neighborhood_kl": None,
        "retention": retention,
        "probes": [probe],
    }


def test_perplexities_are_averaged_by_their_logarithms_and_infinity_is_not_lost() -> None:
    collapse = summary.summarise([_record(4.0), _record(1.0)]).collapse
    assert collapse["perplexity_ratio"] == pytest.approx(2.0)
    assert collapse["perplexity_after"] == pytest.approx(4.0)
    assert collapse["perplexity_ratio_worst"] == 4.0
    broken = summary.summarise([_record(1.0), _record("nan"), _record("inf")])
    assert broken.collapse["perplexity_ratio_worst"] == math.inf
    assert broken.counts["disabling"] == 2


def test_an_untouched_model_without_finite_perplexity_gives_no_ratio() -> None:
    for before, after in (("inf", 4.0), ("nan", 4.0), ("inf", "inf")):
        record = {**_record(1.0), "perplexity_before": before, "perplexity": after}
        collapse = summary.summarise([record]).collapse
        assert collapse["perplexity_ratio"] is None
        assert collapse["perplexity_after"] is None


def test_seconds_written_twice_count_once() -> None:
    entries = [{"case": case, "edit": 2.0, "evaluation": 1.0} for case in ("a", "b", "b")]
    entries += 2 * [{"checkpoint": 0, "evaluation": 0.5}]
    speed = run_results._speed(entries)
    assert (speed["edit_seconds"], speed["seconds_per_edit"], speed["evaluation_seconds"]) == (4.0, 2.0, 2.5)


def test_the_total_of_a_run_that_went_on_is_the_time_of_all_of_its_starts() -> None:
    entries: list[dict[str, Any]] = [{"checkpoint": 0, "evaluation": 4.0}]
    entries += 2 * [{"case": "a", "edit": 2.0, "guard": 0.5}]  # made again after a kill
    assert run_results._speed(entries)["total_seconds"] == 9.0


@pytest.mark.parametrize(
    ("record", "disabling"),
    [
        (_record(2.01), True),
        (_record(2.0), False),
        (_record(None), False),
        (_record(1.0, retention=0.49), True),
        (_record(1.0, retention=0.5), False),
        (_record(None, retention=0.0), True),
    ],
)
def test_an_edit_is_disabling_that_doubles_perplexity_or_loses_most_facts(
    record: dict[str, Any], disabling: bool
) -> None:
    assert summary.is_disabling(record) is disabling


@pytest.mark.parametrize(
    ("status", "losses", "expected"),
    [("ok", [0.1, 0.69], True), ("ok", [0.1, 0.7], False), ("failed", [], False), ("undone", [0.1], False)],
)
def test_an_edit_took_that_gives_its_new_answers_even_odds(status: str, losses: list[float], expected: bool) -> None:
    probes = [{"kind": "rewrite", "after": {"nll_target": loss}} for loss in losses]
    probes += [{"kind": "paraphrase", "after": {"nll_target": 9.0}}, {"kind": "rewrite", "after": None}]
    assert summary.took({"status": status, "probes": probes}) is expected
