"""`errata bench`: makes many edits and scores them, in one run or in a sweep of runs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from errata.benchmarks.bench.compose import compose, launcher_of, swept
from errata.benchmarks.runs.hydra_grammar import override_name
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.cli import configuration, overrides
from errata.cli.arguments import split_flags
from errata.cli.command import MEASURE, METHOD_FIELD, SHOW_CONFIGURATION, Command, Option
from errata.cli.configuration import MULTIRUN
from errata.cli.exit_codes import DEFECT, DONE, MISTAKE, STOPPED
from errata.cli.messages import say_stopped, show_failures, shown_warnings
from errata.cli.progress_bars import show_progress
from errata.editors.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Carry out one run, or with -m one run for every combination of values, and show the scores."""
    given, flags = split_flags(arguments, COMMAND)
    sweep = any(flag in flags for flag in MULTIRUN)
    if SHOW_CONFIGURATION.usage in flags:
        configuration.show_yaml("bench", configuration.compose_first("bench", given, sweep=sweep), console)
        return DONE
    lines = overrides.translated(given, "bench", sweep=sweep)
    stop, in_ranks = Stop(), is_shared()
    on_sigterm = stop.on_sigterm(lambda: errors.print("[yellow]SIGTERM[/]: stopping after the current edit"))
    try:
        # SIGTERM ends a rank as a kill does. Ranks would notice a request at different steps, and wait for each other.
        with nullcontext() if in_ranks else on_sigterm:
            if sweep or _is_launched(lines):
                if in_ranks:
                    raise ConfigError("torchrun carries out one run in several processes; give one run, without -m")
                return carry_out_sweep(lines, shlex.join(["errata", "bench", *arguments]), stop, console, errors)
            return _in_ranks(lines, console, errors) if in_ranks else _one_run(lines, stop, console, errors)
    except Stopped as reason:
        say_stopped(errors, reason)
        return STOPPED


def _is_launched(lines: Sequence[str]) -> bool:
    """Return whether a single run goes to a launcher, such as a cluster's, as one job.

    Raises:
        ConfigError: The line needs -m: its experiment has several values for a name.
    """
    names = [override_name(line) for line in lines]
    experiment = [line for line, name in zip(lines, names, strict=True) if name == "experiment"]
    if several := [name for line in swept(experiment) if (name := override_name(line)) not in names]:
        hint = f"type `errata bench -m {experiment[0]}`, or give one value for each"
        raise ConfigError(f"{experiment[0]} has several values for {', '.join(several)}; {hint}")
    launching = [name for name in names if name.startswith(("launcher", "hydra/launcher", "hydra.launcher"))]
    if not launching and not experiment:
        return False
    if not experiment and all(name.startswith("hydra.") for name in launching):
        raise ConfigError(f"{launching[0]} says how a job is launched; name the launcher too, as in launcher=slurm")
    return launcher_of(lines) != "basic"


def _one_run(lines: Sequence[str], stop: Stop | None, console: Console, errors: Console) -> int:
    """Carry out one run and show its scores."""
    from errata.benchmarks import bench as benchmark
    from errata.benchmarks.bench.config import BenchConfig

    with shown_warnings(errors), show_progress(errors) as progress:
        prepared = benchmark.prepare(BenchConfig.of(compose("bench", lines)))
        if prepared.folder.done:
            errors.print("[dim]this run is already finished; its results:[/]")
        folder = benchmark.carry_out(prepared, progress=progress, stop=stop)
    _show_runs([folder], console)
    return DONE


def is_shared() -> bool:
    """Return whether torchrun has started this process; torch itself takes too long to import for that question."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _in_ranks(lines: Sequence[str], console: Console, errors: Console) -> int:
    """Carry out one run together with the other processes that torchrun has started; the first one speaks."""
    from errata.editors.core import ranks

    with ranks.joined():
        console.quiet = errors.quiet = ranks.rank() > 0
        try:
            return _one_run(lines, None, console, errors)
        except Exception:
            errors.quiet = False  # the first may know nothing of it
            raise


def carry_out_sweep(lines: Sequence[str], command: str, stop: Stop, console: Console, errors: Console) -> int:
    """Carry out a sweep, show the scores of its runs, then the failures, and return the exit code.

    Args:
        lines: Overrides for Hydra; some have several values.
        command: What was typed.
        stop: Asks the runs to end early.
        console: Where results go.
        errors: Where everything else goes.
    """
    from errata.cli import sweep_jobs

    swept = sweep_jobs.multirun(lines, command, stop)
    notes = [(index, note) for index in range(len(swept.jobs)) if (note := swept.note(index)) is not None]
    if done := [swept.out / note.run for _, note in notes if note.run is not None and note.failure is None]:
        _show_runs(done, console)
    failed = [(index, note) for index, note in notes if note.failure is not None]
    if failed:
        show_failures(swept, failed, errors)
    return min((DEFECT if note.failure["is_ours"] else MISTAKE for _, note in failed if note.failure), default=DONE)


def _show_runs(folders: Sequence[Path], console: Console) -> None:
    from rich.text import Text

    from errata.benchmarks.reports import report

    runs = [report.read(folder) for folder in dict.fromkeys(folders)]
    report.show(runs, console)
    for picture in report.write_comparisons(runs, folders[0].parent):
        console.print(Text.assemble(("picture  ", "dim"), str(picture)), soft_wrap=True)


COMMAND = Command(
    name="bench",
    usage=(
        "[editor=rome] [model=world] [dataset=world] [n_edits=50] [name=value ...]",
        "-m editor=rome,memit [name=value,value ...]",
    ),
    summary="Make many edits and score them; with -m, one run for every combination of values.",
    group=MEASURE,
    run=run,
    config="bench",
    options=(
        Option("-m, --multirun", "run every combination of the values that commas separate"),
        SHOW_CONFIGURATION,
    ),
    overrides=(
        Option("dataset.path=FILE", "read the cases from a file in the dataset's own format"),
        METHOD_FIELD,
        Option("out=FOLDER", "where the run gets its folder"),
    ),
    notes=(
        "Every run has its own folder. The same command continues a run that was stopped or killed.",
        "With launcher= a single run is one job, without -m too.",
    ),
    examples=(
        "errata bench editor=r_rome model=world n_edits=50",
        "errata bench -m editor=rome,r_rome,c_rome model=world n_edits=50",
        "errata bench model=path/or/id dataset=counterfact dataset.path=counterfact.json n_edits=100",
    ),
    exit_codes=((STOPPED, "stopped early by SIGTERM or time_limit=; the same command continues"),),
    resumes=True,
)
