"""A sweep on disk: which runs were planned, and what became of each, whatever process it ran in.

    OUT/sweeps/DIGEST/plan.json     the command, and the overrides of every job
    OUT/sweeps/DIGEST/3.json        what became of the fourth: its run's folder, or why there is none

A job's file is written by the job itself, so that it is there under every launcher, and when the process that waits for
the jobs is gone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.benchmarks.runs import run_status
from errata.benchmarks.runs.hydra_grammar import override_name, typed
from errata.benchmarks.runs.json_values import digest, encodable
from errata.editors.core.config import build
from errata.editors.core.errors import ConfigError
from errata.editors.core.files.atomic import make_folder, write_atomically

FOLDER, PLAN = "sweeps", "plan.json"
# Overrides that say how a job is launched, not what it does.
_LAUNCHING = ("hydra", "launcher")


@dataclasses.dataclass(frozen=True)
class JobNote:
    """What became of a job.

    Attributes:
        run: Name of its run's folder in `out`, once that is known.
        failure: As `run_status.failure` has it; None where it has not failed.
        traceback: Path of a file, where it failed.
        has_ended: Whether the job came to its end, well or not; otherwise it is at work, or was killed.
        host, process: Where it is at work.
    """

    run: str | None = None
    failure: dict[str, Any] | None = None
    traceback: str | None = None
    has_ended: bool = False
    host: str | None = None
    process: int | None = None

    @classmethod
    def begun(cls) -> JobNote:
        """Of a job at which this process is at work."""
        return cls(host=platform.node(), process=os.getpid())

    @property
    def is_gone(self) -> bool:
        """Whether its process was one of this machine, and is no more."""
        return self.host == platform.node() and self.process is not None and not _is_alive(self.process)


def _is_alive(process: int) -> bool:
    """Whether a process of this machine is there; where asking would end it (Windows), it may be."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


@dataclasses.dataclass(frozen=True)
class _Plan:
    """plan.json."""

    command: str
    jobs: tuple[tuple[str, ...], ...]
    began: float = 0.0


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A plan and the place of its notes.

    Attributes:
        folder: OUT/sweeps/DIGEST.
        command: What was typed.
        jobs: Overrides of every job, in the order of Hydra's numbers.
    """

    folder: Path
    command: str
    jobs: tuple[tuple[str, ...], ...]

    @classmethod
    def begin(cls, out: str | Path, command: str, jobs: Sequence[Sequence[str]]) -> Sweep:
        """Write down what is planned. What a sweep of the same jobs noted earlier is forgotten.

        Raises:
            ConfigError: its folder cannot be made.
        """
        plan = tuple(map(tuple, jobs))
        sweep = cls(Path(out) / FOLDER / digest(plan)[:12], command, plan)
        make_folder(sweep.folder)
        for place in range(len(plan)):
            sweep._file(place).unlink(missing_ok=True)
        _write(sweep.folder / PLAN, {"command": command, "jobs": plan, "began": time.time()})
        return sweep

    @classmethod
    def read(cls, folder: Path) -> Sweep | None:
        """The sweep of a folder; None where it has no plan, or one that is none of ours."""
        found = run_status.read(folder / PLAN) or {}
        jobs = found.get("jobs")
        if not isinstance(jobs, list) or not all(isinstance(job, list) for job in jobs):
            return None  # `build` would make a list of one value
        try:
            plan = build(_Plan, found)
        except ConfigError:
            return None
        if len(set(map(len, plan.jobs))) > 1:  # a job's own overrides are told apart by their index
            return None
        return cls(folder, plan.command, plan.jobs)

    @property
    def out(self) -> Path:
        """Where its runs' folders are."""
        return self.folder.parent.parent

    def note(self, place: int) -> JobNote | None:
        """What became of a job so far; None where it was not begun, or its file cannot be read."""
        found = run_status.read(self._file(place))
        try:
            return None if found is None else build(JobNote, found)
        except ConfigError:
            return None

    def write(self, place: int, note: JobNote) -> None:
        _write(self._file(place), dataclasses.asdict(note))

    def fail(self, place: int, error: Exception) -> None:
        """Note a failure, with its traceback beside."""
        path = self.folder / f"{place}.traceback.txt"
        write_atomically(path, run_status.trace(error).encode())
        note = self.note(place) or JobNote()
        self.write(
            place, dataclasses.replace(note, failure=run_status.failure(error), traceback=str(path), has_ended=True)
        )

    def unended(self) -> list[int]:
        """The jobs that were begun and have not come to their end."""
        notes = map(self.note, range(len(self.jobs)))
        return [place for place, note in enumerate(notes) if note is not None and not note.has_ended]

    def count_ended(self) -> int:
        """How many jobs have come to their end."""
        return sum(note.has_ended for place in range(len(self.jobs)) if (note := self.note(place)) is not None)

    def count_begun(self) -> int:
        """How many jobs were begun, ended or not."""
        return sum(self._file(place).exists() for place in range(len(self.jobs)))

    def name(self, place: int) -> str:
        """The overrides of a job that are not the same in all. A job alone is called by its first."""
        own = [line for i, line in enumerate(self.jobs[place]) if len({job[i] for job in self.jobs}) > 1]
        return " ".join(map(typed, own or self.jobs[place][:1]))

    def again(self, place: int) -> str:
        """The command line of one job."""
        words = [typed(line) for line in self.jobs[place] if override_name(line) not in _LAUNCHING]
        return shlex.join(["errata", "bench", *words])

    def _file(self, place: int) -> Path:
        return self.folder / f"{place}.json"


def _write(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(encodable(value), indent=2) + "\n").encode())
