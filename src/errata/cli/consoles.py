"""The consoles of the command line: no name that they show can act on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.segment import Segment

from errata.benchmarks.reports.escaping import without_controls

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderableType


class PlainConsole(Console):
    """A console that leaves out control characters of texts. Its own colours and bars are no texts."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            is_plain = segment.control is None and not segment.text.isprintable()
            yield segment._replace(text=without_controls(segment.text)) if is_plain else segment
