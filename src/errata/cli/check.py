"""`errata check`: asks the model with the edits of a folder whether each fact holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli import edit_folders
from errata.cli.apply import folder_of
from errata.cli.arguments import parse
from errata.cli.command import FILES, Command, Option
from errata.cli.exit_codes import DIFFERENT, DONE
from errata.cli.fact_display import ANSWERED_OTHERWISE, show_checked, show_plan
from errata.cli.messages import say
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.facts.asking import CheckResult
    from errata.benchmarks.facts.stated_facts import StatedFact


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Show how many facts hold on the model with the edits of a folder, and which do not."""
    from errata.benchmarks.facts import asking, fact_file, sync

    given = parse(arguments, COMMAND)
    if len(given.words) != 1:
        raise ConfigError(f"expected a file of facts or a folder of edits, got {len(given.words)} words")
    plan, wanted, source = None, [], given.words[0]
    folder = source
    if "shipped" in given.values and not fact_file.is_file_of_facts(source):
        raise ConfigError(f"shipped= is asked for the facts of a file, and {source} is none")
    if fact_file.is_file_of_facts(source):
        wanted, folder = fact_file.read(source), given.values.get("out") or str(folder_of(Path(source)))
        if "shipped" in given.values:
            return DIFFERENT if _check_shipped(wanted, folder, given.values, console) else DONE
        edits = edit_folders.edits_in(folder)
        plan = sync.plan(wanted, edits)
    else:
        edits = edit_folders.edits_in(folder)
    model, tokenizer = edit_folders.load_model_of(edits, given.values)
    edits.apply_to(model)
    lost = show_checked(asking.check(edits, model, tokenizer, wanted), console)
    if plan is not None and not plan.is_done:
        show_plan(plan, source, console)
        say(console, f"{folder} does not agree with {source}; `errata apply {source}` brings it in line")
        return DIFFERENT
    return DIFFERENT if lost else DONE


def _check_shipped(
    facts: Sequence[StatedFact], folder: str, values: Mapping[str, str], console: Console
) -> list[CheckResult]:
    """Show how many facts hold on a model as it stands, and return what does not hold."""
    from errata.benchmarks.facts import asking

    base = None
    if asking.needs_base(facts):  # the folder of edits knows where it is
        base, _ = edit_folders.load_model_of(edit_folders.edits_in(folder), values)
    model, tokenizer = edit_folders.load_model(values["shipped"], values)
    return show_checked(asking.check_shipped(model, tokenizer, facts, base), console)


COMMAND = Command(
    name="check",
    usage=("FACTS [out=FOLDER]", "EDITS", "FACTS shipped=MODEL"),
    summary="Ask the model whether each fact still holds.",
    group=FILES,
    run=run,
    options=(
        Option("out=FOLDER", "the folder of edits of FACTS; by default the file's name with .edits"),
        Option("shipped=MODEL", "ask this model as it stands, such as one that `errata export` wrote"),
        *edit_folders.MODEL_OPTIONS,
    ),
    notes=(
        "FACTS is a file of facts that `errata apply` has applied. The facts are checked on the model with the edits\n"
        "of its folder, and the folder is compared with the file. So are its paraphrases and the prompts that must\n"
        "stay unchanged. A fact that was edited in chat is asked in chat.",
        edit_folders.WHAT_HOLDS_EDITS,
        "With shipped=, no edits are put on the model. A prompt that must stay unchanged, and has no answer in FACTS,\n"
        "is compared with the untouched model, which the folder of edits names.",
    ),
    examples=("errata check facts.yaml", "errata check facts.edits", "errata check facts.yaml shipped=edited"),
    exit_codes=((DIFFERENT, ANSWERED_OTHERWISE + ", or a fact is not applied"),),
    needs_arguments=True,
)
