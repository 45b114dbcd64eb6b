"""A run that several processes carry out together ends with the scores of one process, also when one was killed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked_ranks import in_ranks
from typed_commands import run

from errata.benchmarks.bench import execution
from errata.benchmarks.runs import rank_folders
from errata.benchmarks.runs.run_folder import RunFolder
from errata.editors.core import ranks
from errata.editors.core.errors import ConfigError

BENCH = ["device=cpu", "editor=memit", "n_edits=6", "batch_size=3", "editor.v_num_grad_steps=4", "generation.tokens=3"]
BENCH += ["generation.fluency_tokens=0", "collapse.n_texts=4", "collapse.known_facts=10"]
PROTOCOLS = {"sequential": ["eval_every=3"], "single": []}
# Moments are summed in another order, and a solve enlarges what that changes: update norms moved by 2e-4.
CLOSE = {"rel_tol": 2e-3, "abs_tol": 2e-4}


def test_only_the_first_rank_writes_into_the_folder_and_the_others_start_from_a_copy(tmp_path: Path) -> None:
    folder = RunFolder.at(tmp_path, "run", {})
    with folder.opened():
        folder.append("records.jsonl", {"edit": 1})

    def work(number: int) -> Any:
        with rank_folders.opened(folder, 1.0) as held:
            found = held.records("records.jsonl")
            held.append("records.jsonl", {"edit": 2 + number})
            return found, held.path == folder.path

    assert in_ranks(tmp_path / "two", work) == [([{"edit": 1}], True), ([{"edit": 1}], False)]
    with folder.opened():
        assert folder.records("records.jsonl") == [{"edit": 1}, {"edit": 2}]
    with rank_folders.opened(folder, 1.0) as held:
        assert held.path == folder.path


def test_torchrun_carries_out_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one run in several processes"):
        run("bench", "-m", "editor=rome,memit")


def test_each_rank_has_the_whole_model_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    prepared: Any = SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(device_map="auto")))
    with pytest.raises(ConfigError, match=r"leave model\.device_map out"):
        execution.carry_out(prepared)


def launched(out: Path, *words: str) -> subprocess.Popen[bytes]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [*torchrun, "-m", "errata.cli.main", "bench", *BENCH, *words, f"out={out}"]
    with (out.parent / f"{out.name}.log").open("wb") as log:
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def close(one: Any, other: Any) -> bool:
    """Whether two records are equal but for the rounding of their numbers, and how they were computed."""
    if isinstance(one, dict):
        left_out = {"digest", "together"}  # of the line, and with how many edits its answers were computed
        return one.keys() == other.keys() and all(close(one[name], other[name]) for name in one.keys() - left_out)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return math.isclose(one, other, **CLOSE) if isinstance(one, float) else one == other


def child_of(process: subprocess.Popen[bytes], rank: int) -> int:
    """Return the process of a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            said = (path / "environ").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process.pid and f"RANK={rank}".encode() in said:
            return int(path.name)
    raise AssertionError("no such rank")


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_two_processes_give_the_scores_of_one_also_when_one_was_killed(protocol: str, tmp_path: Path) -> None:
    words = [f"protocol={protocol}", *PROTOCOLS[protocol]]
    run("bench", *BENCH, *words, f"out={tmp_path / 'alone'}")
    process = launched(tmp_path / "two", *words)
    while not any(b'"edit":' in path.read_bytes() for path in tmp_path.glob("two/*/seconds.jsonl")):
        time.sleep(0.05)
        assert process.poll() is None, (tmp_path / "two.log").read_text()
    os.kill(child_of(process, 1), signal.SIGKILL)
    assert process.wait() == 0, (tmp_path / "two.log").read_text()
    assert "exitcode: -9" in (tmp_path / "two.log").read_text().replace("exitcode  :", "exitcode:")
    (alone,), (two,) = ([*(tmp_path / name).glob("*/records.jsonl")] for name in ("alone", "two"))
    records = [[json.loads(line) for line in path.read_text().splitlines()] for path in (alone, two)]
    assert len(records[0]) == 6
    for one, other in zip(*records, strict=True):
        assert close(one, other), (one, other)
