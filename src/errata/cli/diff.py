"""`errata diff`: shows how two folders of edits differ. It needs no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.benchmarks.reports.counts import count_of
from errata.cli import edit_folders
from errata.cli.arguments import parse
from errata.cli.command import AS_JSON, FILES, Command
from errata.cli.exit_codes import DIFFERENT, DONE
from errata.cli.fact_display import fact_line
from errata.cli.messages import say, show_json
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.request import EditRequest


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Show what the second folder adds, removes, changes and makes by another edit."""
    given = parse(arguments, COMMAND)
    if len(given.words) != 2:
        raise ConfigError(f"expected two folders of edits, got {len(given.words)}")

    from errata.editors.core.storage.merging import compare

    found = compare(*(edit_folders.edits_in(word) for word in given.words))
    code = DONE if found.is_none else DIFFERENT
    if given.flags:
        show_json(dataclasses.asdict(found), console)
        return code
    for request in found.removed:
        _show_fact("-", "red", request, "", console)
    for request in found.added:
        _show_fact("+", "green", request, "", console)
    for before, now in found.changed:
        _show_fact("~", "yellow", now, f", was {before.target}", console)
    for _, now in found.remade:
        _show_fact("=", "yellow", now, ", by another edit", console)
    say(console, f"{count_of(found.same, 'edit')} {'is' if found.same == 1 else 'are'} the same")
    return code


def _show_fact(sign: str, colour: str, request: EditRequest, remark: str, console: Console) -> None:
    from rich.text import Text

    console.print(Text.assemble((f"{sign} ", colour), fact_line(request), (remark, "dim")), soft_wrap=True)


COMMAND = Command(
    name="diff",
    usage=("EDITS EDITS",),
    summary="Show how two folders of edits differ.",
    group=FILES,
    run=run,
    options=(AS_JSON,),
    notes=(
        "The signs compare the second folder with the first: + a new fact, - a missing fact, ~ a fact with another\n"
        "answer, = the same fact by another edit.",
        edit_folders.WHAT_HOLDS_EDITS,
    ),
    examples=("errata diff facts.edits others.edits",),
    exit_codes=((DIFFERENT, "the folders differ"),),
    needs_arguments=True,
)
