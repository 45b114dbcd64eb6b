"""How far the runs of a folder are, seen from outside while they go on: `errata status DIR`.

A run is done, running (a process holds its folder), failed (it left its reason), stopped (it was interrupted, and goes
on with its command) or pending (a sweep planned it). Nothing is written, no process is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from errata.benchmarks.runs import run_status
from errata.benchmarks.runs.run_folder import DONE, LOCK, RESULTS, SECONDS, folder_of_runs
from errata.benchmarks.runs.sweeps import FOLDER, PLAN, Sweep
from errata.editors.core.files import jsonl, locks

State = Literal["running", "failed", "stopped", "pending", "done"]
STATES: tuple[State, ...] = ("running", "failed", "stopped", "pending", "done")


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """One run as it stands.

    Attributes:
        name: Of its folder; of a run without one, the overrides that make it.
        folder: None where it has none yet.
        command: What makes it go on, or begins it.
        edits, made: How many it will make, and has made; None where that is not known.
        seconds_per_edit: Editing and evaluation together, so far.
        seconds_left: At that speed; of a pending run by the others of its sweep.
        reason, traceback: Why it failed, and the file that says where.
    """

    state: State
    name: str
    folder: str | None
    command: str
    edits: int | None = None
    made: int | None = None
    seconds_per_edit: float | None = None
    seconds_left: float | None = None
    reason: str | None = None
    traceback: str | None = None


@dataclasses.dataclass(frozen=True)
class RunsStatus:
    """All runs below a folder, and when they will be done: at the present number of workers, None where it is
    unknown."""

    runs: Sequence[RunStatus]
    seconds_left: float | None

    def count(self, state: State) -> int:
        return sum(run.state == state for run in self.runs)

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        counts = {state: self.count(state) for state in STATES}
        return {"counts": counts, "seconds_left": self.seconds_left, "runs": list(map(dataclasses.asdict, self.runs))}


def survey(root: Path) -> RunsStatus:
    """Look at a folder of runs and everything below it.

    Raises:
        ConfigError: no such folder.
    """
    folder_of_runs(root)
    found = {path.parent for name in (run_status.RUN, RESULTS) for path in root.rglob(name)}
    runs = {folder: _run(folder) for folder in sorted(found)}
    planned = [run for sweep in _sweeps(root) for run in _planned(sweep, runs)]
    begun = [_expected(run, runs.values()) for run in runs.values()]
    everything = sorted([*begun, *planned], key=lambda run: STATES.index(run.state))
    return RunsStatus(everything, _left(everything))


def _sweeps(root: Path) -> Iterator[Sweep]:
    for path in sorted(root.rglob(f"{FOLDER}/*/{PLAN}")):
        if (sweep := Sweep.read(path.parent)) is not None:
            yield sweep


def _planned(sweep: Sweep, runs: dict[Path, RunStatus]) -> Iterator[RunStatus]:
    """The jobs of a sweep that have no folder of a run: not begun, or failed or killed before they had one."""
    for place in range(len(sweep.jobs)):
        note, name = sweep.note(place), sweep.name(place)
        if note is not None and note.run is not None and sweep.out / note.run in runs:
            continue
        if note is not None and note.failure is not None:
            failed = {"reason": _reason(note.failure), "traceback": note.traceback}
            yield RunStatus("failed", name, None, sweep.again(place), **failed)
        else:
            state: State = "pending" if note is None or note.has_ended else "stopped" if note.is_gone else "running"
            yield RunStatus(state, name, None, sweep.again(place), seconds_left=_usual(sweep.out, runs.values()))


def _expected(run: RunStatus, others: Iterable[RunStatus]) -> RunStatus:
    """A run that has made no edit yet, with the time that others beside it take."""
    if run.state != "running" or run.seconds_left is not None or run.folder is None:
        return run
    return dataclasses.replace(run, seconds_left=_usual(Path(run.folder).parent, others))


def _usual(out: Path, runs: Iterable[RunStatus]) -> float | None:
    """How long a run in a folder takes, by the others there."""
    beside = [run for run in runs if run.folder and Path(run.folder).parent == out]
    known = [run.edits * run.seconds_per_edit for run in beside if run.edits and run.seconds_per_edit]
    return fmean(known) if known else None


def _run(folder: Path) -> RunStatus:
    said, failed = run_status.read(folder / run_status.RUN) or {}, run_status.read(folder / run_status.FAILED)
    is_done = (folder / DONE).is_file()
    made, seconds = _made(folder / SECONDS)
    told = said.get("edits")
    edits = made if is_done else told if isinstance(told, int) else None
    state = "done" if is_done else "running" if is_held(folder) else "failed" if failed else "stopped"
    left = max(0, edits - made) * seconds if edits and seconds and state in ("running", "stopped") else None
    return RunStatus(
        state=state,
        name=folder.name,
        folder=str(folder),
        command=str(said.get("command", "")),
        edits=edits,
        made=made,
        seconds_per_edit=seconds,
        seconds_left=left,
        reason=_reason(failed) if failed and state == "failed" else None,
        traceback=str(folder / run_status.TRACEBACK) if failed and state == "failed" else None,
    )


def _reason(failure: dict[str, Any]) -> str:
    return f"{failure.get('kind')}: {failure.get('reason')}"


def _made(path: Path) -> tuple[int, float | None]:
    """How many edits were made, and the mean of their seconds with all evaluation so far."""
    try:
        entries = jsonl.read(path).records
    except OSError:  # a pipe or a device, or a file of another user
        return 0, None
    cases = {entry["case"] for entry in entries if isinstance(entry.get("case"), str)}
    total = sum(_number(entry.get(name)) for entry in entries for name in ("edit", "evaluation"))
    return len(cases), total / len(cases) if cases else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def is_held(folder: Path) -> bool:
    """Whether a process works in a run's folder. The lock is taken and released at once; a run that begins in that
    moment waits for it."""
    return locks.is_held(folder / LOCK)


def _left(runs: Sequence[RunStatus]) -> float | None:
    """Seconds until all is done: no sooner than the longest run, with as many at once as are running now."""
    waiting = [run for run in runs if run.state in ("running", "pending")]
    known = [run.seconds_left for run in waiting if run.seconds_left is not None]
    if not waiting or len(known) < len(waiting):
        return None
    workers = max(1, sum(run.state == "running" for run in waiting))
    return max(max(known), sum(known) / workers)
