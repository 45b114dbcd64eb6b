"""The command line: `errata edit`, `errata bench`, `errata methods`, and what reading.py has.

Exit codes: 0 done; 1 a defect of ours (with its traceback); 2 something that you can put right, said in one line;
75 a bench that was told to stop (SIGTERM, time_limit) and goes on with the same command; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.editors.core.errors import ConfigError, ErrataError
from errata.watching import watched

if TYPE_CHECKING:
    from rich.console import Console


# Errors of the system that no change of errata puts right: a full or read-only disk, a quota, missing permission.
_OF_THE_MACHINE = tuple(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO") if hasattr(errno, name)
)

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again

HELP = """\
errata: correct single facts in a language model, undo any correction, measure what it cost.

  errata edit  [name=value ...]      one edit: before, after, and the edit written to a folder
  errata bench [name=value ...]      many edits, scored; -m runs every combination of comma-separated values
  errata compare RUN RUN             two runs over the same cases: paired differences, intervals, tests
  errata report  DIR [out=FOLDER]    tables, pictures and one page about all finished runs in a folder
  errata convert KIND FILE...        hparams, moments, projectors of other repositories; a dataset for EasyEdit
  errata export FOLDER lora=ADAPTER  edits that were written, for PEFT; merged=MODEL for the edited model
  errata methods [NAME]              the methods that there are; one method and its fields
  errata --version

errata edit model=world prompt="The capital of {} is" subject=Varland target=Oslen
errata bench editor=r_rome model=world n_edits=50
errata bench -m editor=rome,r_rome,c_rome model=world n_edits=50
errata bench model=path/or/id dataset=counterfact dataset.path=counterfact.json n_edits=100
errata compare runs rome r_rome
errata report runs

`errata bench --help` and `errata edit --help` show every name and its default.
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
        goes_on = "; the same command goes on where it stopped" if sys.argv[1:2] == ["bench"] else ""
        errors.print(f"\n[yellow]stopped[/]{goes_on}")
        return 130
    except ErrataError as error:
        _complain(errors, error)
        return 2
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        _complain(errors, error)
        return 2


