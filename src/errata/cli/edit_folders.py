"""Folders of edits as the commands name them, and the models that the edits were made on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.arguments import is_true
from errata.cli.command import Option
from errata.editors.core.errors import ConfigError, DamagedEditsError
from errata.editors.core.storage import hub

if TYPE_CHECKING:
    from errata.editors.core.storage.edit_folder import Edits

MODEL_OPTIONS = (
    Option("model=NAME", "where the model is now, if it is not where the edits say"),
    Option("precision=float32", "precision of the weights; by default the one that the edits were made in"),
    Option("device=cuda", "where to load the model; by default the CPU"),
    Option("trust_remote_code=true", "run the code that comes with the model", ("true", "false")),
)
MODEL_NAMES = tuple(word[:-1] for option in MODEL_OPTIONS for word in option.words)
WHAT_HOLDS_EDITS = (
    "EDITS is a folder that `errata edit` or `errata apply` wrote, the folder of a sequential run, or ORG/NAME on\n"
    "the Hugging Face Hub."
)


def edits_in(name: str) -> Edits:
    """Read the edits of a folder, of a sequential run, or of a repository of the Hub.

    Raises:
        DamagedEditsError: The files are not what was written.
        LedgerError: There are no edits.
    """
    if not Path(name).exists() and not hub.is_id(name):  # before torch is loaded, which takes seconds
        path = Path(name) / "manifest.json"
        raise DamagedEditsError("there is no such folder; expected a folder of edits", path=path)

    from errata.benchmarks.bench.sequence_log import JOURNAL
    from errata.editors.core.storage.edit_folder import Edits
    from errata.editors.core.storage.record_format import MANIFEST

    run = Path(name) / JOURNAL
    return Edits.read(run if (run / MANIFEST).is_file() else name)


def only_folder(words: Sequence[str]) -> str:
    """Return the one folder among the words of a command.

    Raises:
        ConfigError: There is none, or more than one.
    """
    if len(words) != 1:
        raise ConfigError(f"expected one folder of edits, got {len(words)}")
    return words[0]


def load_model_of(edits: Edits, values: Mapping[str, str], *, force: bool = False) -> tuple[Any, Any]:
    """Load the untouched model that edits were made on, with its tokenizer.

    Args:
        edits: They name the model and its precision.
        values: As in `load_model`; `model` says where it is now.
        force: Accept another model, too.

    Raises:
        ConfigError: It cannot be loaded.
        OtherBaseError: It is another model.
    """
    name = values.get("model") or edits.model.get("name")
    if not name:
        raise ConfigError("the edits do not name the model that they were made on; give model=NAME")
    revision = None if "model" in values else edits.model.get("revision")
    model, tokenizer = load_model(name, values, precision=edits.precision, revision=revision)
    if not force:
        edits.check(model, tokenizer)
    return model, tokenizer


def load_model(
    name: str, values: Mapping[str, str], *, precision: str | None = None, revision: str | None = None
) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Args:
        name: As `errata.load` takes it.
        values: `precision` of the weights, `device` (the CPU by default), and `trust_remote_code`.
        precision: The precision where `values` has none.
        revision: Branch, tag or commit of a Hugging Face id.

    Raises:
        ConfigError: It cannot be loaded.
    """
    from errata import models

    return models.load(
        name,
        dtype=values.get("precision") or precision,
        device=values.get("device", "cpu"),
        revision=revision,
        trust_remote_code=is_true("trust_remote_code", values),
    )
