"""Sequences that are killed, or whose disk fails, go on with the identical command to identical bits.

ERRATA_TRIALS sets how many runs are disturbed; the faults and the comparison are in killing.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

KILLING = Path(__file__).with_name("killing.py")


def outcomes(folder: Path, *jobs: str) -> list[dict[str, Any]]:
    # The number of threads decides the order of sums, so that bits repeat only where it is as in conftest.py.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(KILLING), str(folder), *jobs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_disturbed_sequence_goes_on_to_the_same_weights_journal_and_metrics(
    tmp_path: Path, trials: Callable[[int], int]
) -> None:
    """Killed, or with a full or broken disk, at points all over the run; one process, so that it is started once."""
    count = trials(3)
    jobs = [f"kill:alphaedit:{count}", f"kill:memit:{count - 1}", f"disk:r_rome:{count - 1}", "control:memit:4"]
    *found, control = outcomes(tmp_path, *jobs)
    for outcome, job in zip(found, jobs, strict=False):
        assert outcome["differences"] == [], (job, outcome)
        assert outcome["landed"] >= int(job.split(":")[2]), (job, outcome)
        assert outcome["points"] > 100
        assert 0 < outcome["undone"] < 5, "no batch was undone and made again in halves"
        assert sum(outcome["where"].values()) == outcome["landed"]
    assert control["landed"] >= 4
    assert control["differences"], "a sequence that forgets an edit was not noticed: the comparison proves nothing"
