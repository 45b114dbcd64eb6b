"""`errata export`: edits that were written, as an adapter or as a whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.editors.core.errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.editors.core.entry import Entry

OPTIONS = ("lora", "merged", "rank", "model", "precision")
HELP = """\
errata export FOLDER lora=adapter              one adapter of all its edits, for PEFT and what reads its adapters
errata export FOLDER merged=model              the edited model, with its tokenizer
errata export FOLDER lora=adapter rank=512     cut down to this rank, with the error that this makes

FOLDER is one that `errata edit` has written, or the run of a sequence. model=NAME says where its model is now, and
precision=bfloat16 in what precision it was edited; a finished run says so itself.
"""


def export(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Edits of a folder, over the model that they were made on."""
    from errata.editors.core.export import check_free, write_merged
    from errata.editors.core.lora_export import write_lora
    from errata.overrides import words_and_options

    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(HELP, end="", markup=False, highlight=False, soft_wrap=True)
        return 0
    words, options = words_and_options(arguments, OPTIONS, "`errata export --help` shows what there is")
    wanted = {form: Path(options[form]) for form in ("lora", "merged") if form in options}
    if len(words) != 1 or not wanted:
        raise ConfigError("expected a folder, and lora=FOLDER or merged=FOLDER")
    for folder in wanted.values():
        check_free(folder)
    rank = _rank(options["rank"]) if "rank" in options else None
    model, tokenizer, entries = _opened(Path(words[0]), options)
    if "lora" in wanted:
        made = write_lora(model, entries, wanted["lora"], rank=rank)
        _say(console, f"{len(entries)} edits, rank {made.rank}, error {max(made.errors.values()):.2g}: {made.folder}")
    if "merged" in wanted:
        written = write_merged(model, entries, wanted["merged"], tokenizer)
        _say(console, f"the model with {len(entries)} edits: {written}")
    return 0


def _opened(folder: Path, options: Mapping[str, str]) -> tuple[Any, Any, list[Entry]]:
    """The model, its tokenizer, and the edits in their order, once they are found to be of this model."""
    from errata.benchmarks import edits, models
    from errata.editors.core.journal import Journal
    from errata.editors.core.ledger import Ledger

    path = _journal(folder)
    journal = None if path is None else Journal(path)
    said = edits.about(folder)["model"] if journal is None else journal.model
    name, revision = options.get("model", said["name"]), None if "model" in options else said["revision"]
    # An edit by itself has no digest of the weights that it was made on; a journal has.
    if journal is None and models.fingerprint(name, revision) != said["fingerprint"]:
        raise LedgerError(f"{folder} holds an edit of another model than {name}; give model=NAME, the one it is of")
    model, tokenizer = models.load(
        name, dtype=options.get("precision") or _precision(folder), device="cpu", revision=revision
    )
    if journal is None:
        return model, tokenizer, [edits.read(folder, model).entry()]
    try:
        journal.check(Ledger.of(model))
    except LedgerError as error:
        raise LedgerError(f"{error}; if it was edited in another precision than this, give precision=") from error
    return model, tokenizer, [record.entry for record in journal.records() if record.entry is not None]


def _journal(folder: Path) -> Path | None:
    """The journal of a run, or the folder where it is one itself."""
    from errata.benchmarks.diary import JOURNAL
    from errata.editors.core.journal import EDITS

    return next((path for path in (folder / JOURNAL, folder) if (path / EDITS).is_file()), None)


def _precision(folder: Path) -> str | None:
    """What a finished run was computed in, given as its folder or its journal's; None: nobody says."""
    from errata.benchmarks.diary import JOURNAL
    from errata.benchmarks.store import RESULTS, read_results

    run = folder.parent if folder.name == JOURNAL else folder
    return read_results(run / RESULTS)["machine"]["precision"] if (run / RESULTS).is_file() else None


def _rank(value: str) -> int:
    if not value.isdecimal():
        raise ConfigError(f"rank: expected a number, got {value!r}")
    return int(value)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
