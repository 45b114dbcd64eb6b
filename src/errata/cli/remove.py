"""`errata remove`: removes edits from a folder. It needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from errata.benchmarks.reports.counts import count_of
from errata.cli import edit_folders
from errata.cli.arguments import parse
from errata.cli.command import FILES, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.fact_display import facts_in_one_line
from errata.cli.messages import say
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.ledger.entry import Entry
    from errata.editors.core.storage.edit_folder import Edits


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Remove edits from a folder, or write a copy without them."""
    given = parse(arguments, COMMAND)
    folder, out = edit_folders.only_folder(given.words), given.values.get("out")
    if not given.values.get("id"):
        raise ConfigError("expected id=ID, of an edit or of its fact; `errata list` shows them")

    from errata.editors.core.storage.edit_folder import Edits, hold

    if out is None and not Edits.are_in(folder):
        raise ConfigError(f"{folder} is not itself a folder of edits; give out=FOLDER for a copy without these")
    with nullcontext() if out is not None else hold(folder):
        edits = edit_folders.edits_in(folder)
        gone = _find(edits, given.values["id"])
        left = edits.without(entry.id for entry in gone)
        written = left.write(out) if out is not None else left.rewrite(folder)
    for entry in gone:
        say(console, f"- {entry.id}: {facts_in_one_line(entry.info.requests)}")
    say(console, f"{count_of(len(left), 'edit')} left: {written}")
    return DONE


def _find(edits: Edits, ids: str) -> list[Entry]:
    """Return the edits of these ids. A single id may hold a comma, and so the whole text is tried first."""
    there = {name for entry in edits.entries for name in (entry.id, *(request.id for request in entry.info.requests))}
    return [edits.find(name) for name in ([ids] if ids in there else ids.split(","))]


COMMAND = Command(
    name="remove",
    usage=("EDITS id=ID[,ID ...]",),
    summary="Remove edits from a folder.",
    group=FILES,
    run=run,
    options=(
        Option("id=ID[,ID]", "the edits, by their own ids or by those of their facts; `errata list` shows both"),
        Option("out=FOLDER", "write a copy without them to a new folder; EDITS stays as it is"),
    ),
    notes=(edit_folders.WHAT_HOLDS_EDITS,),
    examples=("errata remove facts.edits id=gavaria",),
    needs_arguments=True,
)
