"""`errata export`: edits that were written, as an adapter, as a whole model, or on the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli import edit_folders
from errata.cli.messages import asked_for_help, counted, say
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.storage.edit_folder import Edits

OPTIONS = ("lora", "merged", "hub", "private", "rank", *edit_folders.OPTIONS)
HELP = """\
errata export FOLDER lora=adapter              one adapter of all its edits, for PEFT and what reads its adapters
errata export FOLDER merged=model              the edited model, with its tokenizer
errata export FOLDER hub=ME/NAME               a repository of the Hub that holds them; private=true
errata export FOLDER lora=adapter rank=512     cut down to this rank, with the error that this makes

FOLDER holds edits, as `errata edit` and `errata apply` write them, is the run of a sequence, or ORG/NAME of the Hub.
model=NAME says where its model is now; precision= and trust_remote_code= are as for `errata bench`; device=, the CPU.
"""


def export(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Edits of a folder, over the model that they were made on."""
    from errata.cli.overrides import words_and_options
    from errata.editors.core.storage.merged_export import check_free

    if asked_for_help(arguments, HELP, console, needs_some=True):
        return 0
    words, options = words_and_options(arguments, OPTIONS, "`errata export --help` shows what there is")
    wanted = {form: Path(options[form]) for form in ("lora", "merged") if form in options}
    if len(words) != 1 or not (wanted or "hub" in options):
        raise ConfigError("expected a folder of edits, and lora=FOLDER or merged=FOLDER or hub=ME/NAME")
    _refuse_idle(options)
    if len(wanted) > len({folder.resolve() for folder in wanted.values()}):
        raise ConfigError(f"lora and merged are both {options['lora']}; name two folders")
    private = edit_folders.is_true("private", options) if "private" in options else None
    for folder in wanted.values():
        check_free(folder)
    rank = edit_folders.whole("rank", options, least=1)
    edits = edit_folders.edits_in(words[0])
    if wanted:
        _write(edits, wanted, options, rank, console)
    if "hub" in options:
        say(console, f"{counted(len(edits), 'edit')}: {edits.push_to_hub(options['hub'], private=private)}")
    return 0


def _write(
    edits: Edits, wanted: Mapping[str, Path], options: Mapping[str, str], rank: int | None, console: Console
) -> None:
    """Folders for other programs, which take the model."""
    from errata.editors.core.storage.lora_export import write_lora
    from errata.editors.core.storage.merged_export import write_merged

    (model, tokenizer), entries = edit_folders.opened(edits, options), edits.entries
    if "lora" in wanted:
        made = write_lora(model, entries, wanted["lora"], rank=rank)
        error = max(made.errors.values())
        say(console, f"{counted(len(entries), 'edit')}, rank {made.rank}, error {error:.2g}: {made.folder}")
    if "merged" in wanted:
        written = write_merged(model, entries, wanted["merged"], tokenizer)
        say(console, f"the model with {counted(len(entries), 'edit')}: {written}")


def _refuse_idle(options: Mapping[str, str]) -> None:
    """Refuse an option that nothing of what is asked for would look at."""
    folders = ("lora", "merged")
    for name, users in (
        ("rank", ("lora",)),
        ("private", ("hub",)),
        *((name, folders) for name in edit_folders.OPTIONS),
    ):
        if name in options and not any(user in options for user in users):
            raise ConfigError(f"{name}= is for {'= and '.join(users)}=, which is not asked for")
