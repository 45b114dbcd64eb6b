"""`errata methods`: lists the methods, or shows one with its fields."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from errata import editors
from errata.cli.arguments import split_flags
from errata.cli.command import TOOLS, Command
from errata.cli.exit_codes import DONE
from errata.cli.method_sources import ClassSources
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.editor import Editor


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """List the registered methods, or show one."""
    names, _ = split_flags(arguments, COMMAND)
    if len(names) > 1:
        raise ConfigError(f"expected the name of one method, got {' '.join(names)!r}")
    if names:
        _show_one(names[0], console)
    else:
        _show_all(console)
    return DONE


def _show_all(console: Console) -> None:
    """Show every registered method in one line; one that cannot be imported is listed with the reason."""
    from rich.table import Table
    from rich.text import Text

    table, sources = Table("name", "subject", "method", box=None, padding=(0, 2)), ClassSources()
    for name in sorted(editors.METHODS):
        try:
            needs_subject, summary = _described(name, sources)
            table.add_row(name, "needed" if needs_subject else "-", Text(summary))
        except ConfigError as error:
            table.add_row(name, "", Text(str(error), style="red"))
    console.print(table)
    console.print("\n`errata methods NAME` shows a method's fields.", highlight=False)


def _described(name: str, sources: ClassSources) -> tuple[bool, str]:
    """Return whether a method needs a subject, and its first paragraph. Those of this package are not imported.

    Raises:
        ConfigError: The method of another package cannot be imported.
    """
    if (home := editors.home(name)) is not None:
        return sources.needs_subject(*home), sources.summary(*home)
    method = editors.get(name)
    return method.needs_subject, _paragraphs(method)[0]


def _show_one(name: str, console: Console) -> None:
    """Show what a method does, and its fields, its own first.

    Raises:
        ConfigError: There is no such method.
    """
    from rich.table import Table
    from rich.text import Text

    from errata.benchmarks.runs.hydra_grammar import written
    from errata.editors.core.config_docs import documented

    kind = editors.get(name)
    for paragraph in _paragraphs(kind):
        console.print(Text(paragraph), "")
    for owner, fields in groupby(documented(kind.Config), lambda field: field.owner):
        table = Table("field", "default", "meaning", box=None, padding=(0, 2, 0, 0))
        for field in fields:
            table.add_row(f"editor.{field.name}", Text(written(field.default)), Text(field.meaning))
        text = inspect.getdoc(owner) or f"{owner.__name__}("
        is_generated = text.startswith(f"{owner.__name__}(")  # by `dataclass`, where the class has no docstring
        console.print(Text("Its own fields." if is_generated else text.splitlines()[0], style="bold"))
        console.print(table, "")
    console.print(
        Text(
            "A model's folder (errata.json) or its YAML can change these defaults; the results.json of a run holds the "
            "values that it used."
        )
    )


def _paragraphs(kind: type[Editor]) -> list[str]:
    """Return the paragraphs of a method's docstring, without its section on arguments."""
    text = (inspect.getdoc(kind) or kind.__name__).partition("\nArgs:")[0]
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


COMMAND = Command(
    name="methods",
    usage=("", "METHOD"),
    summary="List the methods, or show one method with its fields.",
    group=TOOLS,
    run=run,
    notes=("Set a field by editor.FIELD=VALUE in `errata edit`, `errata bench`, `errata train` and `errata apply`.",),
    examples=("errata methods", "errata methods rome"),
    choices=lambda: sorted(editors.METHODS),
)
