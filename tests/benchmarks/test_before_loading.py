"""What is wrong by config.json or by what is on the disk is refused before the weights are read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from errata import models
from errata.benchmarks.bench.config import ModelConfig, editor_config
from errata.cli import main
from errata.editors.core.errors import CheckpointError, ConfigError, ErrataError


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(models, "load", refuse)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


FACT = ["prompt={} is", "subject=a", "target=b"]
WRONG = [
    (["bench", "dataset=world", "editor=rome", "editor.layers=99"], ConfigError, r"from 0 to 5, got \[99\]"),
    (["bench", "dataset=world", "editor=memit", "editor.layers=0,6"], ConfigError, r"from 0 to 5, got \[0, 6\]"),
    (["bench", "dataset=world", "editor=grace", "editor.layers=6"], ConfigError, "from 0 to 5"),
    (["bench", "dataset=world", "editor=rome", "editor.v_loss_layer=6"], ConfigError, "v_loss_layer: .* to 5, got 6"),
    (
        ["edit", "editor=memit", "editor.layers=2,3", "editor.v_loss_layer=2", *FACT],
        ConfigError,
        "v_loss_layer: expected a layer from 3 to 5, got 2",
    ),
    (["edit", "editor=ft_m", "editor.layers=7", *FACT], ConfigError, "from 0 to 5"),
    (["edit", "editor=rome", "editor.sparsify=rct:0.8", *FACT], ConfigError, "unknown mask 'rct'; did you mean 'rect'"),
    (["edit", "editor=rome", "editor.sparsify=rect:8", *FACT], ConfigError, "share from 0 to 1, got 8"),
    (["bench", "dataset=world", "editor=grace", "editor.sparsify=rect"], ConfigError, "grace writes no weights"),
    (["train", "editor=mend", "editor.layers=7"], ConfigError, "from 0 to 5"),
    (["bench", "dataset=world", "editor=mend"], CheckpointError, "train one: errata train editor=mend model=world"),
    (["edit", "editor=mend", *FACT], CheckpointError, "no trained mend is in the cache; train one: errata train"),
    (["edit", "editor=mend", "editor.checkpoint=gone", *FACT], CheckpointError, "no trained mend is in 'gone'"),
]


@pytest.mark.parametrize(("words", "kind", "said"), WRONG)
def test_it_is_refused_before_the_weights_are_read(words: list[str], kind: type[ErrataError], said: str) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(kind, match=said):
        main.run(words, console, console)
    assert not [path for path in Path().rglob("*") if path.is_file() and "cache" not in path.parts]


def test_a_misspelt_method_among_a_models_settings_is_refused_by_file_and_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"n_layer": 4}')
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "errata.json").write_text(json.dumps({"editors": {"memitt": {"layers": [1]}, "from_elsewhere": {}}}))
    with pytest.raises(ConfigError, match=r"errata\.json: editors\.memitt: unknown method; did you mean 'memit'"):
        editor_config({"name": "memit"}, ModelConfig(str(tmp_path)))
    (tmp_path / "errata.json").write_text(json.dumps({"editors": {"from_elsewhere": {}}}))
    assert editor_config({"name": "grace"}, ModelConfig(str(tmp_path)))
    with pytest.raises(ConfigError, match=r"model\.editors\.Rome: unknown method; did you mean 'rome'"):
        editor_config({"name": "rome"}, ModelConfig(str(tmp_path), editors={"Rome": {}}))


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ({"n_layer": 4}, 4),
        ({"num_hidden_layers": 7, "n_layer": 9}, 7),
        ({"text_config": {"num_hidden_layers": 3}}, 3),
        ({"layers": 3}, None),
        ([], None),
        ("{", None),
    ],
)
def test_the_number_of_layers_is_read_from_the_config_alone(content: Any, count: int | None, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert models.layer_count(tmp_path) == count
    model = ModelConfig(str(tmp_path))
    if count is None:  # the model itself says later what does not fit
        assert editor_config({"name": "rome", "layers": 99}, model).to_dict()["layers"] == (99,)


def test_a_model_of_the_hub_that_is_not_here_is_not_asked_for() -> None:
    assert models.layer_count("openai-community/no-such-model") is None
