"""A run that is told to stop ends behind an edit, and the same command goes on to the same bits."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forked import ForkedProcess, command, output_of

from errata.benchmarks import bench
from errata.benchmarks.bench import baseline, checkpoints
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.runs import stopping
from errata.benchmarks.runs.partial_results import PARTS
from errata.benchmarks.runs.run_folder import RunFolder
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.editors.core.files import jsonl
from errata.editors.core.ledger.interrupts import deferred_interrupts, safe_point
from errata.editors.core.moments import collect
from errata.editors.core.storage.journal import Journal

pytestmark = pytest.mark.usefixtures("_cases_read_once", "_nothing_drawn")

OVERRIDES = (
    "editor=r_rome editor.v_num_grad_steps=3 protocol=sequential batch_size=1 n_edits=4 eval_every=2 device=cpu "
    "generation.tokens=0 generation.fluency_tokens=0 collapse.n_texts=1 collapse.known_facts=3"
)


def config(out: Path, protocol: str = "sequential", **changes: Any) -> BenchConfig:
    values: dict[str, Any] = {
        "editor": {"name": "r_rome", "v_num_grad_steps": 3},
        "model": {"name": "world"},
        "dataset": {"name": "world", "shuffle": True, "split": "test"},
        "protocol": {"name": protocol},
        "generation": {"tokens": 0, "fluency_tokens": 0},
        "collapse": {"n_texts": 1, "known_facts": 3},
        "device": "cpu",
        "n_edits": 4,
        "batch_size": 1,
        "eval_every": 2,
        "out": str(out),
    }
    return BenchConfig.of({**values, **changes})


def data(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("records.jsonl", "curve.json")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`finished(protocol)`: the folder of a run that nothing stopped."""
    out, made = tmp_path_factory.mktemp("finished"), {}

    def of(protocol: str) -> Path:
        if protocol not in made:
            made[protocol] = bench.run(config(out, protocol))
        return made[protocol]

    return of


@pytest.mark.parametrize("protocol", ["sequential", "single"])
def test_a_run_that_is_asked_to_stop_keeps_the_edit_at_hand_and_goes_on(
    protocol: str, tmp_path: Path, finished: Callable[[str], Path]
) -> None:
    stop = Stop()

    def progress(done: int, total: int, what: str) -> None:  # noqa: ARG001
        if (what, done) == ("edits", 2):
            stop.request("enough")

    with pytest.raises(Stopped, match="enough"):
        bench.run(config(tmp_path, protocol), progress=progress, stop=stop)
    folder = bench.prepare(config(tmp_path, protocol)).folder.path
    kept = (
        list(Journal(folder / "journal").records())
        if protocol == "sequential"
        else jsonl.read(folder / "records.jsonl").records
    )
    assert len(kept) == 2
    assert not (folder / "results.json").exists()
    assert bench.run(config(tmp_path, protocol)) == folder
    assert data(folder) == data(finished(protocol))


def test_a_request_is_heeded_in_a_search_and_a_time_limit_behind_it(tmp_path: Path) -> None:
    stop, steps = Stop(), []

    def progress(done: int, total: int, what: str) -> None:  # noqa: ARG001
        if what.startswith("values of 4"):
            steps.append(done)
            stop.request("SIGTERM")

    with pytest.raises(Stopped, match="SIGTERM"):
        bench.run(config(tmp_path, "single", batch_size=4), progress=progress, stop=stop)
    assert len(steps) == 1, "a batch of searches is left behind one step"
    late = Stop()
    late.limit(0)
    late.advanced()
    late.check_request()  # a limit alone lets the step be finished
    with pytest.raises(Stopped):
        late.check()


def test_a_time_limit_ends_a_run_behind_every_edit_and_it_gets_done(
    tmp_path: Path, finished: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = itertools.count()
    # A look at the clock takes a minute.
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes)))
    stopped, folder = 0, None
    while folder is None:
        try:
            folder = bench.run(config(tmp_path, time_limit=2.5))
        except Stopped as reason:
            assert "time limit of 2.5 minutes" in str(reason)
            stopped += 1
        assert stopped < 20
    assert stopped >= 3
    assert data(folder) == data(finished("sequential"))


# --- inside an evaluation -----------------------------------------------------------------------------------------


# Of the untouched model the guard, four cases, perplexity and ability; four edits; two checkpoints: each has the
# measurements of the model, one part per case, and ability.
STEPS = 7 + 4 + (1 + 2 + 1) + (1 + 4 + 1)


@pytest.fixture
def one_case_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (baseline, checkpoints):
        monkeypatch.setattr(module, "TOGETHER", 1)


def parts_of(folder: Path) -> list[tuple[int, int]]:
    """After how many edits the evaluation is that was left, and how many parts of it are done."""
    found = jsonl.read(folder / "parts.jsonl").records
    return [(found[0]["edits"], len(found))] if found else []


def starts(settings: BenchConfig, most: int) -> tuple[Path, list[tuple[int, int]], int]:
    """Start until the run is done, at most so often: its folder, what parts there were at each stop, the stops."""
    folder, seen, stopped = bench.prepare(settings).folder.path, [], 0
    for _ in range(most):
        try:
            bench.run(settings)
            break
        except Stopped:
            stopped += 1
            seen += parts_of(folder)
    return folder, seen, stopped


