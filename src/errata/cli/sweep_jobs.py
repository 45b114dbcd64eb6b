"""A sweep: what `errata bench -m` hands to Hydra, and what one job does in the process that it is launched in.

A job never raises: it notes its failure (benchmarks/runs/sweeps.py), and the other jobs continue. If a launcher gives
up because a process was killed, the jobs of that process are launched again and continue where they were.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.benchmarks.bench.job_plan import expand, refuse_repeats
from errata.benchmarks.runs.hydra_grammar import override_name
from errata.benchmarks.runs.status import is_held
from errata.benchmarks.runs.stopping import Stop, Stopped
from errata.benchmarks.runs.sweeps import JobNote, Sweep
from errata.cli.gpus import choose_gpu
from errata.editors.core.errors import ConfigError
from errata.editors.core.progress import silent

if TYPE_CHECKING:
    from omegaconf import DictConfig

VARIABLE = "ERRATA_SWEEP"  # environment variable that tells a job's process the folder of its sweep
ATTEMPTS = 2  # launches of a job whose process is killed
_REFUSALS = ("sbatch:", 'Could not detect "srun"')  # how submitit's errors begin if nothing was submitted
FOREVER = -1.0  # seconds to wait for the lock of a run


def multirun(lines: Sequence[str], command: str, stop: Stop) -> Sweep:
    """Plan a sweep and carry it out.

    Args:
        lines: Overrides for Hydra; some have several values.
        command: What was typed.
        stop: Asks the jobs in this process to end early. Jobs in other processes have their own.

    Returns:
        The sweep; its notes tell what became of each job.

    Raises:
        ConfigError: Hydra cannot compose the overrides, the launcher is not installed or starts no job, or two runs
            of the sweep are the same.
        Stopped: Some jobs ended early; the same command continues them.
    """
    from errata.benchmarks.bench.compose import compose, launching, swept

    jobs = expand([*swept(lines), *lines])
    refuse_repeats(jobs)
    about_launcher = [line for line in lines if override_name(line).startswith(("hydra/launcher", "hydra.launcher."))]
    _check_limit(*launching([*jobs[0], *about_launcher]))
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
        except RuntimeError as error:  # joblib and submitit raise it where a worker was killed
            dead = list(_dead(sweep))
            if not dead and sweep.count_begun() == begun:
                raise
            killed.update(dead)
            for index in dead:
                if killed[index] >= ATTEMPTS:
                    sweep.fail(index, ConfigError(f"its process was killed {ATTEMPTS} times, the last time: {error}"))


def _check_limit(launcher: str, settings: Mapping[str, Any]) -> None:
    """Refuse a time limit of Slurm's that would requeue every run as soon as it begins."""
    minutes, delay = settings.get("timeout_min"), settings.get("signal_delay_s")
    if launcher != "submitit_slurm" or not isinstance(minutes, int) or not isinstance(delay, int):
        return
    if 60 * minutes <= delay:
        raise ConfigError(
            f"hydra.launcher.timeout_min={minutes} is too short: Slurm requeues each run {delay} seconds before the "
            f"limit; give more minutes, or hydra.launcher.signal_delay_s below {60 * minutes}"
        )


def _dead(sweep: Sweep) -> Iterator[int]:
    """Yield the jobs that were begun and have not ended, and that no process works on."""
    for index in sweep.unended():
        note = sweep.note(index)
        if note is not None and not (note.run and is_held(sweep.out / note.run)):
            yield index


def _launch(lines: Sequence[str], sweep: Sweep, stop: Stop) -> None:
    """Hand the sweep to Hydra."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from errata.benchmarks.bench.compose import HPARAMS, one_line
    from errata.benchmarks.bench.defaults import register
    from errata.benchmarks.runs.hydra_grammar import quoted

    def task(config: DictConfig) -> None:
        run_job(config, stop)

    register()
    variable = f"+hydra.job.env_set.{VARIABLE}={quoted(str(sweep.folder.resolve()))}"
    with _arguments(["errata bench", "--multirun", *lines, variable]):
        try:
            hydra.main(version_base="1.3", config_path=f"pkg://{HPARAMS}", config_name="bench")(task)()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(one_line(error)) from error
        except RuntimeError as error:
            if not str(error).startswith(_REFUSALS):
                raise
            raise ConfigError(f"Slurm takes no job: {' '.join(str(error).split())}") from error


@contextmanager
def _arguments(words: list[str]) -> Iterator[None]:
    """Set sys.argv, from which Hydra reads its command line, and HYDRA_FULL_ERROR, without which it exits on errors."""
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
    """Carry out one job, as Hydra calls it.

    Args:
        config: The job's configuration.
        stop: The sweep's own in this process; in another process it is a copy, which no signal reaches.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    sweep, index = Sweep.read(Path(os.environ[VARIABLE])), HydraConfig.get().job.num
    if sweep is None:
        raise ConfigError(f"the plan of the sweep in {os.environ[VARIABLE]} is gone; start the sweep again")
    note = sweep.note(index)
    if note is not None and note.has_ended:
        return  # it ended before another job's process was killed
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    plain = {str(key): value for key, value in values.items()}
    launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
    if launcher == "basic":
        job(plain, sweep, index, stop)
        return
    own = Stop()
    with own.on_sigterm():
        job(plain, sweep, index, own, shows_bars=False, picks_gpu=launcher == "joblib")


def job(
    values: dict[str, Any], sweep: Sweep, index: int, stop: Stop, *, shows_bars: bool = True, picks_gpu: bool = False
) -> None:
    """Carry out one run, and note how it ended. For a run that is stopped, the note says only that it was begun.

    Args:
        values: The run's configuration.
        sweep: The sweep.
        index: Of the job in the sweep.
        stop: Asks the run to end early.
        shows_bars: Whether a terminal shows progress bars.
        picks_gpu: Whether the job reserves one of the machine's GPUs.
    """
    from errata.benchmarks import bench
    from errata.benchmarks.bench.config import BenchConfig
    from errata.cli.consoles import PlainConsole
    from errata.cli.messages import complain, shown_warnings
    from errata.cli.progress_bars import show_progress

    errors = PlainConsole(stderr=True)
    # The bars of several workers would overwrite each other.
    is_shown = shows_bars or not errors.is_terminal
    progress = show_progress(errors, run=sweep.name(index)) if is_shown else nullcontext(silent)
    try:
        stop.check()
        earlier = sweep.note(index)
        # The folder that an earlier start has made is named already: `errata status` would list it twice.
        begun = replace(JobNote.begun(), run=None if earlier is None else earlier.run)
        sweep.write(index, begun)
        if picks_gpu:
            choose_gpu()
        prepared = bench.prepare(BenchConfig.of(values))
        sweep.write(index, replace(begun, run=prepared.folder.path.name))
        with shown_warnings(errors), progress as report:
            # If another job's worker was killed, this run's first process may still be at work.
            bench.carry_out(prepared, progress=report, stop=stop, patience=FOREVER)
    except Stopped:
        return
    except Exception as error:  # noqa: BLE001  # noted, and shown when the sweep is over
        sweep.fail(index, error)
        complain(errors, error)
    else:
        sweep.write(index, JobNote(run=prepared.folder.path.name, has_ended=True))
