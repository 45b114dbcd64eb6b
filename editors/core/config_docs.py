"""What the fields of a configuration mean: the text that stands below each field, read from its class's source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from typing import Any


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a configuration.

    Attributes:
        kind: Its type, as written.
        default: None where it has none, too.
        meaning: The text below it, in one line.
        owner: The class that says so, the method's own or one that it builds on.
    """

    name: str
    kind: str
    default: Any
    meaning: str
    owner: type


def documented(config: type) -> list[Field]:
    """The fields of a configuration's dataclass, those of the method itself first, and what is said of each."""
    said: dict[str, tuple[type, str, str]] = {}
    for owner in config.__mro__:
        if dataclasses.is_dataclass(owner):
            for name, kind, meaning in _texts(owner):
                first = said.setdefault(name, (owner, kind, meaning))
                said[name] = (first[0], first[1], first[2] or meaning)  # a new default may leave the text to its base
    defaults = {field.name: _default(field) for field in dataclasses.fields(config)}
    return [Field(name, kind, defaults[name], text, owner) for name, (owner, kind, text) in said.items()]


def _texts(owner: type) -> list[tuple[str, str, str]]:
    """(name, type, text) of the fields that a class writes down itself, in order."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    except (OSError, TypeError):  # made where there is no file, as in a notebook
        return [(name, str(kind), "") for name, kind in inspect.get_annotations(owner).items()]
    assert isinstance(tree, ast.ClassDef)
    found = []
    for entry, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
            kind = ast.unparse(entry.annotation)
            if not kind.startswith("ClassVar"):
                found.append((entry.target.id, kind, _text(following)))
    return found


def _text(entry: ast.stmt | None) -> str:
    """The text, if that is what the statement is."""
    if isinstance(entry, ast.Expr) and isinstance(entry.value, ast.Constant) and isinstance(entry.value.value, str):
        return " ".join(entry.value.value.split())
    return ""


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
