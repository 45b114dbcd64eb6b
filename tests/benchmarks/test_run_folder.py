"""The run store: whole files or none, records that survive a kill, and names that never leave the run's folder."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import escaping_names
import pytest
from forked import output_of
from hypothesis import given
from hypothesis import strategies as st

import errata
from errata.benchmarks.runs.json_values import digest, encodable, number
from errata.benchmarks.runs.run_folder import RunFolder, slug
from errata.editors.core.errors import ConfigError
from errata.editors.core.files.atomic import write_atomically

NAMES = {"editor": "rome", "model": "world", "dataset": "world", "protocol": "single"}
SETTINGS = {"editor": "rome", "seed": 0}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.at(tmp_path, "rome-world", SETTINGS)
    folder.path.mkdir()
    return folder


# --- names --------------------------------------------------------------------------------------------------------

HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "a\x00b",
    "x" * 300,
    "..",
    ".",
    "",
    "~",
    "con",
    "a/../../b",
    "ü/é",
    "\u202egnp",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_stays_in_the_folder(tmp_path: Path, name: str) -> None:
    path = RunFolder.at(tmp_path, name, SETTINGS).path
    assert path.parent == tmp_path
    path.mkdir()
    assert path.resolve().parent == tmp_path.resolve()


@given(st.text())
def test_a_slug_is_a_plain_short_file_name(text: str) -> None:
    name = slug(text)
    assert name == Path(name).name
    assert name.isascii()
    assert not name.startswith((".", "-"))
    assert 0 < len(name) <= 60


def test_whatever_names_and_ids_say_nothing_is_written_outside_the_folder_of_runs(
    tmp_path: Path, trials: Callable[..., int], tried: Callable[..., None]
) -> None:
    """Every file that a process opens to write, makes or renames, as an audit hook of Python sees it."""

    def outcome(count: int, *more: str) -> dict[str, Any]:
        folder = tmp_path / "-".join(["trials", *more])
        folder.mkdir()
        work = functools.partial(escaping_names.main, folder, count, is_control=more == ("control",))
        return json.loads(output_of(work, tmp_path / folder.name))

    count = trials(90, 10_000)
    found, control = outcome(count), outcome(90, "control")
    tried(10, count, **{name: found[name] for name in ("written", "outside", "refused", "kinds")}, control=control)
    assert found["outside"] == 0, found["examples"]
    assert sum(found["kinds"].values()) == found["trials"] == count
    assert found["written"] > 10 * (count - found["refused"])
    # Links are refused, and what no folder can be called.
    assert 2 * (count // 9) <= found["refused"] < count / 2
    assert control["outside"] > 0, "names taken as they are led nowhere: the trials prove nothing"


def test_a_run_that_is_or_holds_a_link_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    (folder.path / "records.jsonl").symlink_to(target)
    with pytest.raises(ConfigError, match=r"records\.jsonl is a link"), folder.opened():
        pass
    (folder.path / "records.jsonl").unlink()
    folder.path.rename(target)
    folder.path.symlink_to(target, target_is_directory=True)
    with pytest.raises(ConfigError, match="is a link"), folder.opened():
        pass
    assert list(target.iterdir()) == []


def test_no_file_of_a_run_can_be_named_out_of_its_folder(folder: RunFolder) -> None:
    for name in ("../x", "/x", "a/b", ".hidden", ""):
        with pytest.raises(ValueError, match="plain file name"):
            folder.write_text(name, "x")
    assert list(folder.path.iterdir()) == []


def test_different_settings_have_different_folders_and_the_order_of_keys_does_not_matter(tmp_path: Path) -> None:
    one = RunFolder.at(tmp_path, "x", {"a": 1, "b": 2})
    same = RunFolder.at(tmp_path, "x", {"b": 2, "a": 1})
    other = RunFolder.at(tmp_path, "x", {"a": 1, "b": 3})
    assert one == same
    assert one.path != other.path


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_infinite_numbers_survive_strict_json() -> None:
    text = json.dumps(encodable({"x": [math.inf, -math.inf, math.nan, 1.5]}), allow_nan=False)
    back = [number(value) for value in json.loads(text)["x"]]
    assert back[:2] == [math.inf, -math.inf]
    assert math.isnan(back[2])
    assert back[3] == 1.5


def test_a_value_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        digest({"x": object()})


# --- records ------------------------------------------------------------------------------------------------------


def test_records_come_back_as_written(folder: RunFolder) -> None:
    rows = [{"case": "é\n\u2028", "nll": 0.1 + 0.2}, {"case": "2", "nll": None}]
    for row in rows:
        folder.append("records.jsonl", row)
    assert folder.records("records.jsonl") == rows


def test_a_torn_last_line_is_cut_off_at_every_length(folder: RunFolder) -> None:
    folder.append("records.jsonl", {"case": "1"})
    first = folder.file("records.jsonl").read_bytes()
    folder.append("records.jsonl", {"case": "2"})
    both = folder.file("records.jsonl").read_bytes()
    for length in range(len(first), len(both)):
        folder.file("records.jsonl").write_bytes(both[:length])
        assert folder.records("records.jsonl") == [{"case": "1"}]
        folder.append("records.jsonl", {"case": "2"})
        assert folder.file("records.jsonl").read_bytes() == both


def test_from_a_damaged_line_on_records_are_given_up_with_a_warning_and_the_file_is_set_aside(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    for case in ("1", "2", "3"):
        folder.append("records.jsonl", {"case": case})
    path = folder.file("records.jsonl")
    damaged = path.read_bytes().replace(b'"2"', b'"4"')
    path.write_bytes(damaged)
    assert folder.records("records.jsonl") == [{"case": "1"}]
    assert "line 2" in caplog.text
    assert path.with_name("records.jsonl.damaged").read_bytes() == damaged
    folder.append("records.jsonl", {"case": "2"})
    assert folder.records("records.jsonl") == [{"case": "1"}, {"case": "2"}]


# --- done, locked -------------------------------------------------------------------------------------------------


def test_done_means_these_settings_were_finished(folder: RunFolder) -> None:
    assert not folder.done
    folder.finish()
    assert folder.done
    assert not RunFolder(folder.path, digest({"editor": "other"})).done


def test_two_processes_never_share_a_run(folder: RunFolder) -> None:
    with folder.opened(), pytest.raises(ConfigError, match="another process"), folder.opened():
        pass
    with folder.opened():
        pass


def test_a_folder_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="out="), RunFolder.at(tmp_path / "file", "x", SETTINGS).opened():
        pass


# --- kills --------------------------------------------------------------------------------------------------------

# One process forks a writer per trial, kills it after a random while and reads what it left. The control writes in
# place: if its files never came out torn, the kills would not have landed where they matter.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
from errata.editors.core.files.atomic import write_atomically

def in_place(path, content):
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), 4096):
            file.write(content[start:start + 4096])

write = {"atomic": write_atomically, "control": in_place}[sys.argv[2]]
path, rng = Path(sys.argv[1]) / "results.json", random.Random(0)
partial = landed = reads = between = 0
contents = [json.dumps({"step": i, "filler": "x" * 200_000}).encode() for i in range(2)]
for trial in range(int(sys.argv[3])):
    write_atomically(path, contents[0])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"!")
        while True:
            for content in contents:
                write(path, content)
    os.read(reader, 1)
    polls = rng.randrange(1, 6)
    for poll in range(polls):
        partial += path.read_bytes() not in contents
        reads += 1
        time.sleep(rng.random() * 0.004)
    os.kill(child, signal.SIGKILL)
    landed += os.waitpid(child, 0)[1] == signal.SIGKILL
    partial += path.read_bytes() not in contents
    reads += 1
    # The kill landed between the making of the temporary file and its renaming.
    left = list(path.parent.glob(".*.tmp"))
    between += bool(left)
    [each.unlink() for each in left]
    os.close(reader), os.close(writer)
print(json.dumps({"landed": landed, "within_a_write": between, "reads": reads, "partial": partial}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_leaves_no_partial_file(
    tmp_path: Path, trials: Callable[..., int], tried: Callable[..., None]
) -> None:
    def outcome(kind: str) -> dict[str, int]:
        command = [sys.executable, "-c", DRIVER, str(tmp_path), kind, str(count)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    count = trials(40, 1000)
    found, control = outcome("atomic"), outcome("control")
    tried(4, count, atomic=found, control=control)
    assert found["partial"] == 0
    assert found["landed"] == control["landed"] == count
    assert found["reads"] > count
    assert found["within_a_write"] > 0, "no kill landed while a file was being written"
    assert control["partial"] > 0, "the control was never seen torn: the kills prove nothing"


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, b"old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


# --- reading back -------------------------------------------------------------------------------------------------


def test_load_results_has_one_row_a_run_and_reads_infinity(tmp_path: Path) -> None:
    for i, perplexity in enumerate([1.5, math.inf]):
        folder = RunFolder.at(tmp_path / "deep", "x", {"i": i})
        folder.path.mkdir(parents=True)
        content = {"schema_version": 1, "names": NAMES, "collapse": {"perplexity_after": perplexity}}
        folder.write_json("results.json", content)
    table = errata.load_results(tmp_path)
    assert sorted(table["collapse.perplexity_after"]) == [1.5, math.inf]
    assert set(table["editor"]) == {"rome"}


def test_load_results_refuses_what_is_no_folder_or_no_results_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder of runs"):
        errata.load_results(tmp_path / "absent")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"results\.json"):
        errata.load_results(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema_version": 1}, "names"),
        ({"schema_version": 1, "names": {"editor": "rome"}}, "model"),
        ({"schema_version": 1, "names": NAMES, "counts": 3}, "counts"),
        ({"schema_version": 2, "names": NAMES}, "schema_version 2"),
        ([1], "no results file"),
    ],
)
def test_results_of_another_program_or_schema_are_refused_by_name(
    tmp_path: Path, content: object, message: str
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message) as caught:
        errata.load_results(tmp_path)
    assert str(path) in str(caught.value)
