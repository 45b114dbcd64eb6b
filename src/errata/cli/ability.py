"""`errata ability`: measures a model with lm-eval's tasks, before and after the edits of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.terminal import show_table
from errata.cli import edit_folders
from errata.cli.arguments import parse, whole_number
from errata.cli.command import AS_JSON, MEASURE, Command, Option
from errata.cli.exit_codes import DONE
from errata.cli.messages import show_json
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.ability.ability import AbilityConfig, Score


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """Show the score in each task, one row per task."""
    given = parse(arguments, COMMAND)
    if len(given.words) > 1 or not (given.words or "model" in given.values):
        raise ConfigError("expected model=MODEL or one folder of edits")

    from errata.benchmarks.ability import ability as measuring

    config = _config(given.values)
    measuring.check(config)
    found: dict[str, Mapping[str, Score]] = {}
    if given.words:
        edits = edit_folders.edits_in(given.words[0])
        model, tokenizer = edit_folders.load_model_of(edits, given.values)
        found["before"] = measuring.measure(model, tokenizer, config)
        edits.apply_to(model, tokenizer)
        found["after"] = measuring.measure(model, tokenizer, config)
    else:
        model, tokenizer = edit_folders.load_model(given.values["model"], given.values)
        found["before"] = measuring.measure(model, tokenizer, config)
    if given.flags:
        plain = {moment: {task: asdict(score) for task, score in scores.items()} for moment, scores in found.items()}
        show_json(plain, console)
    else:
        _show(found, console)
    return DONE


def _config(values: Mapping[str, str]) -> AbilityConfig:
    from errata.benchmarks.ability.ability import AbilityConfig

    given = {name: whole_number(name, values) for name in ("limit", "num_fewshot", "batch_size")}
    numbers: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    tasks = tuple(task for task in values.get("tasks", "").split(",") if task)
    return AbilityConfig(tasks, values.get("path"), **numbers)


def _show(found: Mapping[str, Mapping[str, Score]], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    is_guessed = any(score.chance is not None for score in found["before"].values())
    for name in ("task", "metric", "questions", *(["chance"] if is_guessed else [])):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for moment in found if len(found) > 1 else ("value",):
        table.add_column(moment, justify="right")
    if len(found) > 1:
        table.add_column("change", justify="right")
    for task, score in found["before"].items():
        scores = [scores[task] for scores in found.values()]
        change = [f"{scores[1].value - scores[0].value:+.3f}"] if len(scores) > 1 else []
        guessed = ["-" if score.chance is None else f"{score.chance:.3f}"] if is_guessed else []
        table.add_row(task, score.metric, str(score.n), *guessed, *map(_with_error, scores), *change)
    show_table(console, table)


def _with_error(score: Score) -> str:
    return f"{score.value:.3f}" + ("" if score.stderr is None else f" ± {score.stderr:.3f}")


COMMAND = Command(
    name="ability",
    usage=("model=MODEL tasks=NAME[,NAME ...]", "EDITS tasks=NAME[,NAME ...]"),
    summary="Measure a model with lm-eval's tasks, before and after edits.",
    group=MEASURE,
    run=run,
    options=(
        Option(
            "tasks=NAME[,NAME]",
            "tasks of lm-eval, world_facts (the facts of the testbed), glue_rte and its like, or a suite",
        ),
        Option(
            "path=FOLDER",
            "where tasks are: YAMLs, which can run code, so trust it first; JSON of glue_*; data of gu8",
        ),
        Option("limit=N", "questions of each task"),
        Option("num_fewshot=N", "solved examples before each question, of tasks without a number of their own"),
        Option("batch_size=N", "rows of one forward pass"),
        AS_JSON,
        Option("model=MODEL", "the model; with EDITS, where it is now"),
        *edit_folders.MODEL_OPTIONS[1:],
    ),
    notes=(
        "The suites are capability, glue, gu8, quick and should_we_edit. gsm8k:8 asks behind 8 solved examples.",
        "For EDITS, the model is measured twice: untouched, and with the edits.",
        edit_folders.WHAT_HOLDS_EDITS,
    ),
    examples=("errata ability model=world tasks=world_facts limit=200", "errata ability facts.edits tasks=world_facts"),
    needs_arguments=True,
)
