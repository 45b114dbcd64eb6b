"""`errata apply` and `errata check`: facts under version control, kept as edits in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli import edit_folders
from errata.cli.messages import asked_for_help, counted, say
from errata.cli.progress_bars import show_progress
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from errata.benchmarks.bench.config import ApplyConfig, ModelConfig
    from errata.benchmarks.facts.sync import CheckResult, SyncPlan, SyncResult
    from errata.editors.core.config import EditorConfig
    from errata.editors.core.request import EditRequest
    from errata.editors.core.storage.edit_folder import Edits

LOST = 3  # the exit code where a fact does not hold
DRY, EMPTY = "--dry-run", "--empty"
SHOWN = 20  # facts that are shown of a kind before they are counted
ADVICE = "`errata apply --help` shows what there is"
HELP = """\
errata apply FACTS [out=FOLDER] [--dry-run]    bring a folder of edits to what a file of facts says
errata apply FACTS [out=FOLDER] --empty        the same where the file holds none any more: takes all edits back
errata apply EDITS out=FOLDER                  add the edits of a folder to those of another, once they fit the model
errata check FACTS [out=FOLDER]                ask the model with the folder's edits whether each fact holds
errata check EDITS                             the same for whatever edits a folder holds

FACTS is a .yaml, .jsonl or .csv of facts with prompt, subject, target and perhaps target_true and id; out is the same
name with .edits unless it is given. What is not new in the file is not made again; what has gone from it is taken back.
model=world, editor=alphaedit, editor.FIELD=, batch_size=1, precision= and device= are as for `errata bench`; edits
that are there say model, editor and its fields, where these are not given. For EDITS model=NAME says where the model is
now, and force=true puts them on another one.
`errata check` takes model=, precision=, device= and trust_remote_code=, too.
Exit code 3: a fact does not hold, was refused, or is not applied.
"""


def apply(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Facts of a file, or edits of a folder, into a folder of edits."""
    from errata.benchmarks.facts.fact_file import is_file_of_facts

    if asked_for_help(arguments, HELP, console, needs_some=True):
        return 0
    source, rest = arguments[0], arguments[1:]
    if is_file_of_facts(source):
        return _apply_facts(Path(source), rest, console, errors)
    return _apply_edits(source, rest, console)


