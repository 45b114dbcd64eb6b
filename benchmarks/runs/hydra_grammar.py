"""Values and overrides as the grammar of Hydra reads them, and as a user types them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Overrides that the command line takes as plain text, whatever Hydra's grammar would make of them.
TEXT_KEYS = (
    "out",
    "dataset.path",
    "dataset.ids",
    "model.name",
    "model.revision",
    "model.settings",
    "device",
    "collapse.text",
    "ability.path",
    "text",
)
# Words that Hydra reads as they stand: they cannot be taken for numbers, null or booleans.
_PLAIN = re.compile(r"(?!(?i:null|true|false|nan|inf)$)[A-Za-z_./][A-Za-z0-9_./-]*")


def quoted(text: str) -> str:
    """Text as a quoted value of Hydra's grammar: a backslash counts only before a quote, `${` or the end."""
    body = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", text)
    body = re.sub(r"(\\+)\Z", lambda found: found[1] * 2, body)
    body = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", body)
    return f"'{body}'"


def written(value: Any) -> str:
    """A plain value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else quoted(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{quoted(str(key))}:{written(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(written, value)) + "]"
    return repr(value)


def override_name(line: str) -> str:
    """Return the name in `name=value`, without the plus signs of Hydra."""
    return line.lstrip("+").partition("=")[0]


def typed(line: str) -> str:
    """An override of Hydra's as one types it behind `errata bench`: paths and names without quotes."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(line)
    if override.key_or_group in TEXT_KEYS and override.value() is not None:
        return f"{override.key_or_group}={override.value()}"
    return line.lstrip("+")
