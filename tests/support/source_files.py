"""The library's own files as text and syntax trees, for tests that read them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("editors", "evaluate", "benchmarks", "hparams", "src/errata")


class Source(NamedTuple):
    """One file: its path from the root, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return parsed(self.text)

    @property
    def module(self) -> str:
        """The name under which it is imported."""
        parts = self.path.removeprefix("src/errata/").removesuffix(".py").split("/")
        return ".".join(["errata", *(part for part in parts if part != "__init__")])


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def library() -> list[Source]:
    """Every Python file of the library, each once, although src/errata links to the other folders."""
    found = []
    for folder in FOLDERS:
        for path in sorted(ROOT.joinpath(folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if not any((ROOT / parent).is_symlink() for parent in relative.parents):
                found.append(Source(relative.as_posix(), path.read_text(encoding="utf-8")))
    return found


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported, the imports inside functions and for types included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imports_when_run(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """As `imports`, without those under `if TYPE_CHECKING:`."""
    for_types: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for_types.update(line for part in node.body for line in range(part.lineno, (part.end_lineno or 0) + 1))
    yield from ((line, name) for line, name in imports(tree) if line not in for_types)