def check(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Whether facts hold on the model with the edits of a folder."""
    from errata.benchmarks.facts import fact_file, sync
    from errata.cli.overrides import words_and_options

    if asked_for_help(arguments, HELP, console, needs_some=True):
        return 0
    words, options = words_and_options(arguments, ("out", *edit_folders.OPTIONS), ADVICE)
    if len(words) != 1:
        raise ConfigError(f"expected a file of facts or a folder of edits, got {len(words)} words")
    plan, folder = None, words[0]
    if fact_file.is_file_of_facts(folder):
        wanted, folder = fact_file.read(folder), options.get("out") or str(_folder_of(Path(folder)))
        edits = edit_folders.edits_in(folder)
        plan = sync.plan(wanted, edits)
    else:
        edits = edit_folders.edits_in(folder)
    model, tokenizer = edit_folders.opened(edits, options)
    edits.apply_to(model)
    checked = sync.check(edits, model, tokenizer)
    lost = _show_checked(checked, console)
    if plan is not None and not plan.is_done:
        _show_plan(plan, words[0], console)
        say(console, f"{folder} is not as {words[0]} says: `errata apply {words[0]}` brings it there")
    return LOST if lost or (plan is not None and not plan.is_done) else 0


# --- facts ----------------------------------------------------------------------------------------------------------


def _apply_facts(source: Path, arguments: Sequence[str], console: Console, errors: Console) -> int:
    from errata import editors
    from errata.benchmarks.bench.compose import compose
    from errata.benchmarks.bench.config import ApplyConfig
    from errata.benchmarks.facts import fact_file, sync
    from errata.cli import overrides
    from errata.cli.messages import shown_warnings
    from errata.editors.core.files.atomic import make_folder
    from errata.editors.core.storage.edit_folder import Edits, check_replaceable, hold

    flags = [argument for argument in arguments if argument.startswith("-")]
    if unknown := [flag for flag in flags if flag not in (DRY, EMPTY)]:
        raise ConfigError(f"unknown option {unknown[0]!r}; there are {DRY} and {EMPTY}")
    texts = dict(overrides.split(argument) for argument in arguments if argument.startswith("out="))
    rest = [argument for argument in arguments if not argument.startswith(("out=", "-"))]
    asked = ApplyConfig.of(compose("apply", overrides.translated(rest, "apply", also=("out",))))
    typed = {overrides.split(argument)[0].lstrip("+~") for argument in rest}
    wanted, folder = fact_file.read(source), Path(texts.get("out", _folder_of(source)))
    check_replaceable(folder)
    if DRY not in flags:
        make_folder(folder.resolve().parent)
    with nullcontext() if DRY in flags else hold(folder):
        edits = Edits.read(folder) if Edits.are_in(folder) else None
        model, name, config = _chosen(asked, typed, edits)
        is_asked = any(entry.partition(".")[0] == "editor" for entry in typed)
        plan = sync.plan(wanted, edits, (name, config.to_dict()) if is_asked else None)
        _show_plan(plan, source, console)
        if edits is not None and (model.name, model.revision) != (edits.model.get("name"), edits.model.get("revision")):
            edits.check(*_loaded(asked, model, edits))
        if plan.is_done or DRY in flags:
            say(console, f"{folder} is as {source} says; nothing was done" if plan.is_done else "nothing was done")
            return 0
        if not wanted and EMPTY not in flags:
            raise ConfigError(f"{source} holds no fact, and {folder} would lose all of its edits; {EMPTY} has it so")
        with shown_warnings(errors), show_progress(errors) as progress:
            loaded, tokenizer = _loaded(asked, model, edits)
            editor = editors.get(name)(loaded, tokenizer, config, progress=progress)
            kept = sync.carry_out(plan, editor, folder, batch_size=asked.batch_size, progress=progress)
        return _show_kept(kept, source, folder, console)


def _folder_of(source: Path) -> Path:
    """Where the edits of a file of facts are, unless somebody says otherwise."""
    return source.with_suffix(".edits")


def _chosen(asked: ApplyConfig, typed: set[str], edits: Edits | None) -> tuple[ModelConfig, str, EditorConfig]:
    """The model, the method and its configuration: what was typed, else what the folder's edits say. `typed`: names."""
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
    """The model that edits are of, with what its YAML says, where it has one."""
    from errata.benchmarks.bench.compose import choices, compose
    from errata.benchmarks.bench.config import ModelConfig
    from errata.editors.core.config import build

    name, revision = edits.model.get("name") or "", edits.model.get("revision")
    for choice in choices("model"):
        if (found := compose("apply", [f"model={choice}"])["model"])["name"] == name:
            return build(ModelConfig, {**found, "revision": revision}, "model.")
    return ModelConfig(name, revision)


def _loaded(asked: ApplyConfig, model: ModelConfig, edits: Edits | None) -> tuple[Any, Any]:
    """The model with its tokenizer."""
    return model.load(asked.precision or (edits.precision if edits is not None else None), asked.device)


# --- edits ----------------------------------------------------------------------------------------------------------


def _apply_edits(source: str, arguments: Sequence[str], console: Console) -> int:
    from errata.cli.overrides import words_and_options
    from errata.editors.core.storage.edit_folder import Edits, check_replaceable, hold
    from errata.editors.core.storage.merging import merge

    words, options = words_and_options(arguments, ("out", "force", *edit_folders.OPTIONS), ADVICE)
    if words or "out" not in options:
        raise ConfigError("expected out=FOLDER, the edits to add these to; `errata export` writes models and adapters")
    force = edit_folders.is_true("force", options)
    folder, edits = Path(options["out"]), edit_folders.edits_in(source)
    check_replaceable(folder)
    with hold(folder):
        there = Edits.read(folder) if Edits.are_in(folder) else None
        both = edits if there is None else merge(there, edits)
        if there is not None and both.ids == there.ids:
            say(console, f"{folder} holds what {counted(len(edits), 'edit')} say already; nothing was done")
            return 0
        model, tokenizer = edit_folders.opened(both, options, force=force)
        ledger = both.apply_to(model, force=force)
        Edits.of(ledger, tokenizer=tokenizer, notes=both.notes).rewrite(folder)
    say(console, f"{counted(len(both) - len(there or ()), 'edit')} added, {len(both)} in all: {folder}")
    return 0


# --- what is shown --------------------------------------------------------------------------------------------------


def _show_plan(plan: SyncPlan, source: str | Path, console: Console) -> None:
    from rich.text import Text

    counts = [
        f"{len(found)} {name}"
        for name in ("added", "changed", "again", "removed", "beneath", "unchanged")
        if (found := getattr(plan, name)) or name == "unchanged"
    ]
    console.print(Text(f"{source}: {', '.join(counts)}"))
    lines: list[tuple[str, str, Text]] = [("+", "green", said(fact.request)) for fact in plan.added]
    for before, fact in plan.changed:
        was = before.target if before.text == fact.request.text else f"{before.text} → {before.target}"
        lines.append(("~", "yellow", Text.assemble(said(fact.request), (f", was {was}", "dim"))))
    lines += [("=", "yellow", Text.assemble(said(fact.request), (", made anew", "dim"))) for fact in plan.again]
    lines += [("-", "red", said(request)) for request in plan.removed]
    for sign, colour, text in lines[:SHOWN]:
        console.print(Text.assemble((f"  {sign} ", colour), text), soft_wrap=True)
    if len(lines) > SHOWN:
        console.print(Text(f"  and {len(lines) - SHOWN} more"))


def _show_kept(kept: SyncResult, source: Path, folder: Path, console: Console) -> int:
    for fact, reason in kept.refused:
        say(console, f"{source}:{fact.line}: refused: {reason}")
    lost = _show_checked(kept.checked, console)
    say(console, f"written to {folder}")
    return LOST if lost or kept.refused else 0


def _show_checked(checked: Sequence[CheckResult], console: Console) -> list[CheckResult]:
    """How many facts hold, and which do not; those."""
    from rich.text import Text

    lost = [each for each in checked if not each.holds]
    said_of = f"{len(checked) - len(lost)} of {counted(len(checked), 'fact')}"
    console.print(Text(f"{said_of} {'holds' if len(checked) == 1 else 'hold'}"))
    for each in sorted(lost, key=lambda one: not one.held)[:SHOWN]:
        word = ("lost", "bold red") if each.held else ("does not hold", "red")
        share = (f" (p {each.probability:.3f})", "dim")
        console.print(Text.assemble("  ", word, "  ", said(each.request), share), soft_wrap=True)
    if len(lost) > SHOWN:
        console.print(Text(f"  and {len(lost) - SHOWN} more"))
    return lost


def said(request: EditRequest) -> Text:
    """A fact in one line."""
    from rich.text import Text

    return Text.assemble(" ".join(request.text.split()), " → ", (request.target, "bold"))
