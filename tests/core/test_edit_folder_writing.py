"""Folders of edits are written whole or not at all, killed or not; records that are forged are refused."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filled_ledgers import filled, noise

import errata
from errata.editors.core.errors import DamagedEditsError, ExportError, LedgerError
from errata.editors.core.files import atomic, jsonl
from errata.editors.core.ledger.entry import EditInfo
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.architecture import describe
from errata.editors.core.request import EditRequest
from errata.editors.core.storage import edit_folder as edits_module
from errata.editors.core.storage import record_format
from errata.editors.core.storage.edit_folder import Edits
from errata.editors.core.storage.journal import Journal
from errata.editors.core.storage.record_format import EDITS


@pytest.fixture
def saved(open_ledger: Any, tmp_path: Path) -> Path:
    """A folder of six edits."""
    return errata.save_edits(filled(open_ledger(torch.float32), 6).model, tmp_path / "edits")


def test_a_folder_that_is_there_is_not_written_over(saved: Path, ledger: Ledger) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ExportError, match="is there already"):
        errata.save_edits(filled(ledger, 1).model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize("stranger", [".git", "notes.txt"])
def test_a_rewrite_takes_nothing_away_that_is_not_of_edits(saved: Path, tmp_path: Path, stranger: str) -> None:
    edits = Edits.read(saved)
    (saved / stranger).mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / stranger).touch()
    for folder in (saved, tmp_path / "other"):
        with pytest.raises(ExportError, match=f"holds {stranger}"):
            edits.rewrite(folder)
        assert (folder / stranger).exists()
    (saved / stranger).rmdir()
    edits.without(edits.ids[:5]).rewrite(saved)
    assert len(Edits.read(saved)) == 1


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_failure_while_writing_leaves_nothing_of_a_new_folder_and_the_old_one_as_it_was(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    edits, calls = Edits.read(saved).without(["edit 3"]), []
    digest_of_file, write_atomically = atomic.digest_of_file, atomic.write_atomically

    def counted(function: Any) -> Any:
        def full(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == failing:
                raise OSError(28, "No space left on device")
            return function(*arguments)

        return full

    monkeypatch.setattr(atomic, "digest_of_file", counted(digest_of_file))
    monkeypatch.setattr(atomic, "write_atomically", counted(write_atomically))
    monkeypatch.setattr(edits_module.readme_card, "folder_card", counted(edits_module.readme_card.folder_card))
    for write, target in ((edits.write, tmp_path / "new"), (edits.rewrite, saved)):
        calls.clear()
        with pytest.raises(OSError, match="No space"):
            write(target)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["edits"]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_folder_that_is_rewritten_until_it_is_killed_holds_the_old_edits_or_the_new_ones(
    saved: Path, trials: Any
) -> None:
    edits, rng, found = Edits.read(saved), random.Random(0), []
    fewer = edits.without(["edit 3"])
    for _ in range(trials(12)):
        if (child := os.fork()) == 0:
            while True:
                fewer.rewrite(saved)
                edits.rewrite(saved)
        time.sleep(rng.uniform(0.001, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found.append(Edits.read(saved).ids)
    assert set(found) <= {edits.ids, fewer.ids}
    edits.rewrite(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["edits"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_rewrite_that_is_killed_leaves_the_old_edits_or_the_new_ones(
    saved: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    class Killed(BaseException):
        pass

    done: list[Path] = []
    replace = Path.replace

    def counted(path: Path, target: Any) -> Any:
        if path.parent == saved.parent and not path.name.endswith(".tmp"):
            if len(done) == renames:
                raise Killed
            done.append(path)
        return replace(path, target)

    def rmtree(*arguments: Any, **options: Any) -> None:
        if len(done) == renames == 2:
            raise Killed
        remove(*arguments, **options)

    remove = shutil.rmtree
    edits = Edits.read(saved)
    monkeypatch.setattr(Path, "replace", counted)
    monkeypatch.setattr(edits_module.shutil, "rmtree", rmtree)
    with pytest.raises(Killed):
        edits.without(["edit 3"]).rewrite(saved)
    monkeypatch.undo()
    assert len(Edits.read(saved)) == (5 if renames == 2 else 6)
    edits.without(["edit 3", "edit 4"]).rewrite(saved)
    assert Edits.read(saved).ids == ("edit 0", "edit 1", "edit 2", "edit 5")
    assert [path.name for path in saved.parent.iterdir()] == ["edits"]


def test_edits_that_are_left_out_are_as_if_they_had_never_been_made(saved: Path, open_ledger: Any, digest: Any) -> None:
    Edits.read(saved).without(["edit 1", "edit 4"]).rewrite(saved)
    ledger, other = filled(open_ledger(torch.float32), 6), open_ledger(torch.float32)
    ledger.remove_many(["edit 1", "edit 4"])
    assert digest(errata.load_ledger(saved, other.model).model) == digest(ledger.model)


def test_an_edit_is_found_by_its_id_or_its_request_s(open_ledger: Any, tmp_path: Path) -> None:
    ledger = open_ledger(torch.float32)
    request = EditRequest("The capital of {} is", "Varland", "Brast", id="varland")
    weight = describe(ledger.model).weight_name(0)
    patch = Patch({weight: LowRank(noise(32, 1, seed=0), noise(1, 128, seed=1))})
    ledger.append("a", patch, EditInfo(requests=(request,)))
    ledger.append("b", patch)
    edits = Edits.read(errata.save_edits(ledger.model, tmp_path / "edits"))
    assert edits.find("a") is edits.find("varland") is edits.entries[0]
    assert edits.entries[1].info.requests == ()
    with pytest.raises(LedgerError, match="none of the 2 edits have the id 'c'"):
        edits.find("c")
    with pytest.raises(LedgerError, match="holds 2 edits; say which by id="):
        errata.load_edit(tmp_path / "edits", ledger.model)


FORGED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no model": ({"model": None}, {}),
    "model a list": ({"model": []}, {}),
    "a name that is none": ({"model": {"name": 3}}, {}),
    "no base": ({"base": None}, {}),
    "base a list": ({"base": ["a"]}, {}),
    "an empty mark": ({"base": {"w": ""}}, {}),
    "a number of edits": ({"edits": 1}, {}),
    "edits without a digest": ({"edits": {"records": 1}}, {}),
    "meta a list": ({}, {"meta": [1]}),
    "notes a number": ({}, {"notes": 1}),
    "an id that is a number": ({}, {"id": 1}),
    "a file that is a number": ({}, {"file": 1}),
}


def forge(folder: Path, in_line: dict[str, Any], in_manifest: dict[str, Any]) -> None:
    """Change the first record and the manifest of a folder, with digests that are right again."""
    first, *rest = jsonl.read(folder / EDITS).records
    content = b"".join(jsonl.render(line) for line in ({**first, **in_line}, *rest))
    (folder / EDITS).write_bytes(content)
    edits = {"records": 1 + len(rest), "sha256": hashlib.sha256(content).hexdigest()}
    record_format.write_manifest(folder, {**record_format.read_manifest(folder), "edits": edits, **in_manifest})


@pytest.mark.parametrize("kind", FORGED)
def test_a_folder_whose_digests_are_right_and_whose_fields_are_not_is_refused(saved: Path, kind: str) -> None:
    in_manifest, in_line = FORGED[kind]
    forge(saved, in_line, in_manifest)
    with pytest.raises(DamagedEditsError):
        Edits.read(saved)


NO_EDIT: dict[str, tuple[dict[str, Any], str]] = {
    "a method without a name": ({"method": 3}, "the method by its name"),
    "no configuration": ({"config": None}, "the configuration by its fields"),
    "no reports": ({"diagnostics": None}, "a list of reports"),
    "reports that are none": ({"diagnostics": [1]}, "a list of reports"),
    "no requests": ({"requests": None}, "a list of requests"),
    "requests that are none": ({"requests": [{"prompt": "x"}]}, "subject"),
}


@pytest.mark.parametrize("kind", NO_EDIT)
def test_a_record_that_is_no_edit_is_refused_before_it_is_put_on_the_model(
    ledger: Ledger, state: Any, saved: Path, kind: str
) -> None:
    changed, said = NO_EDIT[kind]
    meta = jsonl.read(saved / EDITS).records[0]["meta"]
    forge(saved, {"meta": {**meta, **changed}}, {})
    before = state(ledger)
    with pytest.raises(LedgerError, match=rf"record 0 \(edit 0\): is no edit: .*{said}"):
        errata.load_edit(saved, ledger.model, id="edit 0")
    assert state(ledger) == before


def test_what_a_record_does_not_say_is_empty_and_what_nothing_reads_is_passed_over(saved: Path) -> None:
    forge(saved, {"meta": {"who": "a", "method": "rome"}}, {})
    first, second, *_ = Edits.read(saved).entries
    assert first.info == EditInfo("rome")
    assert second.info == EditInfo("made up", second.info.requests, {"seed": 1}, ({},))


def test_the_journal_of_a_run_is_not_written_over(ledger: Ledger, tmp_path: Path) -> None:
    filled(ledger, 2)
    journal = Journal.open(tmp_path / "journal", {"name": "a"})
    for entry in ledger.entries:
        journal.append(entry, {}, ledger)
    edits = Edits.read(tmp_path / "journal")
    with pytest.raises(ExportError, match="is the journal of a run"):
        edits.without(edits.ids[:1]).rewrite(tmp_path / "journal")
    assert len(list(Journal.open(tmp_path / "journal", {"name": "a"}).records())) == 2
