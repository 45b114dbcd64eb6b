"""`errata apply`: keeps a folder of edits in line with a file of facts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.counts import count_of
from errata.cli import edit_folders, overrides
from errata.cli.arguments import is_true, parse, split_flags
from errata.cli.command import FILES, METHOD_FIELD, Command, Option
from errata.cli.edit_folders import MODEL_NAMES
from errata.cli.exit_codes import DIFFERENT, DONE
from errata.cli.fact_display import ANSWERED_OTHERWISE, show_checked, show_plan
from errata.cli.messages import say, shown_warnings
from errata.cli.progress_bars import show_progress
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.bench.config import ApplyConfig, ModelConfig
    from errata.benchmarks.facts.sync import SyncResult
    from errata.editors.core.config import EditorConfig
    from errata.editors.core.storage.edit_folder import Edits

DRY_RUN, EMPTY = "--dry-run", "--empty"


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Apply the facts of a file, or the edits of a folder, to a folder of edits."""
    from errata.benchmarks.facts.fact_file import is_file_of_facts

    rest, flags = split_flags(arguments, COMMAND)
    if not rest:
        raise ConfigError("expected a file of facts or a folder of edits")
    if is_file_of_facts(rest[0]):
        return _apply_facts(Path(rest[0]), rest[1:], flags, console, errors)
    if flags:
        raise ConfigError(f"{min(flags)} is for a file of facts, and {rest[0]} is none")
    return _apply_edits(rest[0], rest[1:], console)


def folder_of(source: Path) -> Path:
    """Return the folder for the edits of a file of facts, where `out=` does not name another."""
    return source.with_suffix(".edits")


# --- facts ----------------------------------------------------------------------------------------------------------


def _apply_facts(
    source: Path, arguments: Sequence[str], flags: frozenset[str], console: Console, errors: Console
) -> int:
    from errata import editors
    from errata.benchmarks.bench.compose import compose
    from errata.benchmarks.bench.config import ApplyConfig
    from errata.benchmarks.facts import fact_file, sync
    from errata.editors.core.files.atomic import make_folder
    from errata.editors.core.storage.edit_folder import Edits, check_replaceable, hold

    overrides.refuse_repeats(arguments)
    texts = dict(overrides.split(argument) for argument in arguments if argument.startswith("out="))
    rest = [argument for argument in arguments if not argument.startswith("out=")]
    asked = ApplyConfig.of(compose("apply", overrides.translated(rest, "apply", also=("out",))))
    typed = {overrides.split(argument)[0].lstrip("+~") for argument in rest}
    wanted, folder = fact_file.read(source), Path(texts.get("out", folder_of(source)))
    check_replaceable(folder)
    if DRY_RUN not in flags:
        make_folder(folder.resolve().parent)
    with nullcontext() if DRY_RUN in flags else hold(folder):
        edits = Edits.read(folder) if Edits.are_in(folder) else None
        model, name, config = _choose(asked, typed, edits)
        is_asked = any(entry.partition(".")[0] == "editor" for entry in typed)
        plan = sync.plan(wanted, edits, (name, config.to_dict()) if is_asked else None)
        show_plan(plan, source, console)
        if edits is None and not {"model", "model.name"} & typed:
            say(console, f"the model is {model.name}, by default; model= names another")
        if edits is not None and (model.name, model.revision) != (edits.model.get("name"), edits.model.get("revision")):
            edits.check(*_load(asked, model, edits))
        if not wanted and EMPTY not in flags:
            loss = f", so {folder} would lose all of its edits; {EMPTY} allows that" if edits else "; write one first"
            raise ConfigError(f"{source} holds no fact{loss}")
        if plan.is_done or DRY_RUN in flags:
            why = f"{folder} agrees with {source} already" if plan.is_done else "this was a dry run"
            say(console, f"{why}; nothing was done")
            return DONE
        with shown_warnings(errors), show_progress(errors) as progress:
            loaded, tokenizer = _load(asked, model, edits)
            editor = editors.get(name)(loaded, tokenizer, config, progress=progress)
            kept = sync.carry_out(plan, editor, folder, batch_size=asked.batch_size, progress=progress)
        return _show_kept(kept, source, folder, console)


def _choose(asked: ApplyConfig, typed: set[str], edits: Edits | None) -> tuple[ModelConfig, str, EditorConfig]:
    """Return the model, the method and its configuration: as typed, else as the folder's edits have them.

    Args:
        asked: The configuration that the overrides give.
        typed: The names of the overrides.
        edits: The folder's edits; None where it has none.
    """
    from errata import editors
    from errata.benchmarks.bench.config import editor_config, editor_name
    from errata.benchmarks.facts import sync

    model = asked.model
    if edits is not None:
        if idle := sorted(name for name in typed if name.startswith("model.editors")):
            raise ConfigError(
                f"{idle[0]}: the folder's edits say how they were made; give editor.FIELD= for other values"
            )
        if not {"model", "model.name"} & typed:
            revision = {"revision": model.revision} if "model.revision" in typed else {}
            model = replace(_model_of(edits), trust_remote_code=model.trust_remote_code, **revision)
    made = sync.method_of(edits) if edits is not None and not {"editor", "editor.name"} & typed else None
    if made is None:
        return model, editor_name(asked.editor), editor_config(asked.editor, model)
    name, config = made
    fields = {field: value for field, value in asked.editor.items() if field != "name"}
    return model, name, editors.get(name).Config.from_dict({**config, **fields}, path="editor.")


