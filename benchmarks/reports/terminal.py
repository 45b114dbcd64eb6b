"""Tables on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDEST = 1000  # columns


def show_table(console: Console, table: Table) -> None:
    """A table of numbers at its whole width: in a narrow terminal its lines wrap, which can be read; a number that is
    cut cannot."""
    from rich.segment import Segments

    wide = console.options.update(width=_WIDEST, max_width=_WIDEST)
    whole = max(console.width, console.measure(table, options=wide).maximum)
    console.print(Segments(console.render(table, wide.update(width=whole))), crop=False, soft_wrap=True, end="")
