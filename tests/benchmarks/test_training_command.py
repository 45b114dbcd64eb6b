"""`errata train`: what it says, the command that repeats it, and how a bench finds what was trained."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from quick_training import QUICK, config
from typed_commands import run

from errata import editors, models
from errata.benchmarks import bench
from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.bench.train_config import RowsConfig, TrainConfig
from errata.benchmarks.training import train
from errata.benchmarks.training.loop import CHECKPOINT
from errata.cli import overrides
from errata.editors.core.errors import CheckpointError, ConfigError, DatasetError
from errata.editors.core.families.learned_editor import TrainedEditor, training_command
from errata.editors.core.files.tensor_cache import TensorCache


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is trained yet."""
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["mend", "malmen", "rledit"])
def test_training_on_the_testbed_is_advised_on_its_own_cases(name: str) -> None:
    method: Any = editors.get(name)
    for folder, is_testbed in ((models.locate("world"), True), (Path("elsewhere"), False)):
        advice = training_command(method, method.Config(), "world", folder)
        assert ("dataset=counterfact" not in advice) is is_testbed


# --- the command --------------------------------------------------------------------------------------------------


def flat(values: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for name, value in values.items():
        plain = value if isinstance(value, str) else json.dumps(value)  # a text is typed without quotes
        found += flat(value, f"{path}{name}.") if isinstance(value, dict) else [f"{path}{name}={plain}"]
    return found


def typed(out: Path, **values: Any) -> list[str]:
    """The quick configuration as it is typed."""
    settings = {**QUICK, **values}
    editor = {name: value for name, value in settings["editor"].items() if name != "name"}
    rest = {k: v for k, v in settings.items() if k not in ("editor", "model", "dataset")}
    return [*flat({"editor": editor}), *flat(rest), f"out={out}"]


def test_the_command_trains_says_so_and_is_printed_such_that_it_repeats(tmp_path: Path) -> None:
    shown = run("train", *typed(tmp_path))
    (folder,) = tmp_path.glob("mend-*")
    assert str(folder) in shown
    lines = [line for line in shown.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1]) for line in lines[:3]] == [2, 4, 6]
    assert all("reliability" in line and "locality" in line for line in lines)
    assert (folder / train.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert not (folder / f"{CHECKPOINT}.json").exists()
    result = train.read(folder)
    words = shlex.split(result["command"])
    assert words[:2] == ["errata", "train"]
    again = TrainConfig.of(compose("train", overrides.translated(words[2:], "train")))
    assert train.prepare(again).folder.path == folder
    assert result["counts"] == {"train": 11, "held_out": 3, "dropped": 0, "steps": 6, "edits": 12}
    assert result["digests"]["settings"].startswith(folder.name[-12:])


def test_a_line_leaves_out_what_was_not_measured() -> None:
    right, preferred = {"reliability": {"mean": 0.5}, "locality": {"mean": 0.25}}, {"reliability": {"mean": 1.0}}
    entry = {"step": 2, "losses": {}, "held_out": {"teacher_forced": right, "probability": preferred}}
    assert train.line(entry).endswith("held out: reliability 50.0% (100.0%), locality 25.0%")


def test_help_shows_every_field_of_training() -> None:
    shown = run("train", "--help")
    names = [field.name for kind in (TrainConfig, RowsConfig) for field in dataclasses.fields(kind)]
    assert [name for name in names if not re.search(rf"^ *{name}:", shown, flags=re.MULTILINE)] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["editor=rome"], "rome needs no training"),
        (["editor.checkpoint=somewhere"], "training begins with a new network"),
        (["steps=0"], "steps: expected at least 1, got 0"),
        (["decay=2"], "decay: expected a share"),
        (["rows.neighbors=-1"], "rows.neighbors: expected at least 0"),
        (["dataset.probes=2"], "dataset.probes is for errata bench"),
        (["step=3"], "did you mean 'steps'"),
        (["held_out=5000"], "leave none to train on"),
        (["editor.layers=[9]"], "layers"),
        (["protocol=single"], "protocol"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DatasetError), match=said):
        run("train", *arguments, "device=cpu", f"out={tmp_path}")
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []


# --- and then ------------------------------------------------------------------------------------------------------


def test_a_bench_takes_what_was_trained_and_is_another_run_once_that_is_trained_anew(tmp_path: Path) -> None:
    editor = {name: QUICK["editor"][name] for name in ("name", "layers", "rank")}
    values = {
        "editor": editor, "model": {"name": "world"}, "dataset": {"name": "world", "split": "test"}, "n_edits": 2,
        "out": str(tmp_path / "runs"), "generation": {"tokens": 0, "fluency_tokens": 0}, "device": "cpu",
        "collapse": {"n_texts": 1, "known_facts": 2},
    }  # fmt: skip
    settings = BenchConfig.of(values)
    with pytest.raises(CheckpointError, match="errata train editor=mend"):
        bench.run(settings)
    first = train.run(config(tmp_path))
    before = bench.prepare(settings).folder.key
    records = [json.loads(line) for line in (bench.run(settings) / "records.jsonl").read_text().splitlines()]
    entry = TensorCache(first).load("mend")
    assert entry is not None
    assert {record["diagnostics"]["checkpoint"] for record in records} == {entry.meta["checkpoint"]}
    assert bench.prepare(settings).folder.key == before
    train.run(config(tmp_path, seed=1))
    assert bench.prepare(settings).folder.key != before
    named = BenchConfig.of({**values, "editor": {**editor, "checkpoint": str(first)}})
    key = bench.prepare(named).folder.key
    train.run(config(tmp_path, seed=2))
    assert bench.prepare(named).folder.key == key


def test_the_command_that_a_bench_names_trains_what_it_looks_for(tmp_path: Path) -> None:
    values = {
        "editor": {"name": "mend", "rank": 4}, "model": {"name": "world"}, "n_edits": 1, "device": "cpu",
        "dataset": {"name": "world", "split": "test"}, "out": str(tmp_path / "runs"),
        "generation": {"tokens": 0, "fluency_tokens": 0}, "collapse": {"n_texts": 0, "known_facts": 0},
    }  # fmt: skip
    with pytest.raises(CheckpointError) as caught:
        bench.run(BenchConfig.of(values))
    said = re.search(r"train one: (errata train .*?), or name", str(caught.value))
    assert said is not None
    assert said[1] == "errata train editor=mend model=world editor.rank=4"
    run(*shlex.split(said[1])[1:], "steps=1", "n_cases=12", "held_out=3", "device=cpu", f"out={tmp_path}")
    assert (bench.run(BenchConfig.of(values)) / "results.json").is_file()


def test_every_method_that_is_trained_can_be(tmp_path: Path) -> None:
    trained = [name for name in editors.METHODS if issubclass(editors.get(name), TrainedEditor)]
    assert trained == ["mend", "malmen", "rledit"]
    for name in editors.METHODS:
        if name not in trained:
            with pytest.raises(ConfigError, match="needs no training"):
                train.prepare(TrainConfig.of({**QUICK, "editor": {"name": name}, "out": str(tmp_path)}))
