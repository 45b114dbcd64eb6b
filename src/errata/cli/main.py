"""The command line: `errata edit`, `errata bench`, `errata train` and `errata methods`. What reads runs is in
reading.py, what asks lm-eval in assessing.py, what keeps edits in applying.py, folders.py and exporting.py.

Exit codes: 0 done; 1 a defect of ours (with its traceback); 2 something that you can put right, said in one line;
3 a fact does not hold, or two folders differ; 75 a bench that was told to stop (SIGTERM, time_limit) and goes on with
the same command; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.messages import asked_for_help, complain, show_failures, shown_warnings
from errata.cli.progress_bars import show_progress
from errata.editors.core.errors import ConfigError, ErrataError

if TYPE_CHECKING:
    from rich.console import Console

    from errata.benchmarks.runs.stopping import Stop
Command = Callable[[Sequence[str], "Console", "Console"], int]

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again

HELP = """\
errata: correct single facts in a language model, undo any correction, measure what it cost.

  errata edit  [name=value ...]      one edit: before, after, and the edit written to a folder
  errata bench [name=value ...]      many edits, scored; -m runs every combination of comma-separated values
  errata train [name=value ...]      a method that has to learn (mend), on the cases of a dataset
  errata compare RUN RUN             two runs over the same cases: paired differences, intervals, tests
  errata status  DIR                 done, running, failed, pending, time left; --json
  errata report  DIR [out=FOLDER]    tables, pictures and one page about all finished runs in a folder
  errata ability EDITS tasks=TASKS   what lm-eval's tasks say of a model, before and after edits
  errata convert KIND FILE...        hparams, moments, projectors of other repositories; a dataset for EasyEdit

  errata apply  FACTS [out=EDITS]    a file of facts (.yaml, .jsonl, .csv) kept as edits: what is new in it is made
  errata check  FACTS|EDITS          whether each fact still holds; exit code 3 where one does not
  errata list   EDITS                what a folder of edits holds; errata diff EDITS EDITS: what tells two apart
  errata merge  EDITS EDITS out=NEW  both in one; errata remove EDITS id=ID: without some
  errata export EDITS lora=ADAPTER   edits that were written, for PEFT; merged=MODEL for the edited model

  errata methods [NAME]              the methods that there are; one method and its fields
  errata playground [model=...]      a page on this machine: edit, look, undo; port=
  errata completion bash|zsh|fish    a script for that shell: eval "$(errata completion bash)"
  errata --version

errata edit model=world prompt="The capital of {} is" subject=Gavaria target=Praminster
errata bench editor=r_rome model=world n_edits=50
errata bench -m editor=rome,r_rome,c_rome model=world n_edits=50
errata bench model=path/or/id dataset=counterfact dataset.path=counterfact.json n_edits=100
errata train editor=mend model=world dataset=world
errata apply facts.yaml
errata compare runs rome r_rome
errata report runs

`errata COMMAND --help` shows what a command takes; of edit, bench and train every name and its default.
"""
# Of the commands that Hydra configures, by the YAML; behind it stand choices, names and defaults.
USAGE = {
    "edit": """\
errata edit prompt="The capital of {} is" subject=Gavaria target=Praminster [editor=rome] [model=world] [name=value ...]

prompt=, subject= and target= are the fact; {} stands for the subject. target_true=, what it was, and id= are optional.
out=edits       the edit is written to a folder of its own in it, out/SUBJECT-TARGET-ID
lora=ADAPTER    and as a LoRA adapter
editor.FIELD=   any field of the method, as `errata methods rome` lists them
--cfg           what would be used, and nothing done
""",
    "bench": """\
errata bench [editor=rome] [model=world] [dataset=world] [n_edits=50] [name=value ...]    one run
errata bench -m editor=rome,memit dataset=world,zsre n_edits=50                           every combination

A run has a folder of its own in out=; the same command goes on where it was stopped.
editor.FIELD=   any field of the method, as `errata methods rome` lists them
--cfg           what would be used, and nothing done
""",
    "train": """\
errata train [editor=mend] [model=world] [dataset=world] [name=value ...]

