"""The configuration of a bench run, checked before anything is loaded. The defaults of the bench are stated here alone:
hparams/ takes them from these classes, and `errata bench --help` shows the text below each field.

Where a method's field comes from, the later the stronger:
1. the method's own Config, which has the paper's value;
2. "editors" in the model folder's errata.json;
3. `editors:` in the model's YAML;
4. "editors" in the errata.json of the folder `model.settings`;
5. `editor.<field>=` on the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from errata import editors
from errata.benchmarks.ability.ability import AbilityConfig
from errata.benchmarks.bench.composition_config import ComposeConfig
from errata.benchmarks.bench.edit_protocol import is_sequence
from errata.benchmarks.bench.priming_config import PrimingConfig
from errata.benchmarks.bench.strength_config import DialConfig, LeagueConfig
from errata.benchmarks.bench.wild_config import WildConfig
from errata.editors.core.config import EditorConfig, build, check_layers, check_least, nearest
from errata.editors.core.errors import CheckpointError, ConfigError

AUTO = "auto"  # value of a method's `layers`: see auto_layers.py
MISSING = "???"  # OmegaConf's mark of a value that has to be given


@dataclass(frozen=True)
class ModelConfig:
    """Which model to load, and fields of methods that differ for it."""

    name: str
    """The bundled testbed ("world"), "smollm2", a folder, a GGUF file, or a Hugging Face id."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    trust_remote_code: bool = False
    """Run the Python files that come with the model."""
    device_map: str | None = None
    """auto: spread the model's blocks over all GPUs, with accelerate; null: the whole model goes to `device`."""
    editors: Mapping[str, Any] = field(default_factory=dict)
    """Fields of methods for this model, by method."""
    settings: str | None = None
    """A folder whose errata.json has fields of methods for this model, as `errata tune` writes it."""

    def load(self, precision: str | None = None, device: str | None = None) -> tuple[Any, Any]:
        """Load the model and its tokenizer; arguments and errors as `errata.load`."""
        from errata import models

        return models.load(
            self.name,
            dtype=precision,
            device=device,
            device_map=self.device_map,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class DatasetConfig:
    """Which cases to edit."""

    name: str
    """The dataset."""
    path: str | None = None
    """The file in the dataset's original format, or a dataset of the Hub (owner/name:config:split); of the testbed's
    datasets the folder of a testbed (null: the bundled one)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else a dataset takes, by name: a published benchmark (docs/benchmarks.md) or one of another package."""
    target: Literal["answers", "alt"] | None = None
    """What an edit of zsRE teaches. answers: the right answer, as ROME and MEMIT do; alt: a wrong one, as MEND and
    EasyEdit do; null: answers."""
    split: Literal["dev", "test"] | None = None
    """dev or test: one half of the testbed's cases; null: both."""
    ids: str | None = None
    """A JSON file of case ids; null: all."""
    order: Literal["ids"] | None = None
    """ids: the cases in the order of `ids`, as a published one; null: in the order of the file."""
    shuffle: bool = False
    """Draw the order of the cases by `seed`."""
    chat: bool = False
    """true: every prompt is a message to an instruct model, read inside its chat template (docs/chat-models.md)."""
    repeats: bool = False
    """true: a sequence edits a prompt again that it has edited before; false: only the first edit is made."""
    references: str | None = None
    """Texts about subjects by relation and answer, in the form of attribute_snippets.json, for consistency and essence
    drift; world: the testbed's own prose; null: neither is measured."""
    known: Literal["exact", "contained", "absent", "probability"] | None = None
    """exact, contained, absent: only facts whose true answer begins the untouched model's greedy continuation, is in
    it, or is not in it; probability: is likelier than the edit's answer (docs/results.md)."""
    probes: int | None = None
    """Ask at most this many probes of each kind per case, the first of the file; null: all. Prompts of
    `priming` count apart."""


@dataclass(frozen=True)
class ProtocolConfig:
    """How edits follow each other."""

    name: str = "single"
    """single, sequential, batch, dial, league or compose."""


@dataclass(frozen=True)
class GenerationConfig:
    """How long the texts are that a model writes."""

    tokens: int = 12
    """Tokens of the longest answer under free generation; 0: leave that scoring out."""
    fluency_tokens: int = 50
    """Tokens of the texts whose fluency is measured; 0: leave fluency out."""
    fluency: Literal["greedy", "papers"] = "greedy"
    """papers: texts drawn from the 5 likeliest tokens, of 100 tokens with their prompt, whose fluency is in bits times
    100; greedy: texts of `fluency_tokens` without their prompt."""
    overlap: bool = False
    """true: BLEU and ROUGE-L of every free answer, with sacrebleu and rouge-score (the extra `overlap`)."""


@dataclass(frozen=True)
class AnswerConfig:
    """How long the answers are that `errata edit` shows."""

    tokens: int = 12
    """Tokens of the longest answer."""


@dataclass(frozen=True)
class ScoringConfig:
    """How probes are scored."""

    batch_tokens: int = 8192
    """Tokens of a forward pass, padding included."""


@dataclass(frozen=True)
class CollapseConfig:
    """How damage to the rest of the model is measured."""

    text: str | None = None
    """Texts for perplexity: a file, or name:config:split of the hub; null: the model folder's own."""
    n_texts: int = 64
    """How many of them; 0: leave perplexity out."""
    tokens: int | None = 2048
    """Tokens of them that a perplexity reads after a single edit and at a checkpoint; the end of a sequence reads all;
    null: all, always."""
    perplexity_each: bool = True
    """Measure perplexity after every single edit."""
    known_facts: int = 100
    """Facts of other subjects that are asked again after every edit, on the testbed."""


@dataclass(frozen=True)
class GuardConfig:
    """What watches the model while it is edited."""

    name: Literal["none", "perplexity", "disabling"] = "none"
    """none: nothing watches, and the other fields have no effect."""
    ratio: float = 2.0
    """An edit has broken the model when perplexity exceeds the untouched model's this many times; of protocol=compose,
    that of the model on which the edits are made."""
    facts: float | None = None
    """Share of the known facts below which an edit has broken the model, too; null: they are not asked."""
    action: Literal["undo", "stop"] = "undo"
    """undo: the edit is undone, bit for bit, and the next is made; stop: the sequence ends with it."""
    n_texts: int | None = None
    """How many of the texts of `collapse`: fewer are faster and tell less; null: all."""


LEAST: Mapping[str, float] = MappingProxyType(
    {
        "batch_size": 1,
        "n_edits": 1,
        "eval_every": 1,
        "eval_sample": 1,
        "time_limit": 0,
        "seed": 0,
        "generation.tokens": 0,
        "generation.fluency_tokens": 0,
        "scoring.batch_tokens": 1,
        "collapse.known_facts": 0,
        "collapse.n_texts": 0,
        "collapse.tokens": 1,
        "dataset.probes": 1,
        "guard.ratio": 1,
        "guard.facts": 0,
        "guard.n_texts": 1,
    }
)


class Composed:
    """The configuration of a command, as a dataclass of the values that Hydra composes."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return the configuration of plain values.

        Raises:
            ConfigError: There is an unknown field (with the nearest known one), a wrong type or a value out of range.
        """
        return build(cls, given(values))


@dataclass(frozen=True)
class BenchConfig(Composed):
    """The configuration of `errata bench`."""

    editor: Mapping[str, Any]
    """The method's name and its fields."""
    model: ModelConfig
    dataset: DatasetConfig
    protocol: ProtocolConfig = ProtocolConfig()
    n_edits: int | None = None
    """Edits to make; null: all cases of the dataset."""
    batch_size: int = 16
    """Edits made together; only speed and memory under `protocol=single`, all under `batch`."""
    eval_every: int | None = None
    """Edits between checkpoints of a sequence; null: only at its end."""
    eval_at: tuple[int, ...] = ()
    """Further checkpoints, by the number of edits, as [1,5,10,20,50,100,500,1000]."""
    eval_sample: int | None = None
    """Edits that are scored at a checkpoint, drawn by `seed` from those so far; the end scores all. null: all of up to
    100 edits, of more a sample that makes all checkpoints together cost 0.3 times the end, at least 20."""
    seed: int = 0
    """Draws the order of the cases where the dataset is shuffled, and the bootstrap."""
    precision: str | None = None
    """float32, bfloat16, float64; null: as the weights are saved (float16 is loaded as float32)."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; null: a GPU where there is one."""
    out: str = "runs"
    """The folder in which the run's folder is made."""
    time_limit: float | None = None
    """Minutes after which the command ends cleanly behind an edit; the same command then goes on. Not for torchrun."""
    trackers: tuple[str, ...] = ()
    """tensorboard, wandb, mlflow, trackio: services that receive the checkpoints and the final scores."""
    generation: GenerationConfig = GenerationConfig()
    wild: WildConfig = field(default_factory=WildConfig)
    scoring: ScoringConfig = ScoringConfig()
    collapse: CollapseConfig = CollapseConfig()
    ability: AbilityConfig = field(default_factory=AbilityConfig)
    guard: GuardConfig = GuardConfig()
    dial: DialConfig = field(default_factory=DialConfig)
    league: LeagueConfig = field(default_factory=LeagueConfig)
    compose: ComposeConfig = field(default_factory=ComposeConfig)
    priming: PrimingConfig = field(default_factory=PrimingConfig)
    confidence: float = 0.95
    """Confidence of the bootstrap intervals."""

    def __post_init__(self) -> None:
        editor_name(self.editor)
        check_least(self, LEAST)
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence: expected a share between 0 and 1, got {self.confidence}")
        if self.guard.facts is not None and self.guard.facts > 1:
            raise ConfigError(f"guard.facts: expected a share from 0 to 1, got {self.guard.facts:g}")
        if self.ability.tasks and not is_sequence(self.protocol.name):
            raise ConfigError("ability.tasks: asked at checkpoints, of protocol=sequential and protocol=batch")
        if list(self.eval_at) != sorted({at for at in self.eval_at if at > 0}):
            raise ConfigError(f"eval_at: expected ascending numbers of edits above 0, got {list(self.eval_at)}")
        if self.dataset.known not in (None, "probability") and not self.generation.tokens:
            raise ConfigError("dataset.known needs free answers: leave generation.tokens above 0")


@dataclass(frozen=True)
class EditConfig(Composed):
    """The configuration of `errata edit` beside its texts."""

    editor: Mapping[str, Any]
    """The method's name and its fields."""
    model: ModelConfig
    precision: str | None = None
    """float32, bfloat16, float64; null: as the weights are saved (float16 is loaded as float32)."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; null: a GPU where there is one."""
    top: int = 5
    """Answers to show before and after."""
    generation: AnswerConfig = AnswerConfig()

    def __post_init__(self) -> None:
        editor_name(self.editor)
        check_least(self, {"top": 1, "generation.tokens": 1})


@dataclass(frozen=True)
class ApplyConfig(Composed):
    """The configuration of `errata apply` beside its file."""

    editor: Mapping[str, Any]
    """The method's name and its fields."""
    model: ModelConfig
    precision: str | None = None
    """null: as the folder's edits were made, or as the weights are saved."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; null: a GPU where there is one."""
    batch_size: int = 1
    """Facts that are made as one edit: faster, but they can only be undone together."""

    def __post_init__(self) -> None:
        editor_name(self.editor)
        check_least(self, {"batch_size": 1})


def given(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values, once none is missing.

    Raises:
        ConfigError: A value is missing; names it.
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
    """Return the method's name in `editor: {name: ..., fields}`.

    Raises:
        ConfigError: There is none.
    """
    name = editor.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"editor.name: expected the name of a method, got {name!r}")
    return name


def editor_config(editor: Mapping[str, Any], model: ModelConfig, *, seed: int = 0) -> EditorConfig:
    """Return the method's Config with every layer of overrides applied (see the top of this file).

    Raises:
        ConfigError: There is an unknown method or field, a value of another type, or a layer that the model does not
            have by its config.json.
    """
    from errata import models
    from errata.editors.core.model.model_settings import FILE as SETTINGS_FILE
    from errata.editors.core.model.model_settings import read_model_settings

    name = editor_name(editor)
    method = editors.get(name)
    merged: dict[str, Any] = {"seed": seed}
    folder = models.locate(model.name)
    for source, where in (
        (read_model_settings(folder).editors, f"{Path(folder) / SETTINGS_FILE}: editors"),
        (model.editors, "model.editors"),
        *_handed_over(model),
    ):
        _refuse_misspelt(source, where)
        merged.update(source.get(name, {}))
    merged.update({key: value for key, value in editor.items() if key != "name"})
    layers = merged.get("layers")
    if layers == AUTO:
        raise ConfigError(
            "editor.layers=auto traces facts of a dataset, which errata bench does; here give the layers, or "
            "model.settings=FOLDER with the settings that errata tune has found"
        )
    if isinstance(layers, str) and any(entry.name == "layers" for entry in fields(method.Config)):
        raise ConfigError(
            f"editor.layers: expected layers such as [3,4,5], null for the method's rule, or {AUTO}, which traces "
            f"facts (errata bench and tune), got {layers!r}"
            + (f"; did you mean {AUTO!r}?" if layers.lower().startswith(AUTO[:2]) else "")
        )
    config = method.Config.from_dict(merged, path="editor.")
    method.mask_rule(config)  # refuses a rule that there is not
    count = models.layer_count(model.name, model.revision)
    if count is not None:
        _check_layers_fit(config, count)
    return config


def _handed_over(model: ModelConfig) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield the fields of methods of the folder `model.settings`, and where they stand.

    Raises:
        ConfigError: The folder has no errata.json.
    """
    from errata.editors.core.model.model_settings import FILE, read_model_settings

    if model.settings is None:
        return
    path = Path(model.settings) / FILE
    if not path.is_file():
        raise ConfigError(
            f"model.settings: expected a folder with an {FILE}, as errata tune writes it; no {path} is there"
        )
    yield read_model_settings(model.settings).editors, f"{path}: editors"


def _refuse_misspelt(methods: Iterable[str], where: str) -> None:
    """Refuse a name that is nearly a method's. Another one may be of a package that is not installed here."""
    for name in methods:
        meant = None if name in editors.METHODS else nearest(name, editors.METHODS)
        if meant is not None:
            raise ConfigError(f"{where}.{name}: unknown method; did you mean {meant!r}?")


def _check_layers_fit(config: EditorConfig, count: int) -> None:
    """Refuse layers that a model of `count` layers does not have."""
    layers, loss = getattr(config, "layers", None), getattr(config, "v_loss_layer", None)
    lowest = check_layers(layers, count)[-1] if layers is not None else 0
    if loss is not None and not lowest <= loss < count:
        raise ConfigError(f"editor.v_loss_layer: expected a layer from {lowest} to {count - 1}, got {loss}")


def check_trained(editor: Mapping[str, Any], config: EditorConfig, model: ModelConfig) -> None:
    """Refuse a method that is trained and has no network for any model, before this one is loaded.

    Raises:
        CheckpointError: It says how to train one.
    """
    from errata import models
    from errata.editors.core.families.learned_editor import (
        TrainedConfig,
        TrainedEditor,
        available_checkpoints,
        training_command,
    )

    name = editor_name(editor)
    method = editors.get(name)
    if not isinstance(config, TrainedConfig) or not issubclass(method, TrainedEditor):
        return
    if not available_checkpoints(config, name, {}):  # whether one fits is known when the model is loaded
        where = "in the cache" if config.checkpoint is None else f"in {config.checkpoint!r}"
        raise CheckpointError(
            f"{name} has to be trained before it edits, and no trained {name} is {where}; train one: "
            f"{training_command(method, config, model.name, models.locate(model.name))}, or name its folder "
            "by editor.checkpoint=FOLDER"
        )
