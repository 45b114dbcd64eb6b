"""The configuration of a bench run, checked before anything is loaded.

Where a method's field comes from, the later the stronger:
1. the method's own Config, which has the paper's value;
2. "editors" in the model folder's errata.json;
3. `editors:` in the model's YAML;
4. `editor.<field>=` on the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Self

from errata import editors, models
from errata.benchmarks.ability import AbilityConfig
from errata.editors.core.config import EditorConfig, build, check_least
from errata.editors.core.errors import ConfigError
from errata.editors.core.model.model_settings import read_model_settings

MISSING = "???"  # OmegaConf's mark of a value that has to be given


@dataclass(frozen=True)
class ModelConfig:
    """Which model; arguments of `errata.load`, and fields of methods that differ for it."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    editors: Mapping[str, Any] = field(default_factory=dict)

    def load(self, precision: str | None = None, device: str | None = None) -> tuple[Any, Any]:
        """The model and its tokenizer; as `errata.load`."""
        return models.load(
            self.name,
            dtype=precision,
            device=device,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class DatasetConfig:
    """Which cases: the file in the dataset's own format (none: the testbed's cases in it), which half of the testbed's,
    a JSON file of the case ids to take, whether to shuffle, and whether a sequence edits a prompt again that it has
    edited before (else the first edit of a prompt is made, and the others are dropped). `known`: only cases of which
    the untouched model's greedy continuation begins with the true answer ("exact"), holds it ("contained") or does not
    hold it ("absent")."""

    name: str
    path: str | None = None
    split: Literal["dev", "test"] | None = None
    ids: str | None = None
    shuffle: bool = False
    repeats: bool = False
    known: Literal["exact", "contained", "absent"] | None = None


@dataclass(frozen=True)
class ProtocolConfig:
    """How edits follow each other."""

    name: str = "single"


@dataclass(frozen=True)
class GenerationConfig:
    """`tokens`: longest free answer; 0 leaves free generation out. `fluency_tokens`: length of the text that is written
    behind an open prompt; 0 leaves fluency out."""

    tokens: int = 12
    fluency_tokens: int = 50


@dataclass(frozen=True)
class ScoringConfig:
    """`batch_tokens`: tokens of a forward pass, padding included."""

    batch_tokens: int = 8192


@dataclass(frozen=True)
class CollapseConfig:
    """`text`: a file, or "name:config:split" of the hub; null: what the model's folder brings. `n_texts`: how many of
    it; 0 leaves perplexity out. `perplexity_each`: after every single edit; otherwise before only. `known_facts`: how
    many facts of other subjects are asked again after every edit, on the testbed."""

    text: str | None = None
    n_texts: int = 64
    perplexity_each: bool = True
    known_facts: int = 100


@dataclass(frozen=True)
class GuardConfig:
    """What watches over the model while it is edited; `name` "none": nothing.

    `ratio`: of perplexity to the untouched model's, above which an edit has broken the model. `facts`: share of the
    known facts, below which it has; null: they are not asked. `action`: "undo" takes such an edit back and goes on,
    "stop" ends the sequence with it. `n_texts`: of the texts for perplexity the first so many; null: all.
    """

    name: Literal["none", "perplexity", "disabling"] = "none"
    ratio: float = 2.0
    facts: float | None = None
    action: Literal["undo", "stop"] = "undo"
    n_texts: int | None = None


LEAST: Mapping[str, float] = MappingProxyType(
    {
        "batch_size": 1,
        "n_edits": 1,
        "eval_every": 1,
        "time_limit": 0,
        "seed": 0,
        "generation.tokens": 0,
        "generation.fluency_tokens": 0,
        "scoring.batch_tokens": 1,
        "collapse.known_facts": 0,
        "collapse.n_texts": 0,
        "guard.ratio": 1,
        "guard.facts": 0,
        "guard.n_texts": 1,
    }
)


class Composed:
    """What a command is told: a dataclass that is made of the values that Hydra composes."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From plain values.

        Raises:
            ConfigError: an unknown field (with the nearest known one), a wrong type, a value out of range.
        """
        return build(cls, given(values))


@dataclass(frozen=True)
class BenchConfig(Composed):
    """Everything that `errata bench` is told. hparams/config.yaml documents the fields and has their defaults."""

    editor: Mapping[str, Any]
    model: ModelConfig
    dataset: DatasetConfig
    protocol: ProtocolConfig = ProtocolConfig()
    n_edits: int | None = None
    batch_size: int = 16
    eval_every: int | None = None
    seed: int = 0
    precision: str | None = None
    device: str | None = None
    out: str = "runs"
    time_limit: float | None = None
    trackers: tuple[str, ...] = ()
    generation: GenerationConfig = GenerationConfig()
    scoring: ScoringConfig = ScoringConfig()
    collapse: CollapseConfig = CollapseConfig()
    ability: AbilityConfig = field(default_factory=AbilityConfig)
    guard: GuardConfig = GuardConfig()
    confidence: float = 0.95

    def __post_init__(self) -> None:
        editor_name(self.editor)
        check_least(self, LEAST)
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence: expected a share between 0 and 1, got {self.confidence}")
        if self.guard.facts is not None and self.guard.facts > 1:
            raise ConfigError(f"guard.facts: expected a share from 0 to 1, got {self.guard.facts:g}")
        if self.ability.tasks and self.protocol.name == "single":
            raise ConfigError("ability.tasks: asked at checkpoints, of protocol=sequential and protocol=batch")
        if self.dataset.known is not None and not self.generation.tokens:
            raise ConfigError("dataset.known needs free answers: leave generation.tokens above 0")


@dataclass(frozen=True)
class EditConfig(Composed):
    """Everything that `errata edit` is told beside its texts. hparams/edit.yaml documents the fields and has their
    defaults."""

    editor: Mapping[str, Any]
    model: ModelConfig
    precision: str | None = None
    device: str | None = None
    top: int = 5
    generation: GenerationConfig = GenerationConfig()

    def __post_init__(self) -> None:
        editor_name(self.editor)
        check_least(self, {"top": 1, "generation.tokens": 1})


@dataclass(frozen=True)
class ApplyConfig(Composed):
    """Everything that `errata apply` is told beside its file. hparams/apply.yaml documents the fields and has their
    defaults."""

    editor: Mapping[str, Any]
    model: ModelConfig
    precision: str | None = None
    device: str | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        editor_name(self.editor)
        check_least(self, {"batch_size": 1})


def given(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values, once none is missing.

    Raises:
        ConfigError: one is; names it.
    """
    missing = next(_missing(values), None)
    if missing:
        raise ConfigError(f"{missing} is missing: give {missing}=...")
    return values


def _missing(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, value in values.items():
        if value == MISSING:
            yield f"{path}{name}"
        if isinstance(value, Mapping):
            yield from _missing(value, f"{path}{name}.")


def editor_name(editor: Mapping[str, Any]) -> str:
    """The method's name in `editor: {name: ..., fields}`."""
    name = editor.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"editor.name: expected the name of a method, got {name!r}")
    return name


def editor_config(editor: Mapping[str, Any], model: ModelConfig, *, seed: int = 0) -> EditorConfig:
    """The method's Config with every layer of overrides laid on (see the top of this file).

    Raises:
        ConfigError: an unknown method or field; a value of another type.
    """
    name = editor_name(editor)
    method = editors.get(name)
    merged: dict[str, Any] = {"seed": seed}
    for source in (read_model_settings(models.locate(model.name)).editors, model.editors):
        merged.update(source.get(name, {}))
    merged.update({key: value for key, value in editor.items() if key != "name"})
    return method.Config.from_dict(merged, path="editor.")
