"""Many runs: what `errata bench -m` hands to Hydra, and what one job does in whatever process it is launched.

A job never raises: it notes its failure (benchmarks/runs/sweeps.py) and the others go on. Where a launcher gives up
since a process was killed, the jobs that were at work in it are begun once more, and go on where they were.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.runs.status import is_held
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.benchmarks.runs.sweeps import JobNote, Sweep, expand, refuse_repeats
from errata.cli.gpus import choose_gpu
from errata.editors.core.errors import ConfigError
from errata.editors.core.progress import silent

if TYPE_CHECKING:
    from omegaconf import DictConfig

# How a job's process is told its sweep.
VARIABLE = "ERRATA_SWEEP"
ATTEMPTS = 2
FOREVER = -1.0


def multirun(lines: Sequence[str], command: str, stop: Stop) -> Sweep:
    """Plan a sweep and carry it out.

    Args:
        lines: Overrides for Hydra, of which some have several values.
        command: What was typed.
        stop: Asks the jobs of this process to end early; those of others have their own.

    Returns:
        The sweep; its notes say what became of each job.

    Raises:
        ConfigError: Hydra cannot make a configuration of the overrides, the launcher is not installed, or the sweep
            says one run twice.
        Stopped: some jobs ended early; the same sweep goes on with them.
    """
    from errata.benchmarks.bench.compose import compose, swept

    jobs = expand([*swept(lines), *lines])
    refuse_repeats(jobs)
    out = compose("bench", jobs[0])["out"]
    sweep = Sweep.begin(out, command, jobs)
    killed: Counter[int] = Counter()
    while True:
        begun = sweep.count_begun()
        try:
            _launch(lines, sweep, stop)
            if left := len(jobs) - sweep.count_ended():
                stop.check()
                raise Stopped(f"{left} of {len(jobs)} runs have stopped early")
            return sweep
        except RuntimeError as error:  # what joblib and submitit raise where a worker was killed
            dead = list(_dead(sweep))
            if not dead and sweep.count_begun() == begun:
                raise
            killed.update(dead)
            for place in dead:
                if killed[place] >= ATTEMPTS:
                    sweep.fail(place, ConfigError(f"its process was killed {ATTEMPTS} times, the last time: {error}"))


def _dead(sweep: Sweep) -> Iterator[int]:
    """The jobs that were begun, have not ended, and at which nobody is at work."""
    for place in sweep.unended():
        note = sweep.note(place)
        if note is not None and not (note.run and is_held(sweep.out / note.run)):
            yield place


def _launch(lines: Sequence[str], sweep: Sweep, stop: Stop) -> None:
    """Hand the sweep to Hydra."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from errata.benchmarks.bench.compose import HPARAMS, one_line
    from errata.benchmarks.bench.hydra_grammar import quoted

    def task(config: DictConfig) -> None:
        run_job(config, stop)

    told = f"+hydra.job.env_set.{VARIABLE}={quoted(str(sweep.folder.resolve()))}"
    with _arguments(["errata bench", "--multirun", *lines, told]):
        try:
            hydra.main(version_base="1.3", config_path=f"pkg://{HPARAMS}", config_name="bench")(task)()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(one_line(error)) from error


@contextmanager
def _arguments(words: list[str]) -> Iterator[None]:
    """Hydra reads its command line from sys.argv, and without HYDRA_FULL_ERROR prints errors itself and exits."""
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = words, "1"
    try:
        yield
    finally:
        sys.argv = before[0]
        if before[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before[1]


def run_job(config: DictConfig, stop: Stop) -> None:
    """One job, as Hydra calls it, here or in another process, where `stop` is but a copy."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    sweep, place = Sweep.read(Path(os.environ[VARIABLE])), HydraConfig.get().job.num
    if sweep is None:
        raise ConfigError(f"the plan of the sweep in {os.environ[VARIABLE]} is gone; begin it again")
    note = sweep.note(place)
    if note is not None and note.has_ended:
        return  # before another job's process was killed
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    plain = {str(key): value for key, value in values.items()}
    launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
    if launcher == "basic":
        job(plain, sweep, place, stop)
        return
    own = Stop()
    with own.on_sigterm():
        job(plain, sweep, place, own, shows_bars=False, picks_gpu=launcher == "joblib")


def job(
    values: dict[str, Any], sweep: Sweep, place: int, stop: Stop, *, shows_bars: bool = True, picks_gpu: bool = False
) -> None:
    """Carry out one run, and note what became of it; of one that is stopped, only that it was begun."""
    from rich.console import Console

    from errata.benchmarks.bench import run as bench
    from errata.benchmarks.bench.config import BenchConfig
    from errata.cli.messages import complain, shown_warnings
    from errata.cli.progress_bars import show_progress

    errors = Console(stderr=True)
    # Bars of several workers would run through each other.
    progress = show_progress(errors) if shows_bars or not errors.is_terminal else nullcontext(silent)
    try:
        stop.check()
        begun = JobNote.begun()
        sweep.write(place, begun)
        if picks_gpu:
            choose_gpu()
        prepared = bench.prepare(BenchConfig.of(values))
        sweep.write(place, replace(begun, run=prepared.folder.path.name))
        with shown_warnings(errors), progress as report:
            # Where another job's worker was killed, this run's first process may still be at work in it.
            bench.carry_out(prepared, progress=report, stop=stop, patience=FOREVER)
    except Stopped:
        return
    except Exception as error:  # noqa: BLE001  # noted, and shown when the sweep is over
        sweep.fail(place, error)
        complain(errors, error)
    else:
        sweep.write(place, JobNote(run=prepared.folder.path.name, has_ended=True))
