"""`errata export`: writes saved edits as a LoRA adapter, as an edited model, or to the Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.benchmarks.reports.counts import count_of
from errata.cli import edit_folders
from errata.cli.arguments import is_true, parse, whole_number
from errata.cli.command import FILES, Command, Option
from errata.cli.edit_folders import MODEL_NAMES
from errata.cli.exit_codes import DONE
from errata.cli.messages import say
from errata.editors.core.config import choose
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from errata.editors.core.model.tokens import Tokenizer
    from errata.editors.core.storage.edit_folder import Edits


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Write the edits of a folder in the forms that were asked for."""
    given = parse(arguments, COMMAND)
    values = given.values
    wanted = {form: Path(values[form]) for form in ("lora", "merged") if form in values}
    if len(given.words) != 1 or not (wanted or "hub" in values):
        raise ConfigError("expected a folder of edits, and lora=FOLDER or merged=FOLDER or hub=ME/NAME")
    _refuse_unused(values)
    if len(wanted) > len({folder.resolve() for folder in wanted.values()}):
        raise ConfigError(f"lora and merged are both {values['lora']}; name two folders")
    private = is_true("private", values) if "private" in values else None

    from errata.editors.core.storage.merged_export import check_free

    for folder in wanted.values():
        check_free(folder)
    rank = whole_number("rank", values, least=1)
    edits = edit_folders.edits_in(given.words[0])
    if wanted:
        _write(edits, wanted, values, rank, console)
    if "hub" in values:
        say(console, f"{count_of(len(edits), 'edit')}: {edits.push_to_hub(values['hub'], private=private)}")
    return DONE


def _write(
    edits: Edits, wanted: Mapping[str, Path], values: Mapping[str, str], rank: int | None, console: Console
) -> None:
    """Write the forms that need the model: an adapter, an edited model, or both."""
    from errata.editors.core.storage.lora_export import write_lora
    from errata.editors.core.storage.merged_export import write_merged

    force = is_true("force", values)
    (model, tokenizer), entries = _load(edits, values, force=force), edits.entries
    if "lora" in wanted:
        made = write_lora(model, entries, wanted["lora"], rank=rank)
        error = max(made.errors.values())
        say(console, f"{count_of(len(entries), 'edit')}, rank {made.rank}, error {error:.2g}: {made.folder}")
    if "merged" in wanted:
        written = write_merged(model, entries, wanted["merged"], tokenizer)
        say(console, f"the model with {count_of(len(entries), 'edit')}: {written}")
        if force:
            _say_what_is_restored(edits, model, console)


def _load(edits: Edits, values: Mapping[str, str], *, force: bool) -> tuple[nn.Module, Tokenizer]:
    """Load the untouched model that edits were made on, in the precision that was asked for.

    It is checked in the precision that the edits were made in, as rounded weights have other bytes, and rounded then.
    The factors of an adapter are not rounded, so that for one no other precision is taken.
    """
    asked, made_in = values.get("precision"), edits.precision
    if force or "lora" in values or asked is None or made_in is None or asked == made_in:
        return edit_folders.load_model_of(edits, values, force=force)

    from errata.models import DTYPES

    choose(asked, DTYPES, "precision")
    import torch

    model, tokenizer = edit_folders.load_model_of(edits, {**values, "precision": made_in})
    return model.to(getattr(torch, asked)), tokenizer


def _say_what_is_restored(edits: Edits, model: nn.Module, console: Console) -> None:
    """Say how many of the weights are, with the edits, those that the edits were made on, as where they take others
    back."""
    from errata.editors.core.storage.provenance import weight_identity

    ledger = edits.apply_to(model, force=True)
    weights = [(stated, model.get_parameter(name)) for name, stated in edits.base.items()]
    same = sum(stated.split()[-1] == weight_identity(weight.detach()).split()[-1] for stated, weight in weights)
    ledger.clear()
    say(console, f"{same} of {len(weights)} weights have the bytes of the model that the edits were made on")


def _refuse_unused(values: Mapping[str, str]) -> None:
    """Refuse a value that none of the forms asked for would use."""
    folders = ("lora", "merged")
    for name, users in (
        ("rank", ("lora",)),
        ("private", ("hub",)),
        *((name, folders) for name in (*MODEL_NAMES, "force")),
    ):
        if name in values and not any(user in values for user in users):
            raise ConfigError(f"{name}= is for {'= and '.join(users)}=, which is not asked for")


COMMAND = Command(
    name="export",
    usage=("EDITS lora=FOLDER [rank=N]", "EDITS merged=FOLDER", "EDITS hub=ME/NAME [private=true]"),
    summary="Export saved edits as a LoRA adapter, as an edited model, or to the Hugging Face Hub.",
    group=FILES,
    run=run,
    options=(
        Option("lora=FOLDER", "write one LoRA adapter of all edits, in the form of PEFT"),
        Option("rank=N", "cut the adapter down to this rank; the error that this makes is shown"),
        Option("merged=FOLDER", "write the edited model with its tokenizer"),
        Option("hub=ME/NAME", "upload the folder of edits to this repository of the Hub"),
        Option("private=true", "make that repository private", ("true", "false")),
        *edit_folders.MODEL_OPTIONS,
        Option(
            "force=true",
            "take another model, too, such as a merged one that edits are taken back from",
            ("true", "false"),
        ),
    ),
    notes=(edit_folders.WHAT_HOLDS_EDITS,),
    examples=("errata export facts.edits lora=adapter", "errata export facts.edits merged=model"),
    needs_arguments=True,
)
