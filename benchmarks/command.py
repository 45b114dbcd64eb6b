"""A run's configuration as the command line that repeats it."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from errata.benchmarks.config import BenchConfig
from errata.editors.core.config import EditorConfig

# Overrides that the command line takes as plain text, whatever Hydra's grammar would make of them.
TEXT_KEYS = ("out", "dataset.path", "dataset.ids", "model.name", "model.revision", "collapse.text")
# Words that Hydra reads as they stand: they cannot be taken for numbers, null or booleans.
_PLAIN = re.compile(r"(?!(?i:null|true|false|nan|inf)$)[A-Za-z_./][A-Za-z0-9_./-]*")


def quoted(text: str) -> str:
    """Text as a quoted value of Hydra's grammar: a backslash counts only before a quote, `${` or the end."""
    body = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    body = re.sub(r"(\\+)\Z", lambda found: found[1] * 2, body)
    body = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", body)
    return f"'{body}'"


def command(config: BenchConfig, editor: EditorConfig) -> str:
    """`errata bench ...` with everything that differs from the defaults, the method's fields by their final values."""
    words = ["errata", "bench", f"editor={config.editor['name']}", f"model={config.model.name}"]
    words += [f"dataset={config.dataset.name}", f"protocol={config.protocol.name}"]
    defaults = type(editor)(seed=config.seed).to_dict()
    different = {name: value for name, value in editor.to_dict().items() if value != defaults[name]}
    words += [f"editor.{name}={_value(value)}" for name, value in different.items()]
    for name, value, default in _fields(config):
        if value != default:
            words.append(f"{name}={value if name in TEXT_KEYS and value is not None else _value(value)}")
    return shlex.join(words)


def _fields(config: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, value and default of every field that is neither a group's choice nor the editor's."""
    for field in dataclasses.fields(config):
        name, value = f"{path}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{name}.")
        elif name not in ("editor", "model.name", "model.editors", "dataset.name", "protocol.name"):
            # A dataset's YAML may choose to shuffle, so the choice is always said.
            yield name, value, dataclasses.MISSING if name == "dataset.shuffle" else field.default


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else quoted(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{quoted(str(key))}:{_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_value, value)) + "]"
    return repr(value)
