"""A run knows its own files: another writer is noticed, and so is every file that another run wrote."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.benchmarks import bench
from errata.benchmarks.bench import protocols
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.runs.run_folder import DONE, LOCK, RECORDS, RunFolder
from errata.benchmarks.runs.status import is_held
from errata.editors.core.errors import ConfigError, OtherWriterError, StorageWarning
from errata.editors.core.files import jsonl, locks

pytestmark = pytest.mark.usefixtures("_nothing_drawn")

SETTINGS = {"editor": "rome", "seed": 0}

# Holds the folder of a run, adds records to it, and says what came of it.
SECOND = """
import json, platform, sys, warnings
from errata.benchmarks.runs.run_folder import RunFolder
if sys.argv[2] != "here":
    platform.node = lambda: sys.argv[2]
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    try:
        with RunFolder.at(sys.argv[1], "run", {"editor": "rome", "seed": 0}).opened() as folder:
            folder.records("records.jsonl")
            folder.append("records.jsonl", {"case": "of the second"})
        outcome = "appended"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
print(json.dumps({"outcome": outcome, "warnings": [str(one.message) for one in caught]}))
"""


@pytest.fixture(scope="module")
def flock_that_locks_nothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None or sys.platform != "linux":
        pytest.skip("needs gcc and LD_PRELOAD")
    folder = tmp_path_factory.mktemp("flock")
    (folder / "flock.c").write_text("int flock(int fd, int operation) { return 0; }\n")
    command = ["gcc", "-shared", "-fPIC", "-o", str(folder / "flock.so"), str(folder / "flock.c")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "flock.so"


def second_process(out: Path, host: str, library: Path) -> dict[str, Any]:
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    command = [sys.executable, "-c", SECOND, str(out), host]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def test_where_flock_locks_nothing_a_second_process_of_this_machine_is_refused(
    tmp_path: Path, flock_that_locks_nothing: Path
) -> None:
    folder = RunFolder.at(tmp_path, "run", SETTINGS)
    with folder.opened():
        folder.records(RECORDS)
        found = second_process(tmp_path, "here", flock_that_locks_nothing)
        assert found["outcome"].startswith("ConfigError: another process")
        assert f"process {os.getpid()} on {platform.node()}" in found["outcome"]
        folder.append(RECORDS, {"case": "1"})
    assert folder.records(RECORDS) == [{"case": "1"}]


def test_where_locks_do_not_reach_other_hosts_both_hear_of_each_other_and_the_first_stops(
    tmp_path: Path, flock_that_locks_nothing: Path
) -> None:
    folder = RunFolder.at(tmp_path, "run", SETTINGS)
    with folder.opened():
        folder.records(RECORDS)
        folder.append(RECORDS, {"case": "1"})
        found = second_process(tmp_path, "elsewhere", flock_that_locks_nothing)
        assert found["outcome"] == "appended"
        assert any(f"on {platform.node()} has worked" in text for text in found["warnings"])
        written = (folder.path / RECORDS).read_bytes()
        with pytest.raises(OtherWriterError, match=r"records\.jsonl is not as this process left it"):
            folder.append(RECORDS, {"case": "2"})
        with pytest.raises(OtherWriterError):
            folder.records(RECORDS)
        assert (folder.path / RECORDS).read_bytes() == written


def test_appending_notices_a_file_that_is_longer_shorter_or_another(tmp_path: Path) -> None:
    folder = RunFolder.at(tmp_path, "run", SETTINGS)
    with folder.opened():
        for name, change in {
            "longer": lambda content: content + jsonl.render({"case": "3"}),
            "shorter": lambda content: content[: len(content) // 2],
            "another": lambda content: content[:-10] + b"0" * 10,
            "gone": lambda _: None,
        }.items():
            folder.append(f"{name}.jsonl", {"case": "1"})
            path = folder.path / f"{name}.jsonl"
            changed = change(path.read_bytes())
            path.unlink() if changed is None else path.write_bytes(changed)
            with pytest.raises(OtherWriterError, match="another process"):
                folder.append(f"{name}.jsonl", {"case": "2"})


# --- marks --------------------------------------------------------------------------------------------------------


def mark(folder: RunFolder, host: str, process: int) -> Path:
    folder.path.mkdir(exist_ok=True)
    path = locks.owner_file(folder.path / LOCK)
    path.write_text(json.dumps({"host": host, "process": process, "started": None}))
    return path


def ended_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_a_finished_run_loses_the_mark_of_a_process_that_was_killed_behind_its_end(tmp_path: Path) -> None:
    settings = config(tmp_path, n_edits=1, protocol={"name": "single"})
    folder = bench.prepare(settings).folder
    bench.run(settings)
    path = mark(folder, platform.node(), ended_process())
    bench.run(settings)
    assert not path.exists()
    mark(folder, platform.node(), os.getpid())  # of a process that is at work
    bench.run(settings)
    assert path.exists()


def test_a_mark_of_another_host_is_told_and_one_that_a_kill_left_is_not(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = RunFolder.at(tmp_path, "run", SETTINGS)
    path = mark(folder, platform.node(), ended_process())
    with folder.opened():
        assert locks.Owner.read(path) == locks.Owner.this()
    assert not path.exists()
    mark(folder, "elsewhere", 1)
    os.utime(path, (1, 1))  # not renewed for long
    with folder.opened():
        pass
    assert not [one for one in recwarn if one.category is StorageWarning]
    mark(folder, "elsewhere", 1)
    assert is_held(folder.path)
    with (
        pytest.warns(StorageWarning, match="process 1 on elsewhere has worked in .* stop one of them"),
        folder.opened(),
    ):
        pass
    assert not path.exists()


# --- records that add up ------------------------------------------------------------------------------------------

FAST = {"generation": {"tokens": 0, "fluency_tokens": 0}, "collapse": {"n_texts": 0, "known_facts": 0}}


def config(out: Path, **changes: Any) -> BenchConfig:
    values: dict[str, Any] = {
        "editor": {"name": "r_rome", "v_num_grad_steps": 2},
        "model": {"name": "world"},
        "dataset": {"name": "world", "shuffle": True},
        "protocol": {"name": "sequential"},
        "device": "cpu",
        "n_edits": 2,
        "batch_size": 1,
        "eval_every": 1,
        "out": str(out),
        **FAST,
    }
    return BenchConfig.of({**values, **changes})


def test_a_run_with_a_second_record_of_a_case_is_not_finished_and_goes_on_to_one_per_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(tmp_path, protocol={"name": "single"})
    folder = bench.prepare(settings).folder
    single = protocols.PROTOCOLS["single"]

    def and_another_writer(*arguments: Any) -> None:
        single(*arguments)
        line = (folder.path / RECORDS).read_bytes().splitlines(keepends=True)[0]
        with (folder.path / RECORDS).open("ab") as file:
            file.write(line)

    with monkeypatch.context() as patched:
        patched.setattr(protocols, "PROTOCOLS", {**protocols.PROTOCOLS, "single": and_another_writer})
        with pytest.raises(OtherWriterError):
            bench.run(settings)
    assert not (folder.path / DONE).exists()
    bench.run(settings)
    assert folder.done
    assert "is the second one of the case" in caplog.text
    records = jsonl.read(folder.path / RECORDS).records
    assert max(Counter(record["case"] for record in records).values()) == 1
    counts = json.loads((folder.path / "results.json").read_text())["counts"]
    assert (counts["edits"], counts["not_made"]) == (2, 0)


# --- files of another run -----------------------------------------------------------------------------------------


def without_key(line: bytes) -> bytes:
    record = jsonl.parse(line)
    record.pop("run", None)
    return jsonl.render(record)


def strip_keys(folder: Path) -> None:
    """Write every file of a run as older versions did, without the run's key."""
    for path in [*folder.glob("*.jsonl"), folder / "before.json"]:
        path.write_bytes(b"".join(map(without_key, path.read_bytes().splitlines(keepends=True))))
    manifest = folder / "journal" / "manifest.json"
    manifest.write_bytes(without_key(manifest.read_bytes()))


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs of other cases on one model."""
    out = tmp_path_factory.mktemp("runs")
    return bench.run(config(out)), bench.run(config(out, seed=1))


def test_every_file_of_a_run_carries_its_key(two_runs: tuple[Path, Path]) -> None:
    for folder in two_runs:
        key = (folder / DONE).read_text().splitlines()[0]
        for name in ("records.jsonl", "seconds.jsonl", "checkpoints.jsonl", "before.json"):
            assert {record["run"] for record in jsonl.read(folder / name).records} == {key[:12]}, name
        assert json.loads((folder / "journal" / "manifest.json").read_text())["run"] == key
        assert json.loads((folder / "results.json").read_text())["digests"]["settings"] == key
        assert json.loads((folder / "run.json").read_text())["run"] == key


FOREIGN = ("journal", "records.jsonl", "seconds.jsonl", "checkpoints.jsonl", "before.json")


@pytest.mark.parametrize("keyed", [True, False], ids=["with its key", "as older versions wrote it"])
def test_files_of_another_run_are_set_aside_and_made_again(
    two_runs: tuple[Path, Path], tmp_path: Path, keyed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = two_runs
    folder = shutil.copytree(own, tmp_path / own.name)
    if not keyed:
        other = shutil.copytree(other, tmp_path / "other" / other.name)
        strip_keys(other)
    # Of what has no key, times and checkpoints cannot be told apart; edits, answers and records can.
    foreign = FOREIGN if keyed else ("journal", "records.jsonl", "before.json")
    for name in (*FOREIGN, DONE, "results.json"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in foreign:
        (shutil.copytree if (other / name).is_dir() else shutil.copy)(other / name, folder / name)
    bench.run(config(tmp_path))
    for name in foreign:
        lines = "journal/edits.jsonl" if name == "journal" and not keyed else name
        assert (folder / f"{lines}.damaged").exists(), name
    assert "another run" in caplog.text or not keyed
    assert answers(folder) == answers(own)


def answers(folder: Path) -> list[Any]:
    """What a run found, without what older and newer versions write differently."""
    return [
        [
            (record["case"], record["status"], record["probes"])
            for record in jsonl.read(folder / "records.jsonl").records
        ],
        [json.loads(line)["id"] for line in (folder / "journal" / "edits.jsonl").read_text().splitlines()],
        [point["summary"] for point in jsonl.read(folder / "checkpoints.jsonl").records],
    ]


def test_a_run_without_keys_goes_on(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    own, _ = two_runs
    folder = shutil.copytree(own, tmp_path / own.name)
    strip_keys(folder)
    for name in (DONE, "results.json"):
        (folder / name).unlink()
    journal = (folder / "journal" / "edits.jsonl").read_bytes()
    bench.run(config(tmp_path))
    assert not list(folder.rglob("*.damaged*"))
    assert (folder / "journal" / "edits.jsonl").read_bytes() == journal
    assert answers(folder) == answers(own)


def test_a_journal_notices_a_second_writer(
    two_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.benchmarks.bench.sequence_log import SequenceLog

    edited: Callable[..., None] = SequenceLog.edited
    folder = bench.prepare(config(tmp_path)).folder

    def and_another_writer(self: SequenceLog, *arguments: Any) -> None:
        edited(self, *arguments)
        shutil.copy(two_runs[0] / "journal" / "edits.jsonl", folder.path / "journal" / "edits.jsonl")

    monkeypatch.setattr(SequenceLog, "edited", and_another_writer)
    with pytest.raises(OtherWriterError, match=r"edits\.jsonl"):
        bench.run(config(tmp_path))
    assert not (folder.path / DONE).exists()


def test_a_lock_of_its_own_takes_the_place_of_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = RunFolder.at(tmp_path, "run", SETTINGS)
    with pytest.warns(StorageWarning, match="has no locks"), folder.opened():
        assert is_held(folder.path)
        with pytest.warns(StorageWarning):
            refuse(folder, r"another process .* is at work")
    assert not is_held(folder.path)
    mark(folder, platform.node(), ended_process())
    with pytest.warns(StorageWarning), folder.opened():
        pass
    mark(folder, "elsewhere", 1)
    with pytest.warns(StorageWarning):
        refuse(folder, "process 1 on elsewhere")


def refuse(folder: RunFolder, match: str) -> None:
    with pytest.raises(ConfigError, match=match), folder.opened(patience=0.1):
        pass
