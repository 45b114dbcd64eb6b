"""`errata list`: shows the edits of a folder. It needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.counts import count_of
from errata.benchmarks.reports.terminal import show_table
from errata.cli import edit_folders
from errata.cli.arguments import parse
from errata.cli.command import AS_JSON, FILES, Command
from errata.cli.exit_codes import DONE
from errata.cli.fact_display import facts_in_one_line
from errata.cli.messages import show_json

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.storage.edit_folder import Edits


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Show the edits of a folder, one row per edit."""
    given = parse(arguments, COMMAND)
    edits = edit_folders.edits_in(edit_folders.only_folder(given.words))
    if given.flags:
        show_json(_as_dict(edits), console)
    else:
        _show(edits, console)
    return DONE


def _show(edits: Edits, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from errata.editors.core.algebra.derivation import described
    from errata.editors.core.storage.readme_card import scores_in

    revision = f" at {edits.model['revision']}" if edits.model.get("revision") else ""
    model = edits.model.get("name") or "a model without a name"
    console.print(Text(f"{count_of(len(edits), 'edit')} of {model}{revision}"))
    table = Table("id", "ids of its facts", "facts", "p(answer)", box=None, padding=(0, 3, 0, 0), pad_edge=False)
    for entry in edits.entries:
        scores = scores_in(edits.notes.get(entry.id))
        shares = [f"{score['before']:.3f} → {score['after']:.3f}" for score in scores.values()]
        names = ", ".join(str(request.id) for request in entry.info.requests[:3])
        share = shares[0] if len(shares) == 1 else ""
        formula = described(entry.info.derived)
        facts = "; ".join(filter(None, (facts_in_one_line(entry.info.requests), formula and f"= {formula}")))
        table.add_row(*map(Text, (entry.id, names, facts, share)))
    show_table(console, table)


def _as_dict(edits: Edits) -> dict[str, Any]:
    from errata.editors.core.storage.record_format import info_to_json

    found = [(entry.id, info_to_json(entry.info), edits.notes.get(entry.id, {})) for entry in edits.entries]
    return {
        "model": dict(edits.model),
        "base": dict(edits.base),
        "edits": [{"id": id_, **info, **notes} for id_, info, notes in found],
    }


COMMAND = Command(
    name="list",
    usage=("EDITS",),
    summary="List the edits in a folder.",
    group=FILES,
    run=run,
    options=(AS_JSON,),
    notes=(
        edit_folders.WHAT_HOLDS_EDITS,
        "`errata check` asks the model whether the edits hold; `errata export` writes them for other programs.",
    ),
    examples=("errata list facts.edits",),
    needs_arguments=True,
)
