"""Overrides as they are typed: lists without brackets, one value per name, and suggestions only where one is near."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.config import BenchConfig, editor_config
from errata.cli import main, overrides
from errata.editors.core.config import did_you_mean, nearest
from errata.editors.core.errors import ConfigError


def bench(*words: str) -> BenchConfig:
    return BenchConfig.of(compose("bench", overrides.translated(words, "bench")))


def fields(*words: str) -> dict[str, Any]:
    config = bench(*words)
    return editor_config(config.editor, config.model).to_dict()


def refused(*words: str) -> str:
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError) as caught:
        main.run(list(words), console, console)
    return str(caught.value)


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "layers"),
    [
        ("editor.layers=2", (2,)),
        ("editor.layers=0,2", (0, 2)),
        ("editor.layers=[2]", (2,)),
        ("editor.layers=[0,2]", (0, 2)),
        ("model.editors.memit.layers=1,2", (1, 2)),
    ],
)
def test_a_list_needs_no_brackets(word: str, layers: tuple[int, ...]) -> None:
    assert fields("dataset=world", "editor=memit", word)["layers"] == layers


def test_lists_of_the_command_itself_need_no_brackets() -> None:
    assert bench("editor=rome", "dataset=world", "trackers=tensorboard").trackers == ("tensorboard",)
    assert bench("editor=rome", "dataset=world", "trackers=tensorboard,wandb").trackers == ("tensorboard", "wandb")
    tasks = bench("editor=rome", "dataset=world", "protocol=batch", "ability.tasks=world_facts,arc_easy").ability.tasks
    assert tasks == ("world_facts", "arc_easy")


def test_a_list_of_texts_keeps_its_own_grammar() -> None:
    given = fields("editor=rome", "dataset=world", 'editor.context_templates=["{}","Well, {}"]')
    assert given["context_templates"] == ("{}", "Well, {}")


def test_in_a_sweep_commas_still_separate_runs() -> None:
    lines = overrides.translated(["editor=rome", "dataset=world", "editor.layers=1,2"], "bench", sweep=True)
    assert "++editor.layers=1,2" in lines


def test_a_file_s_method_says_what_a_list_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: memit\nmom2_update_weight: 10.0\n")
    given = fields(f"editor={path}", "dataset=world", "editor.layers=0,1")
    assert (given["layers"], given["mom2_update_weight"]) == ((0, 1), 10.0)


def test_several_values_of_a_number_are_refused() -> None:
    assert "editor.v_lr=0.1,0.2" in refused("bench", "editor=rome", "dataset=world", "editor.v_lr=0.1,0.2")


# --- one value per name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "bench dataset=world n_edits=5 n_edits=6",
        "bench dataset=world n_edits=5 n_edits=5",
        "bench dataset=world dataset=zsre",
        "bench -m dataset=world editor=rome,memit editor=grace",
        "bench dataset=world +editor.layers=1 editor.layers=2",
        "train dataset=world steps=1 steps=2",
        "edit prompt=a prompt=b subject=c target=d",
        "edit prompt=a subject=c target=d top=1 top=2",
        "apply facts.yaml out=a out=b",
        "check folder model=a model=b",
        "convert dataset dataset=world n_edits=1 n_edits=2 out=x.json",
        "playground port=1 port=2",
    ],
)
def test_one_name_with_two_values_is_refused_in_a_line(line: str) -> None:
    shown = refused(*line.split())
    assert "is given twice" in shown
    assert "leave one out" in shown
    assert ("-m n_edits=A,B" in shown) == line.startswith("bench dataset=world n_edits")


# --- suggestions ------------------------------------------------------------------------------------------------------

NEAR = [
    ("rme", "rome"),
    ("roem", "rome"),
    ("ROME", "rome"),
    ("otu", "out"),
    ("dataset.pth", "dataset.path"),
    ("alpha", "alphaedit"),
    ("perplexty", "perplexity"),
    ("counterfactplus", "counterfact_plus"),
]
FAR = ["xyz", "dataset.xyz", "qwerty", "o", "colour", "dataset.colour", "mom2", "zz", "", "dataset.", "protein"]


@pytest.mark.parametrize(("typed", "meant"), NEAR)
def test_what_is_near_is_suggested(typed: str, meant: str) -> None:
    assert nearest(typed, [meant, "out", "seed", "dataset.ids", "protocol", "rome", "memit"]) == meant


@pytest.mark.parametrize("typed", FAR)
def test_where_nothing_is_near_the_names_are_listed(typed: str) -> None:
    known = ["out", "seed", "dataset.ids", "dataset.path", "dataset.split", "protocol", "rome", "memit", "world"]
    assert did_you_mean(typed, known) == "; there are " + ", ".join(sorted(known))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("mom2_dataset", "mom2_dataset"), ("layers", "layers"), ("v_lrr", "v_lr"), ("mom2_datset", "mom2_dataset")],
)
def test_a_field_of_the_method_without_editor_before_it_is_recognised(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown name '{typed}'; did you mean 'editor.{meant}'"):
        bench("editor=rome", "dataset=world", f"{typed}=1")


def test_a_name_that_is_near_nothing_gets_no_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        bench("editor=rome", "dataset=world", "dataset.zzz=1")
    assert "did you mean" not in str(caught.value)
    assert "dataset.path" in str(caught.value)
