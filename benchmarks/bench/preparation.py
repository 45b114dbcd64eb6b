"""A run before its model is loaded: its cases, its texts, its editor's configuration and the folder that these name."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata import models
from errata.benchmarks.ability import ability
from errata.benchmarks.bench import auto_layers, case_selection, input_digests, protocols
from errata.benchmarks.bench.composition import intervention_configs
from errata.benchmarks.bench.composition_config import COMPRESS, UNLEARN, ComposeConfig
from errata.benchmarks.bench.config import BenchConfig, check_trained, editor_config, editor_name
from errata.benchmarks.bench.edit_protocol import NAMES
from errata.benchmarks.bench.strength_config import DialConfig, LeagueConfig
from errata.benchmarks.datasets.json_records import Loaded
from errata.benchmarks.reports import added_columns
from errata.benchmarks.runs import environment, trackers
from errata.benchmarks.runs.results import AT_ONCE
from errata.benchmarks.runs.run_folder import RunFolder
from errata.editors.core.config import EditorConfig
from errata.editors.core.errors import ConfigError
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.texts import read_texts
from errata.evaluate import judging, metrics, overlap
from errata.evaluate.probes import Case

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """A run before its model is loaded: everything that decides its results, and the folder that this gives.

    With `dataset.known`, `loaded` are the candidates until the model has been asked which of them it knows; `asked`
    then says how many it was asked. `probes_apart`: left out since they are about another edit's subject.
    """

    config: BenchConfig
    editor: EditorConfig
    loaded: Loaded
    probes_apart: int
    texts: tuple[str, ...]
    settings: dict[str, Any]
    folder: RunFolder
    asked: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def cases(self) -> list[Case]:
        return self.loaded.cases

    @property
    def edits(self) -> int | None:
        """How many will be made; None where the model has to be asked first."""
        return self.config.n_edits if self.config.dataset.known else len(self.cases)


def prepare(config: BenchConfig) -> PreparedRun:
    """Check everything that can be checked without the model. Only `editor.layers=auto` loads it, and traces facts."""
    _check_added(config)
    config = auto_layers.with_layers(config)
    editor = editor_config(config.editor, config.model, seed=config.seed)
    check_trained(config.editor, editor, config.model)
    ability.check(config.ability)
    if config.generation.overlap:
        overlap.check_installed()
    if config.wild.judge is not None and config.wild.judge != judging.MODEL:
        judging.find_judge(config.wild.judge, trust_code=config.wild.trust_judge_code)
    trackers.check(config.trackers)
    loaded, left_out = _cases(config)
    texts = _texts(config)
    fields = {"name": editor_name(config.editor), **editor.to_dict()}
    without = ["out", "time_limit", "trackers"]  # which change no result
    if config.protocol.name in AT_ONCE:
        without.append("batch_size")  # all cases are one
    settings = {
        **environment.identity(config, fields, case_selection.digest_of(loaded), texts, without=without),
        **input_digests.digests(config, editor),
    }
    _say_what_is_not_read(config)
    _check_general_text(config, texts, settings["computed"]["precision"])
    folder = RunFolder.at(config.out, _folder_name(config, loaded), settings)
    return PreparedRun(config, editor, loaded, left_out, tuple(texts), settings, folder)


def _say_what_is_not_read(config: BenchConfig) -> None:
    """Warn of fields of `dial`, `league` and `compose` that were given to a protocol that does not read them."""
    name = config.protocol.name
    if name not in NAMES:  # those of other packages may read anything
        return
    readers = {"dial.strengths": ("dial",), "league.tokens": ("dial", "league")}
    readers |= {f"league.{field}": ("league",) for field in ("caps", "steps", "margin")}
    readers |= {f"compose.{field}": ("compose",) for field in ("order", "end", COMPRESS, UNLEARN)}
    default = {"dial": DialConfig(), "league": LeagueConfig(), "compose": ComposeConfig()}
    for path, by in readers.items():
        group, _, field = path.partition(".")
        if name not in by and getattr(getattr(config, group), field) != getattr(default[group], field):
            logger.warning("%s has no effect: protocol=%s does not read it", path, name)
    given = {COMPRESS: config.compose.compress, UNLEARN: config.compose.unlearn} if name == "compose" else {}
    for role, fields in given.items():
        if fields and role not in config.compose.roles:
            logger.warning("compose.%s has no effect: compose.order=%s does not name it", role, config.compose.order)


def _check_general_text(config: BenchConfig, texts: Sequence[str], precision: str) -> None:
    """Refuse a run over strengths whose damage could not be measured.

    Raises:
        ConfigError: It has no texts, or its leagues would drown in the rounding of 16-bit weights.
    """
    name = config.protocol.name
    if name in ("dial", "league") and not texts:
        raise ConfigError(
            f"protocol={name} measures the loss on general text, and there is none: leave collapse.n_texts above 0, "
            "and give collapse.text=FILE where the model's folder brings no text"
        )
    if name == "league" and precision not in ("float32", "float64"):
        raise ConfigError(
            f"protocol=league tells rises of 1e-5 apart, which {precision} rounds away; give precision=float32"
        )


def _check_added(config: BenchConfig) -> None:
    """Import what other packages add to a run and its report, so that no run fails by it after its last edit."""
    protocols.protocol(config.protocol.name)
    intervention_configs(config)
    metrics.declared()
    added_columns.ADDED.load_others()


def _cases(config: BenchConfig) -> tuple[Loaded, int]:
    """The cases to edit, and how many of their probes are left out; with `dataset.known`, all that can be asked."""
    loaded = case_selection.candidates(config)
    if config.dataset.known is not None:
        return loaded, 0
    taken = case_selection.require_enough(config, case_selection.take(config, loaded))
    return case_selection.without_other_subjects(config, case_selection.with_priming(config, taken))


def _texts(config: BenchConfig) -> list[str]:
    """Held-out texts, where they are wanted and there are any."""
    notes = read_model_settings(models.locate(config.model.name))
    source = config.collapse.text or notes.perplexity_text
    if source is None or config.collapse.n_texts == 0:
        return []
    return read_texts(source, max_texts=config.collapse.n_texts)


def run_names(config: BenchConfig) -> dict[str, str]:
    """What results are named by."""
    return {
        "editor": editor_name(config.editor),
        "model": config.model.name,
        "dataset": config.dataset.name,
        "protocol": config.protocol.name,
    }


def _folder_name(config: BenchConfig, loaded: Loaded) -> str:
    model, known = Path(config.model.name).name, config.dataset.known
    edits = f"{known}-{config.n_edits or 'all'}" if known else len(loaded.cases)
    dataset = "_".join(filter(None, (config.dataset.name, config.dataset.target)))
    dataset += "-chat" if config.dataset.chat else ""
    return f"{editor_name(config.editor)}-{model}-{dataset}-{config.protocol.name}-{edits}"
