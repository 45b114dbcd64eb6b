"""The commands that look at folders of edits and put them together: `errata list`, `diff`, `merge` and `remove`.

None of them needs a model: a folder says of what weights its edits are.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from errata.benchmarks.reports.terminal import show_table
from errata.cli import edit_folders
from errata.cli.messages import asked_for_help, counted, say
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.ledger.entry import Entry
    from errata.editors.core.storage.edit_folder import Edits

HELP = """\
errata list EDITS [--json]                     what a folder of edits holds
errata diff EDITS EDITS [--json]               what the second has that the first has not; exit code 3 if anything
errata merge EDITS EDITS out=FOLDER            both in a new folder; prefer=first or second where they contradict
errata remove EDITS id=ID[,ID] [out=FOLDER]    without some, by the id of an edit or of its fact; in place, or as a copy

EDITS is a folder as `errata edit` and `errata apply` write it, the run of a sequence, or ORG/NAME of the Hub. To put
edits on a model: `errata export`; to ask whether they hold: `errata check`.
"""
DIFFERENT = 3
ADVICE = "`errata list --help` shows what there is"


def list_edits(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """A line an edit."""
    from errata.cli.reading import parted, show_json

    if asked_for_help(arguments, HELP, console, needs_some=True):
        return 0
    words, as_json = parted(arguments)
    edits = edit_folders.edits_in(_one_of(words))
    if as_json:
        show_json(_as_dict(edits), console)
    else:
        _show(edits, console)
    return 0


def diff(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """What tells two folders apart."""
    import dataclasses

    from rich.text import Text

    from errata.cli.applying import said
    from errata.cli.reading import parted, show_json
    from errata.editors.core.storage.merging import compare

    if asked_for_help(arguments, HELP, console, needs_some=True):
        return 0
    words, as_json = parted(arguments)
    if len(words) != 2:
        raise ConfigError(f"expected two folders of edits, got {len(words)}")
    found = compare(*(edit_folders.edits_in(word) for word in words))
    if as_json:
        show_json(dataclasses.asdict(found), console)
        return 0 if found.is_none else DIFFERENT
    for sign, colour, requests in (("-", "red", found.removed), ("+", "green", found.added)):
        for request in requests:
            console.print(Text.assemble((f"{sign} ", colour), said(request)), soft_wrap=True)
    for before, now in found.changed:
        console.print(Text.assemble(("~ ", "yellow"), said(now), (f", was {before.target}", "dim")), soft_wrap=True)
    for _, now in found.remade:
        console.print(Text.assemble(("= ", "yellow"), said(now), (", by another edit", "dim")), soft_wrap=True)
    console.print(Text(f"{counted(found.same, 'edit')} {'is' if found.same == 1 else 'are'} the same"))
    return 0 if found.is_none else DIFFERENT


def merge(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Two folders as a new one."""
    from errata.cli.overrides import words_and_options
    from errata.editors.core.storage.merged_export import check_free
    from errata.editors.core.storage.merging import merge

    if asked_for_help(arguments, HELP, console, needs_some=True):
        return 0
    words, options = words_and_options(arguments, ("out", "prefer"), ADVICE)
    if len(words) != 2 or "out" not in options:
        raise ConfigError("expected two folders of edits and out=FOLDER, a new one")
    prefer = options.get("prefer")
    if prefer not in (None, "first", "second"):
        raise ConfigError(f"prefer: expected first or second, got {prefer!r}")
    check_free(Path(options["out"]))
    first, second = (edit_folders.edits_in(word) for word in words)
    both = merge(first, second, prefer=cast(Literal["first", "second"] | None, prefer))
    both.write(options["out"])
    say(console, f"{counted(len(both), 'edit')}, of which {len(first)} and {len(second)}: {options['out']}")
    say(console, "none was computed knowing the others: `errata check` says which still hold")
    return 0


def remove(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """A folder without some of its edits."""
    from errata.cli.overrides import words_and_options
    from errata.editors.core.storage.edit_folder import Edits, hold

    if asked_for_help(arguments, HELP, console, needs_some=True):
        return 0
    words, options = words_and_options(arguments, ("id", "out"), ADVICE)
    folder = _one_of(words)
    if not options.get("id"):
        raise ConfigError("expected id=ID, of an edit or of its fact; `errata list` shows them")
    if "out" not in options and not Edits.are_in(folder):
        raise ConfigError(f"{folder} is no folder of edits by itself; give out=FOLDER for a copy without these")
    with nullcontext() if "out" in options else hold(folder):
        edits = edit_folders.edits_in(folder)
        gone = _found(edits, options["id"])
        left = edits.without(entry.id for entry in gone)
        written = left.write(options["out"]) if "out" in options else left.rewrite(folder)
    for entry in gone:
        say(console, f"- {entry.id}: {_facts(entry.requests)}")
    say(console, f"{counted(len(left), 'edit')} left: {written}")
    return 0


def _found(edits: Edits, ids: str) -> list[Entry]:
    """The edits of these ids. An id may hold a comma itself, and so the whole is tried first."""
    there = {name for entry in edits.entries for name in (entry.id, *(request.id for request in entry.requests))}
    return [edits.find(name) for name in ([ids] if ids in there else ids.split(","))]


def _one_of(words: Sequence[str]) -> str:
    if len(words) != 1:
        raise ConfigError(f"expected one folder of edits, got {len(words)}")
    return words[0]


def _show(edits: Edits, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from errata.editors.core.storage.readme_card import scores_in

    revision = f" at {edits.model['revision']}" if edits.model.get("revision") else ""
    model = edits.model.get("name") or "a model without a name"
    console.print(Text(f"{counted(len(edits), 'edit')} of {model}{revision}"))
    table = Table("id", "of its fact", "facts", "p(answer)", box=None, padding=(0, 3, 0, 0), pad_edge=False)
    for entry in edits.entries:
        scores = scores_in(edits.notes.get(entry.id))
        shares = [f"{said['before']:.3f} → {said['after']:.3f}" for said in scores.values()]
        names = ", ".join(str(request.id) for request in entry.requests[:3])
        table.add_row(*map(Text, (entry.id, names, _facts(entry.requests), shares[0] if len(shares) == 1 else "")))
    show_table(console, table)


def _facts(requests: Sequence[Any]) -> str:
    shown = "; ".join(f"{' '.join(request.text.split())} → {request.target}" for request in requests[:3])
    return shown + (f" and {len(requests) - 3} more" if len(requests) > 3 else "")


def _as_dict(edits: Edits) -> dict[str, Any]:
    return {
        "model": dict(edits.model),
        "base": dict(edits.base),
        "edits": [{"id": e.id, **e.meta, **edits.notes.get(e.id, {})} for e in edits.entries],
    }
