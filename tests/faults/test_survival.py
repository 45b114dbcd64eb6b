"""Sequences that are killed, or whose disk fails, go on with the identical command to identical bits.

ERRATA_TRIALS sets how many runs are disturbed; the faults and the comparison are in killed_runs.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed_runs
import pytest
from forked import output_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def outcomes(folder: Path, *jobs: str) -> list[dict[str, Any]]:
    said = output_of(lambda: killed_runs.main(folder, list(jobs)), folder / "process")
    return [json.loads(line) for line in said.splitlines()]


# 20 seconds. In everyday runs test_bench.py and test_sequences.py repeat a run and a sequence.
@pytest.mark.slow
def test_runs_repeat_bit_for_bit_alone_and_beside_each_other(
    tmp_path: Path, trials: Callable[..., int], tried: Callable[..., None]
) -> None:
    """Of every trial two runs at once and a third alone, of a seed of their own, under each protocol in turn."""
    total = trials(3, 60)
    methods = ("memit", "r_rome", "alphaedit", "emmet")[: max(1, total // 15)]
    count = total // len(methods)
    jobs = [*(f"twice:{method}:{count}" for method in methods), "unseeded:memit:1"]
    *found, control = outcomes(tmp_path, *jobs)
    tried(
        14,
        count * len(methods),
        methods=methods,
        runs=[outcome["landed"] for outcome in found],
        control=len(control["differences"]),
    )
    for outcome, job in zip(found, jobs, strict=False):
        assert outcome["differences"] == [], (job, outcome)
        assert outcome["landed"] == 3 * count
        assert set(outcome["where"]) == {"sequential", "single", "batch"}
    assert len(control["differences"]) > 0, "a run that does not repeat was not noticed: the comparison proves nothing"


def test_a_disturbed_sequence_goes_on_to_the_same_weights_journal_and_metrics(
    tmp_path: Path, trials: Callable[..., int], tried: Callable[..., None]
) -> None:
    """Killed, or with a full or broken disk, at points all over the run; one process, so that it is started once."""
    count = trials(2, 300)  # a trial dies once or twice
    jobs = [f"kill:alphaedit:{count}", f"kill:memit:{count - 1}", f"disk:r_rome:{count}", "control:memit:4"]
    *found, control = outcomes(tmp_path, *jobs)
    kept = {
        job: {name: outcome[name] for name in ("landed", "where")} for job, outcome in zip(jobs, found, strict=False)
    }
    tried(3, sum(int(job.split(":")[2]) for job in jobs[:-1]), jobs=kept, control=len(control["differences"]))
    for outcome, job in zip(found, jobs, strict=False):
        assert outcome["differences"] == [], (job, outcome)
        assert outcome["landed"] >= int(job.split(":")[2]), (job, outcome)
        assert outcome["points"] > 100
        assert 0 < outcome["undone"] < 5, "no batch was undone and made again in halves"
        assert sum(outcome["where"].values()) == outcome["landed"]
    assert control["landed"] >= 4
    assert control["differences"], "a sequence that forgets an edit was not noticed: the comparison proves nothing"
