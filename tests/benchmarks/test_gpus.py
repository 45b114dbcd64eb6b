"""Workers on one machine share its GPUs: each keeps one of its own while it lives."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from errata.benchmarks.runs import run_status
from errata.benchmarks.runs.stopping import Stop
from errata.benchmarks.runs.sweeps import Sweep
from errata.cli import gpus, sweep_jobs
from errata.editors.core.errors import ConfigError

CHOOSER = """
import sys
from errata.cli.gpus import choose_gpu
print(choose_gpu(), choose_gpu(), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="locks of files are those of POSIX")
def test_each_worker_keeps_a_gpu_of_its_own_while_it_lives(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "3, 5", "TMPDIR": str(tmp_path)}

    def worker() -> tuple[subprocess.Popen[str], str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", CHOOSER], env=environment, **pipes)
        assert process.stdout is not None
        first, second = process.stdout.readline().split()
        assert first == second
        return process, first

    workers = [worker(), worker()]
    assert sorted(chosen for _, chosen in workers) == ["3", "5"]
    workers[0][0].kill()
    workers[0][0].wait()
    third = worker()
    assert third[1] == workers[0][1]
    for process, _ in (workers[1], third):
        process.kill()
        process.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="locks of files are those of POSIX")
def test_a_gpu_whose_lock_cannot_be_opened_counts_as_taken_and_another_users_lock_is_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"errata-gpu-{os.getuid()}-3.lock").mkdir()
    assert not gpus._lock("3")
    assert gpus._lock("5")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert gpus._lock("5")


def test_a_gpu_that_cannot_be_chosen_is_a_failure_of_its_job_and_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise OSError("no GPUs to be seen")

    monkeypatch.setattr(sweep_jobs, "choose_gpu", broken)
    plan = Sweep.begin(tmp_path, "", [["editor=rome"]])
    sweep_jobs.job({}, plan, 0, Stop(), picks_gpu=True)
    note = plan.note(0)
    assert note is not None
    assert note.failure is not None
    assert "no GPUs to be seen" in note.failure["reason"]


def test_an_error_of_the_system_is_ours_unless_it_is_the_machines() -> None:
    numbers = {errno.ENOSPC: False, errno.EACCES: False, errno.ENOENT: True, errno.ENOTDIR: True}
    assert {number: run_status.is_ours(OSError(number, "")) for number in numbers} == numbers
    assert not run_status.is_ours(ConfigError("no"))


def test_a_machine_without_a_choice_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.cli.gpus import choose_gpu

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert choose_gpu() is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