@pytest.mark.usefixtures("one_case_a_part")
def test_a_limit_shorter_than_an_evaluation_lands_in_it_again_and_again_and_the_run_gets_done(tmp_path: Path) -> None:
    whole = bench.run(config(tmp_path / "whole"))
    folder, seen, stopped = starts(config(tmp_path, time_limit=0), 2 * STEPS)
    assert stopped == STEPS - 1, "every start takes one step, and the last what is left"
    in_last = [done for edits, done in seen if edits == 4]
    assert in_last == [1, 2, 3, 4, 5]
    assert [done for edits, done in seen if edits == 0][:7] == [1, 2, 3, 4, 5, 6, 7]
    assert (folder / "results.json").exists()
    assert data(folder) == data(whole)
    assert (folder / "before.json").read_bytes() == (whole / "before.json").read_bytes()
    assert not (folder / "parts.jsonl").exists()


@pytest.mark.usefixtures("one_case_a_part")
def test_without_its_parts_such_a_run_would_never_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the parts are not written down."""
    append = RunFolder.append
    monkeypatch.setattr(RunFolder, "append", lambda self, name, x: None if name == PARTS else append(self, name, x))
    folder, seen, stopped = starts(config(tmp_path, time_limit=0), STEPS + 2)
    assert stopped == STEPS + 2
    assert seen == []
    assert not (folder / "results.json").exists()


@pytest.mark.usefixtures("one_case_a_part")
def test_a_request_inside_an_evaluation_costs_the_part_at_hand_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench.run(config(tmp_path / "whole"))
    ask, asked = checkpoints.Checkpoints._asked, []
    stop = Stop()

    def noted(told: checkpoints.Checkpoints, cases: Any, **how: Any) -> Any:
        asked.append([case.id for case in cases])
        stop.request("SIGTERM")
        return ask(told, cases, **how)

    monkeypatch.setattr(checkpoints.Checkpoints, "_asked", noted)
    for _ in range(20):
        stop = Stop()
        try:
            folder = bench.run(config(tmp_path), stop=stop)
            break
        except Stopped:
            pass
    assert len(asked) == 2 + 4, "no part was asked twice"
    assert data(folder) == data(whole)


def test_single_edits_get_done_under_any_limit(tmp_path: Path, finished: Callable[[str], Path]) -> None:
    whole = finished("single")  # first, so that the moments are there: collecting them takes steps of its own
    folder, _, stopped = starts(config(tmp_path, "single", time_limit=0), 20)
    # A case a step, and before them the untouched model in four.
    assert stopped == 4 + 4 - 1
    assert data(folder) == data(whole)


def test_the_hours_before_the_first_edit_can_be_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "moments"))
    stop, seen = Stop(), []

    def progress(done: int, total: int, what: str) -> None:  # noqa: ARG001
        seen.append(what)
        if what.startswith(collect.PROGRESS_LABEL):
            stop.request("no time")

    with pytest.raises(Stopped, match="no time"):
        bench.run(config(tmp_path), progress=progress, stop=stop)
    assert sum(what.startswith(collect.PROGRESS_LABEL) for what in seen) == 1


def test_sigterm_ends_the_command_with_its_own_exit_code_and_the_same_command_goes_on(
    tmp_path: Path, finished: Callable[[str], Path]
) -> None:
    folder = bench.prepare(config(tmp_path)).folder.path
    work = command("bench", *OVERRIDES.split(), f"out={tmp_path}")
    process = ForkedProcess(work, tmp_path / "first")
    journal = folder / "journal" / "edits.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.errors
    assert "the same command continues" in process.errors
    assert "Traceback" not in process.errors
    assert 1 <= len(list(Journal(folder / "journal").records())) < 4
    output_of(work, tmp_path / "again")
    assert data(folder) == data(finished("sequential"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_second_sigterm_ends_at_once() -> None:
    child = os.fork()
    if child == 0:
        with Stop().on_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_handlers_of_others_are_left_alone_and_ours_is_gone_afterwards() -> None:
    stop, told = Stop(), []
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR2)
    with stop.on_sigterm(lambda: told.append("now")):
        assert signal.getsignal(signal.SIGUSR2) is before[1]
        os.kill(os.getpid(), signal.SIGTERM)
    assert told == ["now"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR2)) == before
    with pytest.raises(Stopped, match="SIGTERM"):
        stop.check()

    def own(*_: Any) -> None:
        pass

    signal.signal(signal.SIGTERM, own)
    try:
        with Stop().on_sigterm():
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_no_file_of_the_package_takes_the_signal_by_which_submitit_requeues() -> None:
    """Of the package, only the ledger knows SIGUSR2: it delays a handler that is there, and hands the signal to it."""
    root = Path(bench.__file__).resolve().parents[2]
    sources = [
        path for folder in ("editors", "benchmarks", "evaluate", "src") for path in (root / folder).rglob("*.py")
    ]
    assert len(sources) > 50
    assert [path.name for path in sources if "SIGUSR2" in path.read_text(encoding="utf-8")] == ["interrupts.py"]


def test_the_handler_by_which_submitit_requeues_waits_for_a_safe_point_and_stays() -> None:
    passed: list[str] = []

    def requeue(*_: object) -> None:  # raises, as submitit's handler does
        raise SystemExit

    before = signal.getsignal(signal.SIGUSR2)
    with deferred_interrupts():
        assert signal.getsignal(signal.SIGUSR2) is before
    signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit), deferred_interrupts():
            signal.raise_signal(signal.SIGUSR2)
            passed.append("waited")
            safe_point()
            passed.append("lost")
        assert passed == ["waited"]
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)
