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
from typing import Any, cast

import pytest
from forked_ranks import in_ranks
from typed_commands import run

from errata.benchmarks.bench import execution, guard, sequence_runner, single_edits
from errata.benchmarks.bench.sequence_runner import SequenceRunner
from errata.benchmarks.runs import rank_folders
from errata.benchmarks.runs.run_folder import RunFolder
from errata.benchmarks.runs.stopping import Stop
from errata.cli import bench as cli_bench
from errata.editors.core import ranks
from errata.editors.core.errors import ConfigError, NumericalError, RanksDifferError

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


@pytest.mark.parametrize(("minutes", "stop"), [(5.0, None), (None, Stop())])
def test_ranks_take_no_limit_and_no_stop_which_each_would_heed_at_another_step(
    minutes: float | None, stop: Stop | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 2)
    model = SimpleNamespace(device_map=None)
    prepared: Any = SimpleNamespace(config=SimpleNamespace(model=model, time_limit=minutes))
    with pytest.raises(ConfigError, match="leave time_limit and stop out, and let the scheduler end the command"):
        execution.carry_out(prepared, stop=stop)


@pytest.mark.parametrize("count", ["1", "2"])
def test_sigterm_ends_a_rank_as_a_kill_does(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", count)
    seen: list[Any] = []

    def note(*_: object) -> int:
        seen.append(signal.getsignal(signal.SIGTERM))
        return 0

    monkeypatch.setattr(cli_bench, "_in_ranks", note)
    monkeypatch.setattr(cli_bench, "_one_run", note)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        run("bench", "editor=rome")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [handler is signal.SIG_DFL for handler in seen] == [count == "2"]


CASES: Any = [SimpleNamespace(id=name, request=name, further=()) for name in ("one", "other")]


def refuse(*_: object) -> Any:
    raise NumericalError("no number")


def runner_of(editor: Any) -> SequenceRunner:
    log: Any = SimpleNamespace(edits=lambda *_: iter(()))
    return SequenceRunner(bench_of(editor), cast("Any", None), log)


def bench_of(editor: Any) -> Any:
    return SimpleNamespace(editor=editor, cases=CASES, stop=Stop(), guard=SimpleNamespace(action="undo"))


def test_all_ranks_heed_the_guard_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(number: int) -> tuple[bool, list[str]]:
        reason = "passed a limit" if number == 0 else None
        monkeypatch.setattr(guard, "verdict", lambda *_: guard.Verdict(2.0, None, reason))
        undone: list[str] = []
        edit: Any = SimpleNamespace(undo=lambda: undone.append("undone"))
        return runner_of(SimpleNamespace(ledger=None))._watched(CASES, edit, []), undone

    assert in_ranks(tmp_path / "two", work) == [(False, ["undone"])] * 2


@pytest.mark.parametrize("what", ["edits", "refusals"])
def test_ranks_that_made_different_edits_all_end(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_runner, "rounds", lambda group: [group])

    def work(number: int) -> list[str]:
        def make(*_: object) -> Any:
            return refuse() if what == "refusals" and number == 1 else [SimpleNamespace(id=f"edit of {number}")]

        editor = SimpleNamespace(
            ledger=None, apply=lambda *_: make()[0], compute=make, closed=lambda edit: edit, compute_together=refuse
        )
        said = []
        for take in (
            lambda: runner_of(editor)._attempt(CASES),
            lambda: list(single_edits._attempts(bench_of(editor), CASES)),
        ):
            with pytest.raises(RanksDifferError) as caught:
                take()
            said.append(str(caught.value).partition(";")[0])
        return said

    reason = "the processes of this run have made different edits: 1 not those of 0"
    assert in_ranks(tmp_path / "two", work) == [[reason] * 2] * 2


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
