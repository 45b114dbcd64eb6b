"""`errata heads`: ranks and scales heads on a dataset's facts, and writes scalings as edits."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typed_commands import run

import errata
from errata.benchmarks.tracing import head_sweeps
from errata.cli import main
from errata.editors.core.errors import ConfigError, ExportError
from errata.editors.core.locating.heads import Answer, FalseContext

FACTS = ("dataset=world_counterfact_plus", "n_facts=6", "factors=1,-2")


pytestmark = pytest.mark.usefixtures("world_loaded_once")


def typed(*words: str) -> str:
    return run("heads", "model=world", *words)


def test_facts_behind_the_last_that_is_wanted_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    conflicts = [FalseContext("q", "a", "b", name) for name in ("bad", "unknown", "known", "bad", "known")]
    said = {"unknown": "other", "known": "memory"}

    def answers(_model: Any, _tokenizer: Any, asked: Any, **_more: Any) -> list[Answer]:
        return [Answer(said[conflict.id], 0.0) for conflict in asked]

    monkeypatch.setattr(head_sweeps, "answers", answers)
    monkeypatch.setattr(head_sweeps, "_is_readable", lambda _tokenizer, conflict: conflict.id != "bad")
    tokenizer: Any = None
    found = head_sweeps.known_conflicts(None, tokenizer, conflicts, 1)
    assert (found.conflicts, found.unknown, found.unreadable) == ((conflicts[2],), 1, 1)


@pytest.mark.usefixtures("_nothing_rendered")
def test_heads_are_ranked_on_some_facts_and_scaled_on_others(tmp_path: Path) -> None:
    shown = typed(*FACTS, f"out={tmp_path}")
    report = json.loads((tmp_path / "heads.json").read_text())
    assert report["counts"] | {"ranked": 3, "measured": 3} == report["counts"]
    memory, context = (report["strongest"][side][0] for side in ("memory", "context"))
    assert memory["mean"] < 0 < context["mean"]
    assert [sweep["head"] for sweep in report["sweeps"]] == [memory["head"], context["head"]]
    plain, turned = report["sweeps"][0]["effects"]
    assert plain["remembered"]["mean"] == 1  # only facts that the model knows are asked
    assert turned["difference"]["mean"] > plain["difference"]["mean"]
    assert f"{memory['mean']:+.2f}" in shown
    assert (tmp_path / "heads.png").read_bytes()


def test_heads_can_be_chosen(world_loaded_once: Any) -> None:
    before = {name: parameter.clone() for name, parameter in world_loaded_once[0].named_parameters()}
    report = json.loads(typed(*FACTS, "heads=0.0", "--json"))
    assert [sweep["head"] for sweep in report["sweeps"]] == ["0.0"]
    assert all(bool((p == before[name]).all()) for name, p in world_loaded_once[0].named_parameters())


def test_a_scaling_is_written_as_an_edit(tmp_path: Path, world_loaded_once: Any) -> None:
    shown = typed("scale=4.0:0,3.1:-1.5", f"out={tmp_path / 'e'}")
    assert "head 4.0 times 0, head 3.1 times -1.5" in shown
    edit = errata.load_edit(tmp_path / "e", world_loaded_once[0])
    assert edit.derived["numbers"] == {"3.1": -1.5, "4.0": 0.0}
    edit.undo()
    out = io.StringIO()
    assert main.run(["list", str(tmp_path / "e")], Console(file=out, width=160), Console(file=io.StringIO())) == 0
    assert "scale_heads(" in out.getvalue()
    with pytest.raises(ExportError):
        typed("scale=4.0:0", f"out={tmp_path / 'e'}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "either dataset=NAME or scale="),
        ((*FACTS, "scale=1.1:0"), "either dataset=NAME or scale="),
        (("scale=1.1:0",), "out= is missing"),
        (("scale=1.1", "out=x"), "expected HEAD:FACTOR"),
        (("scale=1.1:x", "out=x"), "scale: expected a number"),
        (("scale=a:0", "out=x"), "scale: expected a head as LAYER.HEAD"),
        (("scale=9.0:0", "out=x"), "scale: head 9.0: expected a layer from 0 to 5"),
        ((*FACTS, "heads=0.99"), "heads: head 0.99: layer 0 has heads 0 to 3"),
        (("scale=1.1:0", "out=x", "n_facts=3"), "n_facts= goes with dataset="),
        ((*FACTS[:2], "factors=a"), "factors: expected a number"),
        ((*FACTS, "heads=1"), "LAYER.HEAD"),
        ((FACTS[0], "n_facts=1"), "n_facts: expected at least 2"),
        ((*FACTS, "dataset.split=x"), "expected dev or test"),
    ],
)
def test_what_is_missing_or_wrong_is_refused(words: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        main.run(["heads", "model=world", *words], Console(file=io.StringIO()), Console(file=io.StringIO()))
