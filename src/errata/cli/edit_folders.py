"""Folders of edits as the commands name them, and the models that they are of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from errata.editors.core.storage.edit_folder import Edits

OPTIONS = ("model", "precision", "device", "trust_remote_code")  # of `opened`


def edits_in(name: str) -> Edits:
    """The edits of a folder, or of the run of a sequence.

    Raises:
        DamagedEditsError: they are not what was written.
        LedgerError: there are none.
    """
    from errata.benchmarks.bench.sequence_log import JOURNAL
    from errata.editors.core.storage.edit_folder import Edits
    from errata.editors.core.storage.record_format import MANIFEST

    run = Path(name) / JOURNAL
    return Edits.read(run if (run / MANIFEST).is_file() else name)


def opened(edits: Edits, options: Mapping[str, str], *, force: bool = False) -> tuple[Any, Any]:
    """The model that edits were made on, untouched, and its tokenizer.

    Args:
        edits: They say what it is called, and in what precision it was.
        options: As of `loaded`; `model` says where it is now.
        force: Also another one.

    Raises:
        ConfigError: it cannot be loaded.
        OtherBaseError: it is another one.
    """
    name = options.get("model") or edits.model.get("name")
    if not name:
        raise ConfigError("the edits do not say what model they are of; give model=NAME")
    revision = None if "model" in options else edits.model.get("revision")
    model, tokenizer = loaded(name, options, precision=edits.precision, revision=revision)
    if not force:
        edits.check(model, tokenizer)
    return model, tokenizer


def loaded(
    name: str, options: Mapping[str, str], *, precision: str | None = None, revision: str | None = None
) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Args:
        name: As `errata.load` takes it.
        options: `precision` says what to load it in, `device` where to (the CPU); `trust_remote_code=true` runs the
            code that comes with it.
        precision: Where the options have none.
        revision: Of a Hugging Face id.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from errata import models

    return models.load(
        name,
        dtype=options.get("precision") or precision,
        device=options.get("device", "cpu"),
        revision=revision,
        trust_remote_code=is_true("trust_remote_code", options),
    )


def whole(name: str, options: Mapping[str, str], *, least: int = 0) -> int | None:
    """An option that is a whole number; None where it is not given.

    Raises:
        ConfigError: it is none, or below the least.
    """
    if name not in options:
        return None
    if not options[name].isdecimal():
        raise ConfigError(f"{name}: expected a number, got {options[name]!r}")
    if int(options[name]) < least:
        raise ConfigError(f"{name}: expected at least {least}, got {options[name]}")
    return int(options[name])


def is_true(name: str, options: Mapping[str, str]) -> bool:
    """An option that is true or false, and false where it is not given.

    Raises:
        ConfigError: it is neither.
    """
    value = options.get(name, "false").lower()
    if value not in ("true", "false"):
        raise ConfigError(f"{name}: expected true or false, got {value!r}")
    return value == "true"
