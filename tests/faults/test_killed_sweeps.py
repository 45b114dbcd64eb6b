"""A sweep on two workers that is killed whole, again and again, ends with the results of one that is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from errata.benchmarks.runs.status import survey

KILLS = 3
METHODS, DATASETS = ("rome", "memit", "alphaedit", "emmet"), ("world", "world_counterfact")
SWEEP = [f"editor={','.join(METHODS)}", f"dataset={','.join(DATASETS)}", "protocol=sequential", "n_edits=4"]
SWEEP += ["batch_size=1", "eval_every=2", "device=cpu", "editor.v_num_grad_steps=4", "generation.tokens=0"]
SWEEP += ["generation.fluency_tokens=0", "collapse.n_texts=4", "collapse.known_facts=10"]


def started(out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "errata.cli.main", "bench", "-m", *SWEEP, *more, f"out={out}"]
    environment, nowhere = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=nowhere, stderr=nowhere)


def edits(out: Path) -> int:
    return sum(path.read_bytes().count(b'"edit"') for path in out.glob("*/seconds.jsonl"))


def kill(process: subprocess.Popen[bytes], out: Path) -> None:
    """The process that waits for the workers first, so that it begins none again, then each that holds a run."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for run in survey(out).runs:
        if run.state == "running" and run.folder is not None:
            with suppress(ProcessLookupError):
                os.kill(json.loads((Path(run.folder) / "run.json").read_text())["process"], signal.SIGKILL)
    while any(run.state == "running" and run.folder is not None for run in survey(out).runs):
        time.sleep(0.05)


@pytest.mark.slow
def test_a_sweep_killed_three_times_ends_with_the_results_of_one_left_alone(tmp_path: Path) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    landed = []
    for _ in range(KILLS):
        before, process = edits(killed), started(killed, "launcher=submitit_local")
        while edits(killed) < before + 3 and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, "the sweep was over before it could be killed"
        kill(process, killed)
        landed.append((edits(killed), survey(killed).count("done")))
    assert all(done < len(METHODS) * len(DATASETS) for _, done in landed), landed
    assert started(killed, "launcher=submitit_local").wait() == 0
    assert started(alone).wait() == 0
    runs = sorted(path.parent.name for path in alone.glob("*/results.json"))
    assert len(runs) == len(METHODS) * len(DATASETS)
    assert runs == sorted(path.parent.name for path in killed.glob("*/results.json"))
    for run in runs:
        for name in ("records.jsonl", "curve.json"):
            assert (killed / run / name).read_bytes() == (alone / run / name).read_bytes(), (run, name, landed)
