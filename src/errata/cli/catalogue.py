"""`errata methods`: which methods there are; `errata methods NAME`: what one is, and each of its fields."""

from __future__ import annotations

import inspect
from itertools import groupby
from typing import TYPE_CHECKING

from errata import editors
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.editor import Editor


def show_all(console: Console) -> None:
    """Every registered method in one line; one that its package cannot give is listed with the reason."""
    from rich.table import Table
    from rich.text import Text

    table = Table("name", "method", box=None, padding=(0, 2))
    for name in sorted(editors.METHODS):
        try:
            said = Text(_paragraphs(editors.get(name))[0])
        except ConfigError as error:
            said = Text(str(error), style="red")
        table.add_row(name, said)
    console.print(table)
    console.print("\n`errata methods NAME` shows a method's fields.", highlight=False)


def show_one(name: str, console: Console) -> None:
    """What the method says of itself, and its fields, its own first.

    Raises:
        ConfigError: there is no such method.
    """
    from rich.table import Table
    from rich.text import Text

    from errata.benchmarks.bench.hydra_grammar import written
    from errata.editors.core.config_docs import documented

    kind = editors.get(name)
    for paragraph in _paragraphs(kind):
        console.print(Text(paragraph), "")
    for owner, fields in groupby(documented(kind.Config), lambda field: field.owner):
        table = Table("field", "default", "meaning", box=None, padding=(0, 2, 0, 0))
        for field in fields:
            table.add_row(f"editor.{field.name}", Text(written(field.default)), Text(field.meaning))
        said = inspect.getdoc(owner) or f"{owner.__name__}("
        made_up = said.startswith(f"{owner.__name__}(")  # by `dataclass`, where the class has no text
        console.print(Text("Its own fields." if made_up else said.splitlines()[0], style="bold"))
        console.print(table, "")
    console.print(
        Text("A model's folder (errata.json) or YAML may say otherwise; a run's results.json holds what it ran with.")
    )


def _paragraphs(kind: type[Editor]) -> list[str]:
    """The paragraphs of a method's docstring, without what it says of arguments."""
    text = (inspect.getdoc(kind) or kind.__name__).partition("\nArgs:")[0]
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]