What is trained is kept in the cache, where `errata bench editor=mend` finds it, and in a folder of its own in out=.
editor.FIELD=   any field of the method, as `errata methods mend` lists them
--cfg           what would be used, and nothing done
""",
}
METHODS_HELP = """\
errata methods         the methods that there are
errata methods NAME    what one is, and its fields, which are given as editor.FIELD=
"""


def main() -> int:
    """Entry point of the `errata` command; returns its exit code."""
    from rich.console import Console

    # Tables keep their columns in a file or a pipe.
    console = Console(width=None if sys.stdout.isatty() else 160)
    errors = Console(stderr=True)
    # Advice of transformers would run through our lines.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that wait by spinning take the cores from those that work, wherever anything else runs beside.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return run(sys.argv[1:], console, errors)
    except KeyboardInterrupt:
        resumes = sys.argv[1:2] in (["apply"], ["bench"], ["train"])
        goes_on = "; the same command goes on where it stopped" if resumes else ""
        errors.print(f"\n[yellow]stopped[/]{goes_on}")
        return 130
    except ErrataError as error:
        complain(errors, error)
        return 2
    except OSError as error:
        from errata.benchmarks.runs.run_status import is_ours

        if is_ours(error):
            raise
        complain(errors, error)
        return 2


def commands() -> dict[str, Command]:
    """What can follow `errata`, by name."""
    from errata.cli import applying, assessing, completion, converting, exporting, folders, reading
    from errata.playground import app

    return {
        "ability": assessing.ability,
        "apply": applying.apply,
        "bench": bench,
        "check": applying.check,
        "compare": reading.compare,
        "completion": completion.completion,
        "convert": converting.convert,
        "diff": folders.diff,
        "edit": edit,
        "export": exporting.export,
        "list": folders.list_edits,
        "merge": folders.merge,
        "methods": methods,
        "playground": app.playground,
        "remove": folders.remove,
        "report": reading.report,
        "status": reading.status,
        "train": train,
    }


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Carry out one command line.

    Raises:
        ErrataError: what the user can put right.
    """
    from errata.editors.core.config import did_you_mean

    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        console.print(HELP, end="", markup=False, highlight=False, soft_wrap=True)
        return 0
    if command in ("-V", "--version"):
        from importlib.metadata import version

        console.print(f"errata {version('errata')}", highlight=False)
        return 0
    known = commands()
    if command not in known:
        raise ConfigError(f"unknown command {command!r}{did_you_mean(command, known)}")
    return known[command](rest, console, errors)