def run(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """Carry out one command line.

    Raises:
        ErrataError: what the user can put right.
    """
    from errata import converting, exporting, reading
    from errata.editors.core.config import did_you_mean

    commands: dict[str, Callable[[Sequence[str], Console, Console], int]] = {
        "edit": edit,
        "bench": bench,
        "compare": reading.compare,
        "convert": converting.convert,
        "export": exporting.export,
        "methods": methods,
        "report": reading.report,
    }
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        console.print(HELP, end="", markup=False, highlight=False, soft_wrap=True)
        return 0
    if command in ("-V", "--version"):
        from importlib.metadata import version

        console.print(f"errata {version('errata')}", highlight=False)
        return 0
    if command not in commands:
        raise ConfigError(f"unknown command {command!r}{did_you_mean(command, commands)}")
    return commands[command](rest, console, errors)


def methods(arguments: Sequence[str], console: Console, errors: Console) -> int:  # noqa: ARG001
    """List the registered methods, or show one."""
    from errata import catalogue

    if len(arguments) > 1:
        raise ConfigError(f"expected the name of one method, got {' '.join(arguments)!r}")
    if arguments:
        catalogue.show_one(arguments[0], console)
    else:
        catalogue.show_all(console)
    return 0


def edit(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """One edit, shown before and after, and written to a folder."""
    from errata import demonstration, overrides
    from errata.benchmarks.compose import compose

    texts, rest = {}, []
    for argument in arguments:
        name, value = overrides.split(argument) if not argument.startswith("-") else (argument, "")
        if name in demonstration.TEXTS:
            texts[name] = value
        else:
            rest.append(argument)
    if _shows_configuration(rest, "edit", console):
        return 0
    values = compose("edit", overrides.translated(rest, "edit", also=demonstration.TEXTS))
    with _shown_warnings(errors), watched(errors) as progress:
        shown = demonstration.run(values, texts, progress=progress)
    demonstration.show(shown, console)
    return 0


def bench(arguments: Sequence[str], console: Console, errors: Console) -> int:
    """One run, or with -m one for every combination of comma-separated values."""
    from rich.text import Text

    from errata import overrides
    from errata.benchmarks import bench as benchmark
    from errata.benchmarks import report
    from errata.benchmarks.compose import compose
    from errata.benchmarks.config import BenchConfig
    from errata.benchmarks.stopping import Stop, Stopped

    flags = [argument for argument in arguments if argument.startswith("-")]
    rest = [argument for argument in arguments if not argument.startswith("-")]
    sweep = bool({"-m", "--multirun"} & set(flags))
    if _shows_configuration([flag for flag in flags if flag not in ("-m", "--multirun")] + rest, "config", console):
        return 0
    lines = overrides.translated(rest, "config", sweep=sweep)
    folders: list[Path] = []
    stop = Stop()

    def job(values: dict[str, Any]) -> None:
        with _shown_warnings(errors), watched(errors) as progress:
            folders.append(benchmark.run(BenchConfig.of(values), progress=progress, stop=stop))

    try:
        with stop.on_sigterm(lambda: errors.print("[yellow]SIGTERM[/]: stopping behind the edit at hand")):
            if not sweep:
                job(compose("config", lines))
                failures: list[ErrataError] = []
            else:
                failures = _multirun(lines, job, errors)
    except Stopped as reason:
        errors.print(f"[yellow]stopped[/]: {reason}; the same command goes on where it stopped", soft_wrap=True)
        return STOPPED
    if folders:
        runs = [report.read(folder) for folder in dict.fromkeys(folders)]
        report.show(runs, console)
        for picture in report.write_comparisons(runs, folders[0].parent):
            console.print(Text.assemble(("picture  ", "dim"), str(picture)), soft_wrap=True)
    for failure in failures:
        _complain(errors, failure)
    return 2 if failures else 0


def _multirun(lines: Sequence[str], job: Callable[[dict[str, Any]], None], errors: Console) -> list[ErrataError]:
    """Hand the sweep to Hydra, and go on after a run that failed. Returns the failures."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from errata.benchmarks.compose import HPARAMS, one_line

    failures: list[ErrataError] = []

    @hydra.main(version_base="1.3", config_path=f"pkg://{HPARAMS}", config_name="config")
    def task(config: DictConfig) -> None:
        values = OmegaConf.to_container(config, resolve=True)
        assert isinstance(values, dict)
        try:
            job({str(key): value for key, value in values.items()})
        except ErrataError as error:
            failures.append(error)
            _complain(errors, error)

    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # Without this Hydra prints errors itself and ends the process.
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["errata bench", "--multirun", *lines], "1"
    try:
        task()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    finally:
        sys.argv = before[0]
        if before[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before[1]
    return failures


def _shows_configuration(arguments: Sequence[str], config: str, console: Console) -> bool:
    """Answer --help and --cfg (the configuration that the overrides give); refuse other flags."""
    from omegaconf import OmegaConf

    from errata import overrides
    from errata.benchmarks.compose import compose

    flags = [argument for argument in arguments if argument.startswith("-")]
    if not flags:
        return False
    if unknown := [flag for flag in flags if flag not in ("-h", "--help", "--cfg")]:
        raise ConfigError(f"unknown option {unknown[0]!r}; there are --help, --cfg and, for bench, -m")
    rest = [argument for argument in arguments if not argument.startswith("-")]
    values = compose(config, overrides.translated(rest, config))
    if "--cfg" not in flags:
        console.print(HELP, markup=False, highlight=False, soft_wrap=True)
        for group in overrides.GROUPS:
            if group in values:
                console.print(f"{group}=  {', '.join(overrides.choices_of(group))}", markup=False, highlight=False)
        console.print("\nNames and defaults:\n", highlight=False)
    console.print(OmegaConf.to_yaml(OmegaConf.create(values)), end="", markup=False, highlight=False)
    return True


def _complain(console: Console, error: Exception) -> None:
    from rich.text import Text

    console.print(Text.assemble(("errata: ", "bold red"), " ".join(str(error).split())), soft_wrap=True)


@contextmanager
def _shown_warnings(console: Console) -> Iterator[None]:
    """Each warning once, in one line."""
    from rich.text import Text

    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in seen:
            seen.add(text)
            console.print(Text.assemble((f"{category.__name__}: ", "yellow"), text), soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for noisy in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning):
            warnings.simplefilter("ignore", noisy)
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    sys.exit(main())
