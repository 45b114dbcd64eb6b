"""Runs, journals and folders of edits that an older version wrote are read, recognised and continued by this one.

The files in tests/data/before_rooms were written by commit 064ce53, before the modules moved to their present folders.
Its commands, with SETTINGS for the four runs:

    errata bench editor=rome dataset=world protocol=single n_edits=2 out=single         (and editor=r_rome)
    errata bench editor=alphaedit dataset=world protocol=sequential n_edits=4 batch_size=1 eval_every=2 out=whole
    the same command with out=stopped, killed when its journal held three edits
    errata apply facts.yaml editor=rome out=kept

`rome`, `ft_l` and `grace` hold the first case of the test half, saved by `Edit.save`. EXPECTED was measured by that
commit too. Pictures, report.md and locks were removed.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import errata
from errata.benchmarks.runs import environment
from errata.cli.main import main

DATA = Path(__file__).resolve().parent.parent / "data" / "before_rooms"
SETTINGS = [
    "generation.tokens=4",
    "generation.fluency_tokens=0",
    "collapse.n_texts=2",
    "collapse.known_facts=4",
    "editor.v_num_grad_steps=3",
    "dataset=world",
]
SEQUENCE = ["bench", "editor=alphaedit", "protocol=sequential", "n_edits=4", "batch_size=1", "eval_every=2", *SETTINGS]
SINGLE = ["bench", "editor=rome", "protocol=single", "n_edits=2", *SETTINGS]
RUN = "alphaedit-world-world-sequential-4-163088548915"
PROMPT = "Q: Which city is the capital of Gavaria? A:"


class Expected(NamedTuple):
    """What the older version measured with a folder of edits on the model."""

    ids: tuple[str, ...]
    weights: str  # sha256
    answer: str  # most probable token behind PROMPT
    logit: float


BASE = "df104c4267f9e0f0539d131813b226d0662f789b691cf8551abcf66b14ddea7b"
EXPECTED = {
    "rome": Expected(
        ("rome-eda3b5a39e94b434",),
        "af2925e4131debd11b41906c200a07657f77df8f8aa33029392f864512eeda42",
        " Fostwick",
        14.465774536132812,
    ),
    "ft_l": Expected(
        ("ft_l-7a04f91ae8d81932",),
        "78135a41ab30b1cef970c716145121689e3595a79df6bf42f6296f78a633105e",
        " Fostwick",
        15.263161659240723,
    ),
    "grace": Expected(("grace-c1606135374cae63",), BASE, " Fostwick", 15.10548210144043),
    "kept": Expected(
        ("rome-5d35b067e48967c4", "rome-9e44b79deaa06b68"),
        "b1c338b7a62bac9c03aee8043cc9a47d54ed5f0582fb2fe9f9558d7d2b9b0332",
        " Praminster",
        13.385187149047852,
    ),
    f"whole/{RUN}/journal": Expected(
        (
            "alphaedit-e62c1a48de312a26",
            "alphaedit-a355b0924852b28b",
            "alphaedit-09db019ff1c47659",
            "alphaedit-9dcbe15ca919fd1f",
        ),
        "acc7694b379aa46e5a9c2ad038e3819774893554eb532a71360da08e32969ee3",
        " Brulminster",
        12.086541175842285,
    ),
}

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`command(words)`: exit code and output of `errata WORDS`, beside a copy of the older files."""
    shutil.copytree(DATA, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    # The versions of packages are part of a run's name, and change with the machine.
    written_with = json.loads((DATA / "whole" / RUN / "results.json").read_bytes())["versions"]
    monkeypatch.setattr(environment, "version", written_with.__getitem__)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["errata", *words])
        capsys.readouterr()
        code = main()
        return code, capsys.readouterr().out

    yield run


