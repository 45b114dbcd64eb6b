"""Sweeps: what was planned, what became of it, and what goes on after a failure, a kill or a second launch."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import errata
from errata.benchmarks import bench
from errata.benchmarks.bench.compose import _composed, choices, compose
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.job_plan import expand, refuse_repeats
from errata.benchmarks.runs import run_status
from errata.benchmarks.runs.hydra_grammar import typed
from errata.benchmarks.runs.run_folder import RunFolder
from errata.benchmarks.runs.status import STATES, RunsStatus, survey
from errata.benchmarks.runs.stopping import Stop
from errata.benchmarks.runs.sweeps import JobNote, Sweep
from errata.cli import gpus, main, overrides, sweep_jobs
from errata.editors.core.errors import ConfigError

QUICK = ["device=cpu", "editor.v_num_grad_steps=2", "editor.mom2_adjustment=false", "generation.tokens=0"]
QUICK += ["generation.fluency_tokens=0", "collapse.n_texts=2", "collapse.known_facts=0"]


def errata_says(*arguments: str, code: int = 0) -> str:
    console = Console(file=(out := io.StringIO()), width=200)
    assert main.run(list(arguments), console, console) == code, out.getvalue()
    return out.getvalue()


@contextmanager
def at_work(folder: RunFolder, *, edits: int = 4) -> Iterator[None]:
    """A run, as `bench.carry_out` marks it."""
    with folder.opened(), run_status.marked(folder, command="errata bench x", names={}, edits=edits):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.at(tmp_path, "rome-world", {"a": 1})
    folder.path.mkdir()
    return folder


# --- the plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        ["editor=rome,memit", "n_edits=2"],
        ["dataset=world,zsre", "editor=rome,memit", "++editor.v_lr=0.1,0.2"],
        ["editor=rome,memit", "editor=emmet"],
        ["editor.layers=[1],[2,3]", "hydra.sweeper.max_batch_size=2"],
        ["out='a,b'", "seed=range(3)"],
    ],
)
def test_jobs_are_planned_in_hydras_order(lines: list[str]) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    plain = [line for line in lines if not line.startswith("hydra.")]
    theirs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(plain), None)
    assert expand(lines) == theirs[0]


@pytest.mark.parametrize(
    "argument", ["out=a b/c's, ü", "model.name=it's/x", "editor.v_lr=0.1", "n_edits=3", "out=null"]
)
def test_an_override_is_typed_again_as_it_was(argument: str) -> None:
    (line,) = overrides.translated([argument], "bench")
    assert typed(line) == argument
    assert overrides.translated([typed(line)], "bench") == [line]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["protocol=batch", "batch_size=1,2"], "batch_size=1, 2 would be one run 2 times, since protocol=batch"),
        (["batch_size=1,2", "protocol=sequential,batch"], "protocol=batch"),
        (
            ["editor=memit,emmet", "batch_size=1,8,64", "experiment=testbed/batch_size_study", "protocol=batch"],
            "1, 8, 64",
        ),
        (["seed=0,1,0"], "says one run 2 times: seed=0"),
        (["protocol=batch", "batch_size=4,4"], "says one run 2 times"),
    ],
)
def test_a_sweep_that_says_one_run_twice_is_refused_before_it_begins(
    lines: list[str], message: str, tmp_path: Path
) -> None:
    said = [*overrides.translated(lines, "bench", sweep=True), f"out={tmp_path}"]
    with pytest.raises(ConfigError, match=message):
        sweep_jobs.multirun(said, "errata bench -m", Stop())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "lines",
    [
        ["protocol=sequential,single", "batch_size=1,2"],
        ["protocol=batch", "editor=memit,emmet", "batch_size=2"],
        ["experiment=testbed/batch_size_study", "editor=memit,emmet", "batch_size=1,8"],
    ],
)
def test_batches_of_several_sizes_are_as_many_runs_where_a_size_means_something(lines: list[str]) -> None:
    refuse_repeats(expand(overrides.translated(lines, "bench", sweep=True)))


@pytest.mark.parametrize("line", ["hydra.sweeper.params.seed='1,2'", "+hydra.sweeper.params={seed:'1,2'}"])
def test_values_in_the_sweepers_own_parameters_are_refused_since_the_plan_would_not_have_them(line: str) -> None:
    with pytest.raises(ConfigError, match="give the values themselves"):
        overrides.translated([line], "bench", sweep=True)


def test_a_plan_comes_back_as_it_was_written_and_forgets_earlier_notes(tmp_path: Path) -> None:
    jobs = [["editor=rome", "n_edits=2"], ["editor=memit", "n_edits=2"]]
    first = Sweep.begin(tmp_path, "errata bench -m", jobs)
    first.write(0, JobNote(run="x", has_ended=True))
    first.fail(1, ConfigError("no"))
    assert Sweep.read(first.folder) == first
    assert [first.note(place) is None for place in range(2)] == [False, False]
    again = Sweep.begin(tmp_path, "errata bench -m", jobs)
    assert again == first
    assert again.note(0) is None
    assert again.name(1) == "editor=memit"
    assert again.again(1) == "errata bench editor=memit n_edits=2"


# --- status -------------------------------------------------------------------------------------------------------


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
    shown = errata_says("status", str(tmp_path))
    assert "1 failed, 1 pending" in shown
    assert "again  errata bench editor=memit" in shown
    found = json.loads(errata_says("status", str(tmp_path), "--json"))
    assert found["counts"] == {**dict.fromkeys(STATES, 0), "failed": 1, "pending": 1}
    with pytest.raises(ConfigError, match="which is none"):
        errata_says("status", str(tmp_path / "absent"))


# --- launched -----------------------------------------------------------------------------------------------------


def test_a_sweep_goes_on_after_failures_and_ends_with_their_reasons_and_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = bench.prepare

    def broken(config: BenchConfig) -> Any:
        if config.seed == 1:
            raise ZeroDivisionError("a defect")
        return prepare(config)

    monkeypatch.setattr(bench, "prepare", broken)
    arguments = ["editor.layers=[1],[99]", "seed=0,1", "n_edits=1", f"out={tmp_path}", *QUICK]
    shown = errata_says("bench", "-m", *arguments, code=1)
    assert "3 of 4 runs failed" in shown
    assert "Reliability" in shown
    for said in ("ZeroDivisionError: a defect", "ConfigError: layers", "traceback.txt"):
        assert said in shown
    assert "Traceback" not in capsys.readouterr().err
    again = [line.split("again  ")[1] for line in shown.split("runs failed")[1].splitlines() if "again  " in line]
    words = [shlex.split(line)[2:] for line in again]
    assert [compose("bench", overrides.translated(some, "bench"))["seed"] for some in words] == [1, 0, 1]
    found = survey(tmp_path)
    assert (found.count("done"), found.count("failed")) == (1, 3)


@pytest.mark.parametrize("launcher", ["submitit_local", pytest.param("joblib", marks=pytest.mark.slow)])
def test_two_workers_end_with_the_results_of_one(launcher: str, tmp_path: Path) -> None:
    arguments = ["editor=rome,r_rome", "n_edits=2", *QUICK]
    command = [sys.executable, "-m", "errata.cli.main", "bench", "-m", *arguments, f"launcher={launcher}"]
    command += [f"out={tmp_path / 'two'}", *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["two"]
    for name in ("rome", "r_rome"):
        values = compose("bench", overrides.translated([f"editor={name}", *arguments[1:]], "bench"))
        alone = bench.run(BenchConfig.of({**values, "out": str(tmp_path / "alone")}))
        records = (tmp_path / "two" / alone.name / "records.jsonl").read_bytes()
        assert records == (alone / "records.jsonl").read_bytes()


@pytest.mark.slow
def test_a_worker_that_is_killed_is_begun_again_in_the_same_sweep(tmp_path: Path) -> None:
    arguments = ["editor=rome,r_rome", "n_edits=3", *QUICK, "launcher=submitit_local", f"out={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "errata.cli.main", "bench", "-m", *arguments]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    killed = None
    while killed is None and process.poll() is None:
        for path in tmp_path.glob("out/rome-*/seconds.jsonl"):
            killed = json.loads((path.parent / "run.json").read_text())["process"]
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.02)
    assert process.wait() == 0, process.stderr and process.stderr.read()
    assert killed is not None, "nothing was killed: the test proves nothing"
    assert len(errata.load_results(tmp_path)) == 2
    runs = [json.loads(path.read_text())["process"] for path in tmp_path.glob("out/rome-*/run.json")]
    assert runs != [killed]


def test_a_sweep_that_is_stopped_begins_no_further_run_and_goes_on_with_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_out, seen = bench.carry_out, list[str]()

    def stopping(prepared: Any, *, stop: Stop, **options: Any) -> Path:
        seen.append(prepared.config.editor["name"])
        if len(seen) == 2:
            stop.request("SIGTERM")
        return carry_out(prepared, stop=stop, **options)

    arguments = ["editor=rome,r_rome,c_rome", "n_edits=1", f"out={tmp_path}", *QUICK]
    monkeypatch.setattr(bench, "carry_out", stopping)
    assert "continues where it stopped" in errata_says("bench", "-m", *arguments, code=75)
    assert seen == ["rome", "r_rome"]
    assert [survey(tmp_path).count(state) for state in ("done", "stopped", "pending", "failed")] == [1, 1, 1, 0]
    monkeypatch.undo()
    assert "Reliability" in errata_says("bench", "-m", *arguments)
    assert survey(tmp_path).count("done") == 3


def test_a_job_whose_process_is_killed_every_time_is_given_up_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(lines: Any, swept: Sweep, stop: Stop) -> None:  # noqa: ARG001
        for place in range(len(swept.jobs)):
            note = swept.note(place)
            if note is None or not note.has_ended:
                swept.write(place, JobNote())
                if place == 1:
                    raise RuntimeError("a worker was killed")
                swept.write(place, JobNote(has_ended=True))

    monkeypatch.setattr(sweep_jobs, "_launch", launch)
    found = sweep_jobs.multirun(["editor=rome,memit,emmet", f"out={tmp_path}"], "", Stop())
    notes = [found.note(place) for place in range(3)]
    assert [note is not None and note.has_ended for note in notes] == [True, True, True]
    assert [bool(note and note.failure) for note in notes] == [False, True, False]


def test_a_launcher_that_breaks_before_any_job_is_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(lines: Any, swept: Sweep, stop: Stop) -> None:  # noqa: ARG001
        raise RuntimeError("no such cluster")

    monkeypatch.setattr(sweep_jobs, "_launch", launch)
    with pytest.raises(RuntimeError, match="no such cluster"):
        sweep_jobs.multirun(["editor=rome,memit", f"out={tmp_path}"], "", Stop())


def test_every_launcher_composes_and_joblib_has_one_worker_unless_told() -> None:
    assert {"basic", "joblib", "submitit_local", "slurm"} <= set(choices("launcher"))
    for name in set(choices("launcher")) - {"ray"}:
        assert BenchConfig.of(compose("bench", [f"launcher={name}"])) == BenchConfig.of(compose("bench", []))


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray's launcher may be there")
def test_a_launcher_that_is_not_installed_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"pip install hydra-ray-launcher"):
        errata_says("bench", "-m", "launcher=ray", "editor=rome,memit")


def test_slurms_settings_reach_its_launcher() -> None:
    lines = ["launcher=slurm", "hydra.launcher.partition=gpu"]
    launcher = _composed("bench", lines, with_hydra=True)["hydra"]["launcher"]
    assert (launcher["partition"], launcher["gpus_per_node"], launcher["max_num_timeout"]) == ("gpu", 1, 20)


# --- GPUs ---------------------------------------------------------------------------------------------------------

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


# --- one job ------------------------------------------------------------------------------------------------------


def test_a_single_run_goes_to_the_launcher_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without -m, as with it: on a cluster, a run on the machine where one types is a mistake that costs a day."""
    from errata.cli import bench as command

    launched: list[list[str]] = []

    def multirun(lines: Sequence[str], typed: str, _stop: Any) -> Sweep:
        launched.append([*lines, typed])
        return Sweep.begin(tmp_path, typed, [list(lines)])

    monkeypatch.setattr("errata.cli.sweep_jobs.multirun", multirun)
    monkeypatch.setattr(command, "_one_run", lambda *_: pytest.fail("it ran on this machine"))
    for words in (["launcher=joblib", "n_edits=2"], ["hydra/launcher=joblib", "n_edits=2"]):
        errata_says("bench", *words)
    assert launched == [
        ["launcher=joblib", "n_edits=2", "errata bench launcher=joblib n_edits=2"],
        ["hydra/launcher=joblib", "n_edits=2", "errata bench hydra/launcher=joblib n_edits=2"],
    ]
    with pytest.raises(ConfigError, match="launcher=slurm"):
        errata_says("bench", "hydra.launcher.partition=gpu")
    with pytest.raises(ConfigError, match="errata bench -m experiment=testbed/butterfly"):
        errata_says("bench", "experiment=testbed/butterfly")
    assert len(launched) == 2
