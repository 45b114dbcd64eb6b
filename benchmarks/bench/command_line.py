"""A run's configuration as the command line that repeats it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from errata.benchmarks.bench.compose import choices, compose
from errata.benchmarks.bench.config import DatasetConfig, ModelConfig, editor_config
from errata.benchmarks.runs.hydra_grammar import TEXT_KEYS, written
from errata.editors.core.config import EditorConfig

# Groups' choices, and what the method's fields hold by now.
_SAID_OTHERWISE = (
    *("editor", "model.name", "model.editors", "model.settings", "dataset.name", "protocol.name", "guard.name"),
)
_OPEN = ("compose.compress.", "compose.unlearn.")


class Described(Protocol):
    """A configuration that can be written as a command: of `errata bench` or of `errata train`."""

    @property
    def editor(self) -> Mapping[str, Any]: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def dataset(self) -> DatasetConfig: ...
    @property
    def seed(self) -> int: ...


def command(config: Described, editor: EditorConfig, *, verb: str = "bench", yaml: str = "bench") -> str:
    """`errata bench ...` with everything that differs from what its choices compose to, the method's fields by their
    final values: those that differ from the method's defaults, or from what the model brings along. `verb` is the
    command, `yaml` what its overrides are of."""
    name = config.editor["name"]
    groups = [f"editor={name}", f"dataset={config.dataset.name}"]
    groups += [f"{group}={getattr(config, group).name}" for group in ("protocol", "guard") if hasattr(config, group)]
    model = _yaml(config.model.name)
    # Without the editor, whose YAML has its name alone, and none where another package registers it.
    composed = compose(yaml, [*groups[1:], f"model={model}"])
    words = ["errata", verb, *groups, f"model={config.model.name}"]
    if model == "custom" and config.model.name in choices("model"):
        words[-1:] = ["model=custom", f"model.name={config.model.name}"]
    paper = dataclasses.asdict(type(editor)(seed=config.seed))
    model_config = ModelConfig(config.model.name, editors=composed["model"]["editors"])
    brought = dataclasses.asdict(editor_config({"name": name}, model_config, seed=config.seed))
    for field, value in dataclasses.asdict(editor).items():
        if not value == paper[field] == brought[field]:
            words.append(f"editor.{field}={written(value)}")
    for field, value in _fields(config):
        # Fields of interventions have no defaults here: null may say something.
        if value != _at(composed, field) or field.startswith(_OPEN):
            words.append(f"{field}={value if field in TEXT_KEYS and value is not None else written(value)}")
    return shlex.join(words)


def _yaml(model: str) -> str:
    """The YAML that stands for a model by its name: "custom", but for the testbed. An id that is spelt like one of our
    YAMLs is not the model of that YAML."""
    is_one = model in choices("model") and compose("bench", [f"model={model}"])["model"]["name"] == model
    return model if is_one else "custom"


def _fields(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of every field that is neither a group's choice nor the editor's."""
    for field in dataclasses.fields(config):
        name, value = f"{path}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{name}.")
        elif isinstance(value, tuple):
            yield name, list(value)
        elif isinstance(value, Mapping) and path == "compose.":
            yield from ((f"{name}.{key}", entry) for key, entry in value.items())
        elif name not in _SAID_OTHERWISE:
            yield name, value


def _at(values: Mapping[str, Any], path: str) -> Any:
    """The value at `a.b`; None where a YAML does not have it."""
    value: Any = values
    for name in path.split("."):
        value = value.get(name)
    return value
