"""`errata steer`: makes an edit of a behaviour, measures it, writes both, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typed_commands import run

import errata
from errata import models
from errata.editors.core.errors import ConfigError, DatasetError

CAA = ("contrast=formal", "layer=3", "text_tokens=40")


pytestmark = pytest.mark.usefixtures("world_loaded_once")


def typed(*words: str) -> str:
    return run("steer", "model=world", *words)


@pytest.mark.usefixtures("_nothing_rendered")
def test_an_edit_is_made_measured_and_written(tmp_path: Path) -> None:
    words = ("strength=2", "strengths=-1,2", f"out={tmp_path / 'edit'}", f"report={tmp_path / 'report'}")
    shown = typed(*CAA, *words, "random=2", "instruction=Answer formally.")
    names = [line.split("  ")[0] for line in shown.splitlines() if "%" in line]
    assert names == ["steered", "untouched", "steered", "2 random directions", "2 random directions", "instruction"]
    written = json.loads((tmp_path / "report" / "behaviour.json").read_text())
    assert [point["strength"] for point in written["steered"]] == [-1, 0, 2]
    assert (written["n"], written["settings"]["learnt_from"]) == (24, 24)
    assert [(each["strength"], each["seeds"]) for each in written["random_directions"]] == [
        (-1, [0, 1]),
        (2, [0, 1]),
    ]
    assert written["random_directions"][0]["effect"]["n"] == 2
    assert written["prompted"]["drift"]["kl"] > 0
    assert written["steered"][0]["drift"]["kl"] > 0 == written["steered"][1]["drift"]["kl"]
    assert (tmp_path / "report" / "behaviour.png").read_bytes()
    model, _ = models.load("world")
    edit = errata.load_edit(tmp_path / "edit", model)
    assert edit.derived["numbers"]["strength"] == 2
    edit.undo()
    with pytest.raises(ConfigError, match="exists already"):
        typed(*CAA, f"out={tmp_path / 'edit'}")


def test_kinds_positions_and_json() -> None:
    few = ("contrast=formal", "text_tokens=0", "random=0", "--json")
    ablated = json.loads(typed(*few, "kind=ablate"))
    assert [point["strength"] for point in ablated["steered"]] == [0, 1]
    assert ablated["random"] == []
    added = json.loads(typed("kind=actadd", "plus= love", "minus= hate", "layer=2", "--json"))
    assert (added["n"], added["steered"]) == (0, [])


@pytest.mark.parametrize(
    ("error", "words", "told"),
    [
        (ConfigError, (), "expected contrast=FILE"),
        (ConfigError, ("contrast=formal", "kind=cca"), "did you mean 'caa'"),
        (DatasetError, ("contrast=formel",), "no such file"),
        (ConfigError, (*CAA, "strength=strong"), "strength: expected a number"),
        (ConfigError, (*CAA, "kind=ablate", "strength=2"), "has no strength"),
        (ConfigError, (*CAA, "positions=last", "start=2"), "goes with positions=span"),
        (ConfigError, (*CAA, "plus=a"), "goes with kind=actadd"),
        (ConfigError, ("kind=actadd", "plus=a"), "give plus= and minus="),
        (ConfigError, ("kind=actadd", "plus=a", "minus=b", "report=there"), "contrasts to measure on"),
        (ConfigError, (*CAA, "random=few"), "random: expected a number"),
        (ConfigError, ("contrast=formal", "layer=99"), "layer: expected 0 to"),
        (ConfigError, ("contrast=formal", "kind=surgery", "layer=1"), "takes no layer"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(error: type[Exception], words: tuple[str, ...], told: str) -> None:
    with pytest.raises(error, match=told):
        typed(*words)
