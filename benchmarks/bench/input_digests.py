"""What a run reads besides its model and its cases, as digests: other bytes make another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errata import models
from errata.benchmarks.ability import ability
from errata.benchmarks.bench.composition import intervention_configs
from errata.benchmarks.bench.config import BenchConfig, editor_name
from errata.editors.core.config import EditorConfig
from errata.editors.core.errors import ConfigError
from errata.editors.core.files.atomic import digest_of_file
from errata.editors.core.model.model_settings import read_model_settings
from errata.editors.core.model.texts import FACTBOOK, text_file

NAMES = ("moments_text", "handed_in", "trained", "ability")
FURTHER = ("references", "judge", "interventions")  # which older runs did not read; absent where a run does not


def digests(config: BenchConfig, editor: EditorConfig) -> dict[str, Any]:
    """One for each of NAMES, and for those of FURTHER that the run reads.

    Raises:
        ConfigError: a file that was handed in does not exist.
    """
    return {
        "moments_text": _moments_text(config, editor),
        "handed_in": _handed_in(editor),
        "trained": _trained(config, editor),
        "ability": ability.digests(config.ability),
        **_further(config),
    }


def _further(config: BenchConfig) -> dict[str, Any]:
    """Digests of reference texts and of the model that judges."""
    found, references = {}, config.dataset.references
    if references is not None and Path(references).is_file():
        found["references"] = digest_of_file(Path(references))
    if config.wild.judge_model is not None:
        found["judge"] = models.fingerprint(config.wild.judge_model)
    if read := _intervention_texts(config):
        found["interventions"] = read
    return found


def _intervention_texts(config: BenchConfig) -> dict[str, str]:
    """Digests of the files that the interventions of a run read, by `role.field`."""
    from errata.editors.core.interventions.calibration import text_of

    found, folder = {}, models.locate(config.model.name)
    for role, own in intervention_configs(config).items():
        for name in own.TEXTS:
            file = text_file(text_of(folder, getattr(own, name)))
            if file is not None and file.is_file():
                found[f"{role}.{name}"] = digest_of_file(file)
    return found


def _moments_text(config: BenchConfig, editor: EditorConfig) -> str | None:
    """Digest of the file that the method reads where no other is named: for second moments, or as WISE and MEMOIR for
    sentences. None where it is a dataset of the hub, or the method reads none."""
    from errata.editors.core.families.locate_config import LocateThenEditConfig
    from errata.editors.core.families.locate_then_edit import text_for_moments

    folder = models.locate(config.model.name)
    source = getattr(editor, "mom2_dataset", None) or read_model_settings(folder).text
    if source is None and isinstance(editor, LocateThenEditConfig):
        source = text_for_moments(editor, folder) if editor.mom2_adjustment and editor.mom2_file is None else None
    elif source is None and _reads_a_text(editor):
        source = FACTBOOK
    file = None if source is None else text_file(source)
    return None if file is None or not file.is_file() else digest_of_file(file)


def _reads_a_text(editor: EditorConfig) -> bool:
    """Return whether a method reads the text that comes with errata where the model's folder brings none."""
    is_left_open = any(getattr(editor, name) is None for name in editor.TEXTS)
    return is_left_open or hasattr(editor, "mom2_dataset") or isinstance(getattr(editor, "warm_up", None), int)


def _handed_in(editor: EditorConfig) -> dict[str, str]:
    """Digests of the files that the method is to use, such as moments, requests, texts."""
    given = {name: getattr(editor, name) for name in editor.FILES}
    paths = {name: Path(path) for name, path in given.items() if isinstance(path, str)}
    if missing := [f"{name}: {path} does not exist" for name, path in paths.items() if not path.is_file()]:
        raise ConfigError(f"editor.{missing[0]}")
    for name in editor.TEXTS:
        text = getattr(editor, name)
        if text is not None and (file := text_file(text)) is not None and file.is_file():
            paths[name] = file
    return {name: digest_of_file(path) for name, path in paths.items()}


def _trained(config: BenchConfig, editor: EditorConfig) -> list[str] | None:
    """Of a method that is trained, digests of what it was trained to on this model."""
    from errata.editors.core.families.learned_editor import TrainedConfig, available_checkpoints

    if not isinstance(editor, TrainedConfig):
        return None
    model = models.fingerprint(config.model.name, config.model.revision)
    return available_checkpoints(editor, editor_name(config.editor), {"model": model})