def weights(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file without their digests, which differ in every last digit, the key, which is new, and what
    the report of an edit has gained since."""
    records = [{**json.loads(line), "digest": None, "run": None} for line in path.read_bytes().splitlines()]
    for record in records:
        for name in ("distance_after", "written", "doubts"):
            record.get("diagnostics", {}).pop(name, None)
    return records


def alike(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same but for last digits, which other processors round differently."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)
    return one == other


# --- edits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", EXPECTED)
def test_edits_give_the_weights_that_the_older_version_gave_bit_for_bit(folder: str) -> None:
    model, tokenizer = errata.load("world")
    assert weights(model) == BASE
    ledger = errata.load_ledger(DATA / folder, model, tokenizer)
    expected = EXPECTED[folder]
    assert tuple(entry.id for entry in ledger.entries) == expected.ids
    assert weights(model) == expected.weights
    with torch.no_grad():
        logits = model(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax().item()) == expected.answer
    assert logits.max().item() == pytest.approx(expected.logit, rel=1e-4)
    for entry in ledger.entries:
        ledger.remove(entry.id)
    assert weights(model) == BASE


@pytest.mark.parametrize("method", ["rome", "ft_l", "grace"])
def test_a_single_edit_is_loaded_and_undone(method: str) -> None:
    model, tokenizer = errata.load("world")
    edit = errata.load_edit(DATA / method, model, tokenizer)
    assert edit.id == EXPECTED[method].ids[0]
    assert weights(model) == EXPECTED[method].weights
    edit.undo()
    assert weights(model) == BASE


def test_a_damaged_byte_of_older_edits_is_noticed(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "rome", tmp_path / "rome")
    block = folder / "edits-00000.blocks"
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    block.write_bytes(content)
    with pytest.raises(errata.ErrataError):
        errata.load_edit(folder, errata.load("world")[0])


def test_the_commands_read_a_folder_of_facts(command: Command) -> None:
    code, listing = command("list", "kept")
    assert code == 0
    assert all(id_ in listing for id_ in EXPECTED["kept"].ids)
    code, checked = command("check", "kept")
    assert code == 3  # as it was when the facts were applied
    assert "1 of 2 facts hold" in checked
    before = contents(Path("kept"))
    code, applied = command("apply", "facts.yaml", "editor=rome", "out=kept")
    assert code == 0
    assert "2 unchanged" in applied
    assert "added" not in applied
    assert contents(Path("kept")) == before


def test_the_card_of_an_older_folder_is_written_anew_with_the_folder(command: Command) -> None:
    card = Path("kept/README.md")
    assert "ledger.edit(" in card.read_text(encoding="utf-8")  # which is gone
    code, _ = command("remove", "kept", f"id={EXPECTED['kept'].ids[0]}")
    assert code == 0
    assert "ledger.edit(" not in card.read_text(encoding="utf-8")
    assert "errata.load_edit(" in card.read_text(encoding="utf-8")


# --- runs -----------------------------------------------------------------------------------------------------------


def test_finished_runs_are_read(command: Command) -> None:
    table = errata.load_results(".")
    assert sorted(table["editor"]) == ["alphaedit", "r_rome", "rome"]
    assert len(table["summary.probability.reliability.mean"].dropna()) == 3
    code, compared = command("compare", "single", "rome", "r_rome")
    assert code == 0
    assert "2 cases" in compared
    code, _ = command("report", ".", "out=pages")
    assert code == 0
    assert "r-ROME" in next(Path("pages").glob("*.html")).read_text(encoding="utf-8")


def test_status_tells_finished_runs_from_a_stopped_one(command: Command) -> None:
    code, output = command("status", ".", "--json")
    assert code == 0
    states = {(Path(run["folder"]).parent.name, run["state"]) for run in json.loads(output)["runs"]}
    assert states == {("single", "done"), ("whole", "done"), ("stopped", "stopped")}


@pytest.mark.parametrize(("words", "out"), [(SINGLE, "single"), (SEQUENCE, "whole")])
def test_the_identical_command_finds_the_run_done(command: Command, words: list[str], out: str) -> None:
    before = contents(Path(out))
    code, _ = command(*words, f"out={out}")
    assert code == 0
    assert contents(Path(out)) == before


def test_the_identical_command_continues_a_stopped_run_to_the_records_of_a_whole_one(command: Command) -> None:
    stopped, whole = Path("stopped") / RUN, Path("whole") / RUN
    journal = (stopped / "journal" / "edits.jsonl").read_bytes()
    assert journal.count(b"\n") == 3
    code, _ = command(*SEQUENCE, "out=stopped")
    assert code == 0
    assert [path.name for path in Path("stopped").iterdir()] == [RUN]
    assert (stopped / "journal" / "edits.jsonl").read_bytes().startswith(journal)
    for name in ("records.jsonl", "checkpoints.jsonl"):
        assert alike(lines(stopped / name), lines(whole / name)), name
    assert alike(*(json.loads((folder / "curve.json").read_bytes()) for folder in (stopped, whole)))
    continued, undisturbed = (json.loads((folder / "results.json").read_bytes()) for folder in (stopped, whole))
    for part in ("summary", "collapse", "counts", "digests"):
        assert alike(continued[part], undisturbed[part]), part
