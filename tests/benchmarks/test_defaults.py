"""The defaults of the bench: the dataclasses state them, the YAMLs and the help follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, get_type_hints

import pytest
from omegaconf import OmegaConf

from errata.benchmarks.bench.compose import HPARAMS, _composed, _plain_choices, choices, compose, without_hydra
from errata.benchmarks.bench.config import ApplyConfig, BenchConfig, DatasetConfig, EditConfig, GuardConfig, ModelConfig
from errata.benchmarks.bench.defaults import explained, field_defaults
from errata.benchmarks.bench.train_config import TrainConfig
from errata.benchmarks.bench.tune_config import TuneConfig
from errata.editors.core.config import did_you_mean
from errata.editors.core.config_docs import documented

COMMANDS = [
    ("bench", BenchConfig),
    ("edit", EditConfig),
    ("apply", ApplyConfig),
    ("train", TrainConfig),
    ("tune", TuneConfig),
]
GROUPS = [("dataset", DatasetConfig), ("guard", GuardConfig), ("model", ModelConfig)]


def nested(config: Any) -> Iterator[Any]:
    """Yield a configuration's dataclass and those of its fields."""
    yield config
    for kind in get_type_hints(config).values():
        if dataclasses.is_dataclass(kind):
            yield from nested(kind)


@pytest.mark.parametrize(("command", "config"), COMMANDS)
def test_what_is_composed_is_what_the_dataclasses_say(command: str, config: Any) -> None:
    values = compose(command, [])
    assert set(values) == {field.name for field in dataclasses.fields(config)}
    for name, value in field_defaults(config, leave_out=("dataset", "guard", "model")).items():
        assert values[name] == value, name


@pytest.mark.parametrize(("command", "config"), COMMANDS)
def test_what_is_read_without_hydra_is_what_hydra_composes(command: str, config: Any) -> None:  # noqa: ARG001
    assert compose(command, []) == _composed(command, [], with_hydra=False)


def test_choices_of_plain_files_are_read_without_hydra_as_hydra_composes_them() -> None:
    chosen = ["protocol=compose", "editor=memit"]
    assert without_hydra("bench", dict(line.split("=") for line in chosen)) == _composed(
        "bench", chosen, with_hydra=False
    )
    assert _plain_choices("bench", chosen) is not None
    # What Hydra refuses, or reads as more than one choice, is left to it.
    for line in ("editor=rom", "editor=rome,memit", "n_edits=2"):
        assert _plain_choices("bench", [line]) is None
    assert _plain_choices("edit", ["protocol=dial"]) is None
    assert _plain_choices("bench", ["editor=rome", "editor=memit"]) is None


@pytest.mark.parametrize("text", ["1e3", "nan", "7", "true", "null", "~", "", "a: b", "*", "it's", "two\nlines", "é"])
def test_text_that_is_shown_is_read_as_the_same_text(text: str) -> None:
    assert OmegaConf.create(explained("none", {"a": text, "b": [text, 1e-5]})) == {"a": text, "b": [text, 1e-5]}


@pytest.mark.parametrize(("group", "config"), GROUPS)
def test_a_group_states_what_differs_from_its_dataclass_and_nothing_else(group: str, config: Any) -> None:
    defaults = field_defaults(config)
    for choice in choices(group):
        written = OmegaConf.to_container(OmegaConf.load(str(files(HPARAMS) / group / f"{choice}.yaml")), resolve=False)
        assert isinstance(written, dict)
        assert written.pop("defaults")[0] == "fields", choice
        assert not [name for name, value in written.items() if name != "name" and value == defaults[str(name)]], choice


@pytest.mark.parametrize(("command", "config"), COMMANDS)
def test_every_field_is_shown_with_its_meaning(command: str, config: Any) -> None:
    values = compose(command, [])
    shown = explained(command, values)
    assert OmegaConf.to_container(OmegaConf.create(shown)) == values
    for kind in nested(config):
        for field in documented(kind):
            if not dataclasses.is_dataclass(get_type_hints(kind)[field.name]):
                assert field.meaning, f"{kind.__name__}.{field.name}"
                assert f"# {field.meaning.rstrip('.')}\n" in shown


def test_the_fields_stand_in_the_order_of_the_dataclass() -> None:
    shown = OmegaConf.to_container(OmegaConf.create(explained("bench", compose("bench", []))))
    assert isinstance(shown, dict)
    assert list(shown) == [field.name for field in dataclasses.fields(BenchConfig)]
    assert list(shown["dataset"]) == [field.name for field in dataclasses.fields(DatasetConfig)]


def test_a_long_list_of_names_has_an_end() -> None:
    assert did_you_mean("x", ["one", "two"]) == "; there are one, two"
    said = did_you_mean("nothing like it", map(str, range(1000)))
    assert said.startswith("; there are 1,000: 0, 1, 10, ")
    assert said.count(",") == 61
