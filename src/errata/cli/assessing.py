"""`errata ability`: what lm-eval's tasks say of a model, or of it before and after the edits of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from errata.benchmarks.reports.terminal import show_table
from errata.cli import edit_folders
from errata.cli.messages import asked_for_help
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.ability import AbilityConfig, Score

OPTIONS = ("tasks", "path", "limit", "num_fewshot", "batch_size", *edit_folders.OPTIONS)
JSON = "--json"
HELP = """\
errata ability model=MODEL tasks=arc_easy,lambada_openai limit=200    lm-eval's tasks, by name
errata ability EDITS tasks=world_facts                                before and after the edits of a folder
errata ability EDITS tasks=mine path=FOLDER                           tasks of a folder of lm-eval's YAMLs

tasks of lm-eval, and world_facts: which of four objects a fact of the testbed has; path only folders that you trust,
since such a YAML can name code; limit=N questions of each task; num_fewshot=N; batch_size=N rows of a pass; --json;
device=cuda for a GPU; precision=; trust_remote_code=true.
"""


def ability(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """A line a task."""
    from errata.benchmarks import ability as measuring
    from errata.cli.overrides import words_and_options
    from errata.cli.reading import show_json

    if asked_for_help(arguments, HELP, console, needs_some=True):
        return 0
    as_json = JSON in arguments
    rest = [argument for argument in arguments if argument != JSON]
    words, options = words_and_options(rest, OPTIONS, "`errata ability --help` shows what there is")
    if len(words) > 1 or not (words or "model" in options):
        raise ConfigError("expected model=MODEL or one folder of edits")
    config = _config(options)
    measuring.check(config)
    found: dict[str, Mapping[str, Score]] = {}
    if words:
        edits = edit_folders.edits_in(words[0])
        model, tokenizer = edit_folders.opened(edits, options)
        found["before"] = measuring.measure(model, tokenizer, config)
        edits.apply_to(model, tokenizer)
        found["after"] = measuring.measure(model, tokenizer, config)
    else:
        found["before"] = measuring.measure(*edit_folders.loaded(options["model"], options), config)
    if as_json:
        plain = {moment: {task: asdict(score) for task, score in scores.items()} for moment, scores in found.items()}
        show_json(plain, console)
    else:
        _show(found, console)
    return 0


def _config(options: Mapping[str, str]) -> AbilityConfig:
    from errata.benchmarks.ability import AbilityConfig

    given = {name: edit_folders.whole(name, options) for name in ("limit", "num_fewshot", "batch_size")}
    numbers: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    tasks = tuple(task for task in options.get("tasks", "").split(",") if task)
    return AbilityConfig(tasks, options.get("path"), **numbers)


def _show(found: Mapping[str, Mapping[str, Score]], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("task", "metric", "questions"):
        table.add_column(name, justify="right" if name == "questions" else "left")
    for moment in found if len(found) > 1 else ("value",):
        table.add_column(moment, justify="right")
    if len(found) > 1:
        table.add_column("change", justify="right")
    for task, score in found["before"].items():
        scores = [scores[task] for scores in found.values()]
        change = [f"{scores[1].value - scores[0].value:+.3f}"] if len(scores) > 1 else []
        table.add_row(task, score.metric, str(score.n), *map(_said, scores), *change)
    show_table(console, table)


def _said(score: Score) -> str:
    return f"{score.value:.3f}" + ("" if score.stderr is None else f" ± {score.stderr:.3f}")
