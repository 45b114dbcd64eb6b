"""What became of the runs of a folder: running, done, stopped, failed or pending, and what `errata status` shows."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from sweep_commands import at_work
from typed_commands import run

from errata.benchmarks.runs import run_status
from errata.benchmarks.runs.run_folder import RunFolder
from errata.benchmarks.runs.status import STATES, RunsStatus, survey
from errata.benchmarks.runs.sweeps import JobNote, Sweep
from errata.editors.core.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.at(tmp_path, "rome-world", {"a": 1})
    folder.path.mkdir()
    return folder


def states(found: RunsStatus) -> dict[str, str]:
    return {run.name: run.state for run in found.runs}


def test_a_run_is_running_while_its_folder_is_held_and_stopped_when_it_is_let_go(folder: RunFolder) -> None:
    with pytest.raises(KeyboardInterrupt), at_work(folder):
        assert states(survey(folder.path.parent)) == {folder.path.name: "running"}
        raise KeyboardInterrupt
    (run,) = survey(folder.path.parent).runs
    assert (run.state, run.command, run.reason) == ("stopped", "errata bench x", None)


def test_a_failed_run_says_why_and_where_until_it_begins_again(folder: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError), at_work(folder):
        raise ZeroDivisionError("by\nnothing")
    (run,) = survey(folder.path.parent).runs
    assert (run.state, run.reason) == ("failed", "ZeroDivisionError: by nothing")
    assert run.traceback is not None
    assert "ZeroDivisionError" in Path(run.traceback).read_text()
    with at_work(folder):
        assert survey(folder.path.parent).runs[0].reason is None
    assert not Path(run.traceback).exists()


def test_a_run_that_fails_behind_its_end_is_done_and_leaves_no_note(folder: RunFolder) -> None:
    """As where the folder cannot be synced once everything is written."""
    for name in folder.data:
        folder.write_text(name, "{}")
    with pytest.raises(OSError, match="No space"), at_work(folder):
        folder.finish()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert folder.done
    assert not {run_status.FAILED, run_status.TRACEBACK} & {path.name for path in folder.path.iterdir()}


def test_time_left_is_what_the_edits_took_so_far_times_those_to_come(folder: RunFolder) -> None:
    with at_work(folder, edits=10):
        for case in ("a", "b", "b", "c"):  # b was made again after a kill
            folder.append("seconds.jsonl", {"case": case, "edit": 1.0, "evaluation": 2.0})
        with (folder.path / "seconds.jsonl").open("a") as file:
            file.write('{"case": "torn')
        found = survey(folder.path.parent)
    (run,) = found.runs
    assert (run.made, run.edits, run.seconds_per_edit) == (3, 10, 4.0)
    assert run.seconds_left == found.seconds_left == 28.0


def test_planned_jobs_are_pending_until_they_begin_and_failed_where_they_had_no_folder(tmp_path: Path) -> None:
    plan = Sweep.begin(tmp_path, "", [["editor=rome"], ["editor=memit"], ["editor=emmet"]])
    assert set(states(survey(tmp_path)).values()) == {"pending"}
    plan.write(0, JobNote())
    plan.fail(1, ConfigError("no such layer"))
    found = survey(tmp_path)
    assert states(found) == {"editor=rome": "running", "editor=memit": "failed", "editor=emmet": "pending"}
    (failed,) = [run for run in found.runs if run.state == "failed"]
    assert failed.reason == "ConfigError: no such layer"
    assert failed.command == "errata bench editor=memit"


@pytest.mark.parametrize("said", [{}, {"command": 3, "jobs": []}, {"command": "x", "jobs": [3]}])
def test_a_plan_or_a_note_that_nobody_can_read_is_passed_over(said: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "x").mkdir(parents=True)
    (tmp_path / "sweeps" / "x" / "plan.json").write_text(json.dumps(said))
    assert survey(tmp_path).runs == []
    plan = Sweep.begin(tmp_path, "", [["editor=rome"]])
    (plan.folder / "0.json").write_text(json.dumps({"something": "else"}))
    assert states(survey(tmp_path)) == {"editor=rome": "pending"}


def test_a_job_whose_process_is_gone_before_its_run_had_a_folder_is_stopped(tmp_path: Path) -> None:
    plan = Sweep.begin(tmp_path, "", [["editor=rome"], ["editor=memit"], ["editor=emmet"]])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    plan.write(0, JobNote.begun())
    plan.write(1, dataclasses.replace(JobNote.begun(), process=gone.pid))
    plan.write(2, dataclasses.replace(JobNote.begun(), process=gone.pid, host="elsewhere"))
    assert states(survey(tmp_path)) == {"editor=rome": "running", "editor=memit": "stopped", "editor=emmet": "running"}


def test_looking_changes_nothing_and_makes_no_file(folder: RunFolder) -> None:
    with at_work(folder):
        pass
    Sweep.begin(folder.path.parent, "", [["editor=rome"]])
    before = {path: path.stat().st_mtime_ns for path in folder.path.parent.rglob("*") if path.name != ".lock"}
    survey(folder.path.parent)
    after = {path: path.stat().st_mtime_ns for path in folder.path.parent.rglob("*") if path.name != ".lock"}
    assert before == after


def test_a_run_that_begins_while_somebody_looks_is_not_turned_away(folder: RunFolder) -> None:
    from filelock import FileLock

    with folder.opened():
        pass
    looking = FileLock(folder.path / ".lock", thread_local=False)
    looking.acquire()
    threading.Timer(0.2, looking.release).start()
    with folder.opened():
        pass


def test_status_shows_states_reasons_and_commands_or_json(tmp_path: Path) -> None:
    plan = Sweep.begin(tmp_path, "", [["editor=rome"], ["editor=memit"]])
    plan.fail(1, ConfigError("no such layer"))
    shown = run("status", str(tmp_path))
    assert "1 failed, 1 pending" in shown
    assert "again  errata bench editor=memit" in shown
    found = json.loads(run("status", str(tmp_path), "--json"))
    assert found["counts"] == {**dict.fromkeys(STATES, 0), "failed": 1, "pending": 1}
    with pytest.raises(ConfigError, match="which is none"):
        run("status", str(tmp_path / "absent"))
