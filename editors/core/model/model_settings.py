"""Read the settings that a model's own folder has for editing it, from an `errata.json` beside the weights:

    {"text": "text.jsonl.gz",                    # sample text, for second moments
     "perplexity_text": "heldout.jsonl.gz",      # text to measure damage on; "text" if it is missing
     "editors": {"rome": {"layers": [1]}}}       # fields of a method's Config that differ from its defaults here

All entries are optional, and so is the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError
from errata.editors.core.files.plain_files import read_json

FILE = "errata.json"
LOADED_AS = "errata_asked_for"  # attribute of a loaded model with the name that it was loaded by, such as "world"
DEQUANTISED_FROM = "errata_dequantised_from"  # attribute with the types of its weights in a quantised file
_ENTRIES = ("text", "perplexity_text", "editors")


@dataclass(frozen=True)
class ModelSettings:
    """The content of an errata.json. Its paths are existing files inside the folder."""

    text: Path | None = None
    perplexity_text: Path | None = None
    editors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_model_settings(source: Any) -> ModelSettings:
    """Return the settings of a loaded model (found by its `name_or_path`) or of a folder; empty if there is no file.

    Raises:
        ConfigError: the file is not a JSON object with these entries, or it names a file that is missing or outside
            the folder.
    """
    folder = source if isinstance(source, (str, Path)) else getattr(source, "name_or_path", None)
    path = Path(folder) / FILE if folder else None
    if path is None or not path.is_file():
        return ModelSettings()
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected an object, got {type(content).__name__}")
    for name in content:
        if name not in _ENTRIES:
            raise ConfigError(f"{path}: unknown entry {name!r}{did_you_mean(name, _ENTRIES)}")
    editors = content.get("editors", {})
    if not isinstance(editors, dict) or not all(isinstance(values, dict) for values in editors.values()):
        raise ConfigError(f'{path}: expected "editors" to be an object of objects, got {editors!r}')
    for name, values in editors.items():
        if "mom2_dataset" in values:
            raise ConfigError(f'{path}: editors.{name} names a text of its own; name one under "text", in the folder')
        if elsewhere := {"mom2_file", "projector_file"} & values.keys():
            raise ConfigError(f"{path}: editors.{name} names a file elsewhere; give {elsewhere.pop()} where you edit")
    text = _file(path, content, "text")
    return ModelSettings(text, _file(path, content, "perplexity_text") or text, editors)


def _file(path: Path, content: Mapping[str, Any], entry: str) -> Path | None:
    if (name := content.get(entry)) is None:
        return None
    folder = path.parent.resolve()
    file = (folder / str(name)).resolve()
    if not file.is_relative_to(folder) or not file.is_file():
        raise ConfigError(f"{path}: {entry} names {name!r}; expected a file inside the folder")
    return file