def _model_of(edits: Edits) -> ModelConfig:
    """Return the model that edits were made on, with the settings of its YAML where it has one."""
    from errata.benchmarks.bench.compose import choices, compose
    from errata.benchmarks.bench.config import ModelConfig
    from errata.editors.core.config import build

    name, revision = edits.model.get("name") or "", edits.model.get("revision")
    for choice in choices("model"):
        if (found := compose("apply", [f"model={choice}"])["model"])["name"] == name:
            return build(ModelConfig, {**found, "revision": revision}, "model.")
    return ModelConfig(name, revision)


def _load(asked: ApplyConfig, model: ModelConfig, edits: Edits | None) -> tuple[Any, Any]:
    """Load the model with its tokenizer, by default in the precision of the edits."""
    return model.load(asked.precision or (edits.precision if edits is not None else None), asked.device)


def _show_kept(kept: SyncResult, source: Path, folder: Path, console: Console) -> int:
    for fact, reason in kept.refused:
        say(console, f"{source}:{fact.line}: refused: {reason}")
    lost = show_checked(kept.checked, console)
    say(console, f"written to {folder}")
    return DIFFERENT if lost or kept.refused else DONE


# --- edits ----------------------------------------------------------------------------------------------------------


def _apply_edits(source: str, arguments: Sequence[str], console: Console) -> int:
    from errata.editors.core.storage.edit_folder import Edits, check_replaceable, hold
    from errata.editors.core.storage.merging import merge

    given = parse(arguments, COMMAND, also=MODEL_NAMES)
    if given.words or "out" not in given.values:
        raise ConfigError("expected out=FOLDER, the edits to add these to; `errata export` writes models and adapters")
    force = is_true("force", given.values)
    folder, edits = Path(given.values["out"]), edit_folders.edits_in(source)
    check_replaceable(folder)
    with hold(folder):
        there = Edits.read(folder) if Edits.are_in(folder) else None
        both = edits if there is None else merge(there, edits)
        if there is not None and both.ids == there.ids:
            say(console, f"{folder} holds the facts of {count_of(len(edits), 'edit')} already; nothing was done")
            return DONE
        model, tokenizer = edit_folders.load_model_of(both, given.values, force=force)
        ledger = both.apply_to(model, force=force)
        Edits.of(ledger, tokenizer=tokenizer, notes=both.notes).rewrite(folder)
    say(console, f"{count_of(len(both) - len(there or ()), 'edit')} added, {len(both)} in all: {folder}")
    return DONE


COMMAND = Command(
    name="apply",
    usage=("FACTS [out=FOLDER] [name=value ...]", "EDITS out=FOLDER"),
    summary="Bring a folder of edits in line with a file of facts.",
    group=FILES,
    run=run,
    config="apply",
    options=(
        Option("out=FOLDER", "the folder of edits; by default the file's name with .edits"),
        Option(DRY_RUN, "show what would be done, and do nothing"),
        Option(EMPTY, "let a file without facts remove all edits"),
        Option("force=true", "for EDITS: add them although the model is another one", ("true", "false")),
        *(option for option in edit_folders.MODEL_OPTIONS if option.words == ("trust_remote_code=",)),
    ),
    overrides=(
        Option("model=NAME", "the model; by default the one of the folder's edits, else the testbed"),
        Option("editor=METHOD", "the method; by default the one of the folder's edits, else alphaedit"),
        METHOD_FIELD,
        Option("batch_size=N", "facts that a method for many facts writes together"),
        Option("precision=float32", "precision of the weights; by default the one that the edits were made in"),
        Option("device=cuda", "where to load the model"),
    ),
    notes=(
        "FACTS is a .yaml, .jsonl or .csv file. Each fact has a prompt, a subject and a target, and perhaps\n"
        "target_true, id, chat, join, and lists of paraphrases and of prompts that must stay unchanged. errata makes\n"
        "edits for the facts that are new in the file, takes back the edits whose facts are gone, and leaves\n"
        "the others alone.",
        "The folder is written even where a fact does not hold or a neighbour changed, and the exit code is 3.",
        "EDITS is a folder of edits. They are added to those in out=FOLDER, once they are known to fit the model.",
    ),
    examples=("errata apply facts.yaml",),
    exit_codes=(
        (
            DIFFERENT,
            f"{ANSWERED_OTHERWISE}, or a fact was refused",
        ),
    ),
    needs_arguments=True,
    resumes=True,
)
