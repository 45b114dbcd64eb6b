"""`errata merge`: puts the edits of two folders into a new one. It needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from errata.benchmarks.reports.counts import count_of
from errata.cli import edit_folders
from errata.cli.arguments import parse
from errata.cli.command import FILES, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.messages import say
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

PREFER = ("first", "second")
HOW = (
    "join",
    "sum",
    "ties",
    "mergekit_task_arithmetic",
    "mergekit_ties",
    "mergekit_ties_count",
    "mergekit_breadcrumbs",
    "mergekit_breadcrumbs_ties",
    "mergekit_dare_linear",
    "mergekit_dare_ties",
)


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Write the edits of two folders as a new folder."""
    given = parse(arguments, COMMAND)
    if len(given.words) != 2 or "out" not in given.values:
        raise ConfigError(
            f"expected two folders of edits, and out=FOLDER, a new one; got {count_of(len(given.words), 'folder')}"
            f"{'' if 'out' in given.values else ' and no out='}"
        )
    out, prefer, how = given.values["out"], given.values.get("prefer"), given.values.get("how", "join")
    if prefer not in (None, *PREFER):
        raise ConfigError(f"prefer: expected first or second, got {prefer!r}")

    from errata.editors.core.algebra.rule_texts import merge_rule_of_text
    from errata.editors.core.storage.merged_export import check_free
    from errata.editors.core.storage.merging import merge, merge_into_one

    check_free(Path(out))
    rule = None if how in ("join", "sum") else merge_rule_of_text(how)
    first, second = (edit_folders.edits_in(word) for word in given.words)
    preferred = cast(Literal["first", "second"] | None, prefer)
    if how == "join":
        both = merge(first, second, prefer=preferred)
    else:
        both = merge_into_one(first, second, rule, prefer=preferred)
    both.write(out)
    say(console, f"{count_of(len(both), 'edit')}, from {len(first)} and {len(second)}: {out}")
    say(console, "they were computed apart from each other: `errata check` shows which still hold together")
    return DONE


COMMAND = Command(
    name="merge",
    usage=("EDITS EDITS out=FOLDER",),
    summary="Put the edits of two folders into a new one.",
    group=FILES,
    run=run,
    options=(
        Option("out=FOLDER", "the new folder"),
        Option(
            "prefer=first",
            "first or second: the folder whose answer counts where the two contradict each other",
            PREFER,
        ),
        Option("how=join", "join keeps every edit; sum, or a rule such as ties:0.2, makes one edit of all", HOW),
    ),
    notes=(
        "A rule is for folders whose edits contradict each other in the weights: ties, or one of mergekit's merges.\n"
        "It sees the sum of each folder's edits.",
        "Without prefer=, two answers to one question are an error.",
        edit_folders.WHAT_HOLDS_EDITS,
    ),
    examples=(
        "errata merge facts.edits others.edits out=both.edits",
        "errata merge facts.edits others.edits how=ties:0.5 out=one.edit",
    ),
    needs_arguments=True,
)
