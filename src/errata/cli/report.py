"""`errata report`: writes tables, pictures and one page about all finished runs in a folder."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli.arguments import parse
from errata.cli.command import MEASURE, Command, Option
from errata.cli.exit_codes import DONE
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Write the report and show where it is."""
    from rich.text import Text

    given = parse(arguments, COMMAND)
    if len(given.words) != 1:
        raise ConfigError(f"expected a folder of runs, and perhaps out=FOLDER for the report, got {list(arguments)}")

    from errata.benchmarks.reports.publish import publish

    out = Path(given.values["out"]) if "out" in given.values else None
    page, *others = publish(Path(given.words[0]), out, command=shlex.join(["errata", "report", *arguments]))
    console.print(Text.assemble(("page     ", "dim"), str(page)), soft_wrap=True)
    console.print(Text.assemble(("beside   ", "dim"), ", ".join(path.name for path in others)), soft_wrap=True)
    return DONE


COMMAND = Command(
    name="report",
    usage=("DIR [out=FOLDER]",),
    summary="Write tables, pictures and one page about all finished runs in a folder.",
    group=MEASURE,
    run=run,
    options=(Option("out=FOLDER", "where the report goes; by default DIR/report"),),
    notes=(
        "The report is index.html, one page that you can send to others. Beside it are the tables (Markdown, LaTeX,\n"
        "CSV, Parquet) and the pictures.",
    ),
    examples=("errata report runs",),
)