def methods(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """List the registered methods, or show one."""
    from errata.cli import catalogue

    if asked_for_help(arguments, METHODS_HELP, console):
        return 0
    if len(arguments) > 1:
        raise ConfigError(f"expected the name of one method, got {' '.join(arguments)!r}")
    if arguments:
        catalogue.show_one(arguments[0], console)
    else:
        catalogue.show_all(console)
    return 0


def edit(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """One edit, shown before and after, and written to a folder."""
    from errata.benchmarks.bench.compose import compose
    from errata.benchmarks.bench.config import EditConfig
    from errata.cli import demonstration, overrides

    texts, rest = {}, []
    for argument in arguments:
        name, value = overrides.split(argument) if not argument.startswith("-") else (argument, "")
        if name in demonstration.TEXTS:
            texts[name] = value
        else:
            rest.append(argument)
    if _shows_configuration(rest, "edit", console):
        return 0
    config = EditConfig.of(compose("edit", overrides.translated(rest, "edit", also=demonstration.TEXTS)))
    with shown_warnings(errors), show_progress(errors) as progress:
        shown = demonstration.run(config, texts, progress=progress)
    demonstration.show(shown, console)
    return 0


def bench(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """One run, or with -m one for every combination of comma-separated values."""
    from errata.benchmarks.bench import run as benchmark
    from errata.benchmarks.bench.compose import compose
    from errata.benchmarks.bench.config import BenchConfig
    from errata.benchmarks.runs.stopping import Stop, Stopped
    from errata.cli import overrides

    flags = [argument for argument in arguments if argument.startswith("-")]
    rest = [argument for argument in arguments if not argument.startswith("-")]
    sweep = bool({"-m", "--multirun"} & set(flags))
    others = [flag for flag in flags if flag not in ("-m", "--multirun")]
    if _shows_configuration(others + rest, "bench", console, sweep=sweep):
        return 0
    lines = overrides.translated(rest, "bench", sweep=sweep)
    stop = Stop()
    try:
        with stop.on_sigterm(lambda: errors.print("[yellow]SIGTERM[/]: stopping behind the edit at hand")):
            if sweep:
                return _sweep(lines, shlex.join(["errata", "bench", *arguments]), stop, console, errors)
            with shown_warnings(errors), show_progress(errors) as progress:
                prepared = benchmark.prepare(BenchConfig.of(compose("bench", lines)))
                if prepared.folder.done:
                    errors.print("[dim]this run has been carried out already; its results:[/]")
                folder = benchmark.carry_out(prepared, progress=progress, stop=stop)
    except Stopped as reason:
        errors.print(f"[yellow]stopped[/]: {reason}; the same command goes on where it stopped", soft_wrap=True)
        return STOPPED
    _show_runs([folder], console)
    return 0


def train(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Train a method that has to learn, with one line an evaluation."""
    from rich.text import Text

    from errata.benchmarks.bench.compose import compose
    from errata.benchmarks.runs.stopping import Stop, Stopped
    from errata.benchmarks.training import train as training
    from errata.cli import overrides

    if _shows_configuration(arguments, "train", console):
        return 0
    config = training.TrainConfig.of(compose("train", overrides.translated(arguments, "train")))

    def report(entry: Mapping[str, Any]) -> None:
        console.print(training.line(entry), highlight=False, soft_wrap=True)

    stop = Stop()
    try:
        with stop.on_sigterm(), shown_warnings(errors), show_progress(errors) as progress:
            folder = training.run(config, progress=progress, report=report, stop=stop)
    except Stopped as reason:
        errors.print(f"[yellow]stopped[/]: {reason}; the same command goes on where it stopped", soft_wrap=True)
        return STOPPED
    console.print(f"kept: {training.line(training.read(folder)['best'])}", highlight=False, soft_wrap=True)
    for label, path in (("trained  ", folder), ("picture  ", folder / training.PICTURE)):
        console.print(Text.assemble((label, "dim"), str(path)), soft_wrap=True)
    return 0


def _sweep(lines: Sequence[str], command: str, stop: Stop, console: Console, errors: Console) -> int:
    """A sweep, then a table of what it measured and one of what failed."""
    from errata.cli import sweep_jobs

    swept = sweep_jobs.multirun(lines, command, stop)
    notes = [(place, note) for place in range(len(swept.jobs)) if (note := swept.note(place)) is not None]
    if done := [swept.out / note.run for _, note in notes if note.run is not None and note.failure is None]:
        _show_runs(done, console)
    failed = [(place, note) for place, note in notes if note.failure is not None]
    if failed:
        show_failures(swept, failed, errors)
    return min((1 if note.failure["is_ours"] else 2 for _, note in failed if note.failure), default=0)


def _show_runs(folders: Sequence[Path], console: Console) -> None:
    from rich.text import Text

    from errata.benchmarks.reports import report

    runs = [report.read(folder) for folder in dict.fromkeys(folders)]
    report.show(runs, console)
    for picture in report.write_comparisons(runs, folders[0].parent):
        console.print(Text.assemble(("picture  ", "dim"), str(picture)), soft_wrap=True)


def _shows_configuration(arguments: Sequence[str], config: str, console: Console, *, sweep: bool = False) -> bool:
    """Answer --help and --cfg (the configuration that the overrides give, of a sweep its first run's); refuse other
    flags."""
    from omegaconf import OmegaConf

    from errata.benchmarks.bench.compose import compose
    from errata.benchmarks.runs.sweeps import first_job
    from errata.cli import overrides

    flags = [argument for argument in arguments if argument.startswith("-")]
    if not flags:
        return False
    if unknown := [flag for flag in flags if flag not in ("-h", "--help", "--cfg")]:
        raise ConfigError(f"unknown option {unknown[0]!r}; there are --help, --cfg and, for bench, -m")
    rest = [argument for argument in arguments if not argument.startswith("-")]
    lines = overrides.translated(rest, config, sweep=sweep)
    values = compose(config, first_job(lines) if sweep else lines)
    if "--cfg" not in flags:
        console.print(USAGE[config], markup=False, highlight=False, soft_wrap=True)
        for group in overrides.GROUPS:
            if group in values or config == "bench":
                console.print(f"{group}=  {', '.join(overrides.choices_of(group))}", markup=False, highlight=False)
        console.print("\nNames and defaults:\n", highlight=False)
    console.print(OmegaConf.to_yaml(OmegaConf.create(values)), end="", markup=False, highlight=False)
    return True


if __name__ == "__main__":
    sys.exit(main())
