"""`errata train`: trains a method that has to learn before it can edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from errata.benchmarks.bench.compose import compose
from errata.benchmarks.bench.train_config import TrainConfig
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.cli import configuration, overrides
from errata.cli.arguments import split_flags
from errata.cli.command import MEASURE, METHOD_FIELD, SHOW_CONFIGURATION, Command, Option
from errata.cli.exit_codes import DONE, STOPPED
from errata.cli.messages import say, say_stopped, shown_warnings
from errata.cli.progress_bars import show_progress

if TYPE_CHECKING:
    from rich.console import Console


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Train a method, and show one line per evaluation."""
    from rich.text import Text

    given, flags = split_flags(arguments, COMMAND)
    if flags:
        configuration.show_yaml("train", configuration.compose_first("train", given), console)
        return DONE
    values = compose("train", overrides.translated(given, "train"))

    from errata.benchmarks.training import train as training

    config = TrainConfig.of(values)

    def report(entry: Mapping[str, Any]) -> None:
        say(console, training.line(entry))

    stop = Stop()
    try:
        with stop.on_sigterm(), shown_warnings(errors), show_progress(errors) as progress:
            folder = training.run(config, progress=progress, report=report, stop=stop)
    except Stopped as reason:
        say_stopped(errors, reason)
        return STOPPED
    say(console, f"kept: {training.line(training.read(folder)['best'])}")
    for label, path in (("trained  ", folder), ("picture  ", folder / training.PICTURE)):
        console.print(Text.assemble((label, "dim"), str(path)), soft_wrap=True)
    return DONE


COMMAND = Command(
    name="train",
    usage=("[editor=mend] [model=world] [dataset=world] [name=value ...]",),
    summary="Train a method that has to learn before it can edit (mend, malmen, rledit).",
    group=MEASURE,
    run=run,
    config="train",
    options=(SHOW_CONFIGURATION,),
    overrides=(METHOD_FIELD, Option("out=FOLDER", "where the training gets its folder")),
    notes=(
        "The result is kept in the cache, where `errata bench editor=mend` finds it, and in its own folder in out=.",
    ),
    examples=("errata train editor=mend model=world dataset=world",),
    exit_codes=((STOPPED, "stopped early by SIGTERM; the same command continues"),),
    resumes=True,
)
