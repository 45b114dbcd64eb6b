"""What the fields of a configuration and the arguments of a method mean, read from where they are written once.

The meaning of a field is the text below it in the source of its class. The meaning of an argument is the entry in the
Args section of the class that introduces it; `with_arguments` completes the docstrings of the classes built on it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

_SECTIONS = ("Attributes:", "Returns:", "Raises:")


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


def with_arguments(kind: type) -> str | None:
    """Return the docstring of a class with an Args section for its whole constructor.

    The section names the arguments in the order of the signature. Their texts come from the class itself and from its
    bases. None where the class has no docstring.
    """
    own = vars(kind).get("__doc__")
    if own is None:
        return None
    said: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        said |= _split_arguments(vars(owner).get("__doc__") or "")[1]
    named = [said[name] for name in inspect.signature(kind).parameters if name in said]
    before, _, behind = _split_arguments(own)
    section = "Args:\n" + "\n".join(named)
    return "\n\n".join(part for part in (before, section if named else "", behind) if part) + "\n"


def _split_arguments(docstring: str) -> tuple[str, dict[str, str], str]:
    """Split a docstring in Google style into what stands before its Args section, its entries by name, and the rest."""
    lines = inspect.cleandoc(docstring).splitlines()
    if "Args:" not in lines:  # other sections stand behind where it would be
        at = next((place for place, line in enumerate(lines) if line in _SECTIONS), len(lines))
        return "\n".join(lines[:at]).strip(), {}, "\n".join(lines[at:])
    start = lines.index("Args:")
    end = next((place for place in range(start + 1, len(lines)) if lines[place][:1].strip()), len(lines))
    entries = re.split(r"\n(?=    \w+: )", "\n".join(lines[start + 1 : end]).rstrip())
    named = {entry.split(":")[0].strip(): entry for entry in entries}
    return "\n".join(lines[:start]).strip(), named, "\n".join(lines[end:])
