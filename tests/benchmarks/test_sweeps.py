"""Sweeps: what was planned, what became of it, and what goes on after a failure, a kill or a second launch."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from forked import ForkedProcess
from typed_commands import run

import errata
from errata.benchmarks import bench
from errata.benchmarks.bench.compose import _composed, choices, compose
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.job_plan import expand, refuse_repeats
from errata.benchmarks.runs.hydra_grammar import typed
from errata.benchmarks.runs.status import survey
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.benchmarks.runs.sweeps import JobNote, Sweep
from errata.cli import overrides, sweep_jobs
from errata.editors.core.errors import ConfigError

pytestmark = pytest.mark.usefixtures("_nothing_drawn")

QUICK = ["device=cpu", "editor.v_num_grad_steps=2", "editor.mom2_adjustment=false", "generation.tokens=0"]
QUICK += ["generation.fluency_tokens=0", "collapse.n_texts=2", "collapse.known_facts=0"]


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


def test_a_job_alone_in_its_sweep_is_called_by_its_first_override(tmp_path: Path) -> None:
    assert Sweep.begin(tmp_path, "errata bench -m", [["editor=rome", "n_edits=2"]]).name(0) == "editor=rome"


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
    shown = run("bench", "-m", *arguments, code=1)
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


def as_fork(folder: Path, **_: Any) -> ForkedProcess:
    """In place of submitit's controller with a new interpreter: the job of the folder, carried out by a fork."""
    from submitit.core.submission import process_job

    def work() -> None:
        told = {"JOB_ID": os.getpid(), "NTASKS": 1, "JOB_NUM_NODES": 1, "NODEID": 0, "GLOBALID": 0, "LOCALID": 0}
        os.environ.update({f"SUBMITIT_LOCAL_{name}": str(value) for name, value in told.items()})
        os.environ["SUBMITIT_EXECUTOR"] = "local"
        process_job(folder)

    folder.mkdir(parents=True, exist_ok=True)
    return ForkedProcess(work, folder / f"fork-{uuid.uuid4().hex}")


@pytest.mark.parametrize(
    ("launcher", "is_cold"),
    [
        ("submitit_local", False),
        pytest.param("submitit_local", True, marks=pytest.mark.slow),
        pytest.param("joblib", True, marks=pytest.mark.slow),
    ],
)
def test_two_workers_end_with_the_results_of_one(
    launcher: str, is_cold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold workers are new interpreters of the launcher's own."""
    if not is_cold:
        monkeypatch.setattr("submitit.local.local.start_controller", as_fork)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    arguments = ["editor=rome,r_rome", "n_edits=2", *QUICK]
    more = [f"out={tmp_path / 'two'}", *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else [])]
    run("bench", "-m", *arguments, f"launcher={launcher}", *more)
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
    assert "continues where it stopped" in run("bench", "-m", *arguments, code=75)
    assert seen == ["rome", "r_rome"]
    assert [survey(tmp_path).count(state) for state in ("done", "stopped", "pending", "failed")] == [1, 1, 1, 0]
    monkeypatch.undo()
    assert "Reliability" in run("bench", "-m", *arguments)
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


def test_a_job_that_is_begun_again_keeps_the_folder_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that Slurm requeues: `errata status` listed it twice, as stopped and as running, until it had loaded."""
    (tmp_path / "rome").mkdir()
    (tmp_path / "rome" / "run.json").write_text("{}")
    sweep = Sweep.begin(tmp_path, "", [["editor=rome"]])
    sweep.write(0, JobNote(run="rome"))
    listed: list[str] = []

    def prepare(_: BenchConfig) -> None:
        listed.extend(run.name for run in survey(tmp_path).runs)
        raise Stopped

    monkeypatch.setattr(bench, "prepare", prepare)
    sweep_jobs.job(compose("bench", [f"out={tmp_path}"]), sweep, 0, Stop())
    assert listed == ["rome"]


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
        run("bench", "-m", "launcher=ray", "editor=rome,memit")


def test_slurms_settings_reach_its_launcher() -> None:
    lines = ["launcher=slurm", "hydra.launcher.partition=gpu"]
    launcher = _composed("bench", lines, with_hydra=True)["hydra"]["launcher"]
    assert (launcher["partition"], launcher["gpus_per_node"], launcher["max_num_timeout"]) == ("gpu", 1, 20)


def test_what_slurm_refuses_is_a_mistake_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a traceback of submitit's, and a defect of errata by its exit code."""
    for name in ("srun", "sbatch"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho 'sbatch: error: Invalid partition name specified' >&2\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="takes no job: sbatch: error: Invalid partition name"):
        sweep_jobs.multirun(["launcher=slurm", f"out={tmp_path}"], "", Stop())


def test_a_limit_within_slurms_warning_is_refused() -> None:
    """Slurm would give each run the signal as it begins, 20 times, with two minutes between."""
    with pytest.raises(ConfigError, match=r"timeout_min=2 is too short: Slurm requeues each run 120 seconds"):
        sweep_jobs.multirun(["editor=rome,memit", "launcher=slurm", "hydra.launcher.timeout_min=2"], "", Stop())


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
        run("bench", *words)
    assert launched == [
        ["launcher=joblib", "n_edits=2", "errata bench launcher=joblib n_edits=2"],
        ["hydra/launcher=joblib", "n_edits=2", "errata bench hydra/launcher=joblib n_edits=2"],
    ]
    with pytest.raises(ConfigError, match="launcher=slurm"):
        run("bench", "hydra.launcher.partition=gpu")
    with pytest.raises(ConfigError, match="errata bench -m experiment=testbed/butterfly"):
        run("bench", "experiment=testbed/butterfly")
    assert len(launched) == 2


def test_a_run_that_fails_does_not_stop_the_others_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from errata.cli import main

    arguments = ["editor.layers=[99],[1]", "editor.v_num_grad_steps=2", "n_edits=1", "device=cpu", f"out={tmp_path}"]
    arguments += ["generation.tokens=0", "generation.fluency_tokens=0", "collapse.n_texts=2", "collapse.known_facts=0"]
    monkeypatch.setattr(sys, "argv", ["errata", "bench", "-m", *arguments])
    assert main.main() == 2
    captured = capsys.readouterr()
    assert "Reliability" in captured.out
    assert "layers" in captured.err
    assert "Traceback" not in captured.err
    assert len(errata.load_results(tmp_path)) == 1
