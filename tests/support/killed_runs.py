"""Runs sequences of edits that are killed where it hurts, lets them go on, and compares what they leave:

    main(FOLDER, ["MODE:METHOD:TRIALS", ...])

It changes what it runs with, so it needs a process of its own (forked.py).

Every trial is a fork that dies at one of the points just before or after an fsync or a rename, or half way through a
write; then another that may die as well; then one that is left alone. MODE is

    kill      SIGKILL
    disk      in place of the kill an OSError, ENOSPC and EIO by turns
    control   SIGKILL, and a defect: what goes on forgets one edit. Differences must be found
    twice     no fault: each trial is two runs at once and one alone, which are compared; `where` counts protocols
    unseeded  the same with a defect: each run begins with a model that is a little its own. Differences must be found

Prints one JSON line for each: {"points", "undone", "landed", "differences": [...], "where": {point: kills}}.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_once import compose_once

from errata import models
from errata.benchmarks import bench
from errata.benchmarks.bench import command_line, sequence_runner
from errata.benchmarks.bench.config import BenchConfig
from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.reports import report
from errata.editors.core.editor import Editor
from errata.editors.core.files import atomic
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.storage.journal import Journal

WEIGHTS = "weights.sha256"
# What says when and where something was done, or holds a digest of it.
TIMINGS = (".lock", "run.json", "seconds.jsonl", "DONE")
# What of a run's results is a measurement of the machine: seconds, and bytes of memory.
MEASURED = {"speed": None, "peak_memory_by_phase": None}
N_EDITS = 4
REPEATED_EDITS = 3  # of runs that are not disturbed: a whole batch, and the rest


PROTOCOLS = ("sequential", "single", "batch")


def config(method: str, protocol: str = "sequential", seed: int = 0) -> BenchConfig:
    return BenchConfig.of(
        {
            "seed": seed,
            "editor": {"name": method, "v_num_grad_steps": 3},
            "model": {"name": "world"},
            "dataset": {"name": "world", "shuffle": True, "probes": 1},
            "protocol": {"name": protocol},
            "guard": {"name": "perplexity", "ratio": 1.0},  # any rise: some batches are undone and halved
            "generation": {"tokens": 0, "fluency_tokens": 0},
            "collapse": {"n_texts": 6, "known_facts": 3},
            "device": "cpu",
            "n_edits": N_EDITS,
            "batch_size": 2,
            "eval_every": 2,
        }
    )


class Points:
    """Counts the moments at which a fault can be put, and puts one."""

    def __init__(self, fault: Callable[[], object] | None = None, place: int = -1) -> None:
        self.seen: list[str] = []
        self.fault, self.place = fault, place
        self._names: list[str] = []

    def install(self) -> None:
        fsync, replace, write_all = os.fsync, os.replace, atomic._write_all

        def patched_fsync(handle: int) -> None:
            self._pass("before fsync")
            fsync(handle)
            self._pass("after fsync")

        def patched_replace(source: Any, target: Any) -> None:
            self._pass("before rename")
            replace(source, target)
            self._pass("after rename")

        def patched_write(file: Any, content: bytes) -> None:
            half = len(content) // 2
            write_all(file, content[:half])
            self._pass("half way through a write")
            write_all(file, content[half:])

        os.fsync, os.replace, atomic._write_all = patched_fsync, patched_replace, patched_write  # type: ignore[assignment]

    def _pass(self, what: str) -> None:
        self.seen.append(what)
        if len(self.seen) - 1 == self.place and self.fault is not None:
            self.fault()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def broken_disk(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


def digest_of(model: Any) -> str:
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def carry_out(folder: Path, method: str, points: Points) -> None:
    """The run in `folder`."""
    os.chdir(folder)
    points.install()
    bench.run(config(method))


def note_live_weights(folder: Path) -> None:
    """Have the digest of the edited weights written down before the model is rolled back."""
    rollback = Editor.rollback

    def noted(self: Editor) -> None:
        (folder / WEIGHTS).write_text(digest_of(self.model))
        rollback(self)

    Editor.rollback = noted  # type: ignore[method-assign]


def read_weights(folder: Path) -> None:
    """Put the edits of the run's journal on a new model, and note the digest of its weights."""
    (run,) = (folder / "runs").iterdir()
    model, _ = models.load("world", device="cpu")
    entries = [record.entry for record in Journal(run / "journal").records() if record.entry is not None]
    Ledger.of(model).extend(entries)
    (folder / WEIGHTS).write_text(digest_of(model))


def forked(work: Callable[[], object]) -> int:
    """Do it in a child; how that ended: 0, minus the signal, or 1 after an OSError of ours."""
    return ended(begun(work))


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begun(work: Callable[[], object]) -> int:
    """Begin it in a child; its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except OSError:
            os._exit(1)
        except BaseException as error:  # noqa: BLE001 - the child must never return from here
            sys.stderr.write(f"{error!r}\n")
            sys.stderr.flush()
            os._exit(2)
        os._exit(0)
    return child


def left(folder: Path) -> dict[str, str]:
    """What a run leaves, by name: digests of its files, timings apart."""
    (run,) = (folder / "runs").iterdir()
    found = {WEIGHTS: (folder / WEIGHTS).read_text()} if (folder / WEIGHTS).exists() else {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_file() and name not in TIMINGS:
            content = path.read_bytes()
            if name == "results.json":
                content = json.dumps({**json.loads(content), **MEASURED}).encode()
            found[name] = hashlib.sha256(content).hexdigest()
    return found


def undone_in(folder: Path) -> int:
    """Edits that the guard has undone."""
    (results,) = (folder / "runs").glob("*/results.json")
    return json.loads(results.read_text())["counts"]["undone"]


def differences(folder: Path, reference: dict[str, str]) -> list[str]:
    now = left(folder)
    return sorted(name for name in now.keys() | reference.keys() if now.get(name) != reference.get(name))


def spare() -> None:
    """Leave out what no kill depends on: reading the dataset and the model again in every fork, drawing, and composing
    the defaults. What a trial then costs are its edits and their scores."""
    datasets.load = functools.cache(datasets.load)  # type: ignore[method-assign]
    models.fingerprint = functools.cache(models.fingerprint)  # type: ignore[method-assign]
    untouched = models.load("world", device="cpu")
    models.load = lambda *_, **__: copy.deepcopy(untouched)  # type: ignore[assignment]
    report.write = lambda *_: None  # type: ignore[assignment]
    compose_once(pytest.MonkeyPatch())


def forget_an_edit() -> None:
    """The defect of the control: the first edit that the diary holds is not put on the model again."""
    read = sequence_runner.SequenceRunner._read
    forgotten: list[Any] = []

    def forgetful(self: Any, entry: Any, made: Any) -> None:
        if entry is not None and not forgotten:
            forgotten.append(entry)
            entry = None
        read(self, entry, made)

    sequence_runner.SequenceRunner._read = forgetful  # type: ignore[method-assign]


def fault_of(mode: str, trial: int) -> Callable[[], None]:
    return kill if mode != "disk" else broken_disk((errno.ENOSPC, errno.EIO)[trial % 2])


@dataclasses.dataclass
class Outcome:
    """How many points there are, how many faults landed and where, and what differed."""

    points: int
    undone: int
    landed: int = 0
    differences: list[Any] = dataclasses.field(default_factory=list)
    where: dict[str, int] = dataclasses.field(default_factory=dict)


def undisturbed(folder: Path, method: str) -> list[str]:
    """Carry the run out once, in a fork, unless it has been; the points that it passes."""

    def work() -> None:
        points = Points()
        note_live_weights(folder)
        carry_out(folder, method, points)
        (folder / "points.json").write_text(json.dumps(points.seen))

    if not folder.exists():
        folder.mkdir()
        assert forked(work) == 0, "the undisturbed run failed"
    return json.loads((folder / "points.json").read_text())


def disturb(folder: Path, method: str, mode: str, death: int, seen: list[str], outcome: Outcome, trial: int) -> None:
    """Start the run, or go on with it, up to one point."""
    points = Points(fault_of(mode, trial), death)
    code = forked(lambda: carry_out(folder, method, points))
    if code == (1 if mode == "disk" else -signal.SIGKILL):
        outcome.landed += 1
        outcome.where[seen[death]] = outcome.where.get(seen[death], 0) + 1
    elif code != 0:
        outcome.differences.append([trial, death, f"exit code {code}"])


def tried(base: Path, mode: str, method: str, trials: int) -> Outcome:
    base.mkdir()
    rng = random.Random(f"{mode} {method}")
    reference = base.parent / f"{method}-undisturbed"  # of all jobs with this method
    seen = undisturbed(reference, method)
    expected = left(reference)
    outcome = Outcome(len(seen), undone_in(reference))
    for trial in range(trials):
        folder = base / f"trial{trial}"
        folder.mkdir()
        # Every point in turn; where there are fewer trials than points, spread over them.
        place = (2 * trial + 1) * len(seen) // (2 * trials) if trials < len(seen) else trial % len(seen)
        deaths = [place] if rng.random() < 0.5 else [place, rng.randrange(len(seen))]
        for death in deaths:
            disturb(folder, method, mode, death, seen, outcome, trial)
        code = forked(functools.partial(finish, folder, method, mode))
        found = differences(folder, expected) if code == 0 else [f"exit code {code}"]
        if found:
            outcome.differences.append([trial, deaths, found])
        shutil.rmtree(folder)
    return outcome


def unseeded() -> None:
    """The defect of the control: a weight that no two runs have in common."""
    load: Any = models.load

    def own(*_: Any, **__: Any) -> Any:
        model, tokenizer = load()
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] += int.from_bytes(os.urandom(2)) / 2**20
        return model, tokenizer

    models.load = own  # type: ignore[assignment]


def repeated(base: Path, mode: str, method: str, trials: int) -> Outcome:
    base.mkdir()
    outcome = Outcome(0, 0)
    for trial in range(trials):
        protocol = PROTOCOLS[trial % len(PROTOCOLS)]

        def work(folder: Path, protocol: str = protocol, trial: int = trial) -> None:
            if mode == "unseeded":
                unseeded()
            os.chdir(folder)
            bench.run(dataclasses.replace(config(method, protocol, seed=trial), n_edits=REPEATED_EDITS))

        prepared = bench.prepare(config(method, protocol))
        command_line.command(prepared.config, prepared.editor)  # composes what every fork would compose
        folders = [base / f"{trial}-{name}" for name in ("beside", "itself", "alone")]
        for folder in folders:
            folder.mkdir()
        beside = begun(functools.partial(work, folders[0]))
        codes = [
            forked(functools.partial(work, folders[1])),
            ended(beside),
            forked(functools.partial(work, folders[2])),
        ]
        outcome.landed += codes.count(0)
        outcome.where[protocol] = outcome.where.get(protocol, 0) + 1
        expected = left(folders[2])
        found = [differences(folder, expected) for folder in folders[:2]]
        if any(found) or any(codes):
            outcome.differences.append([trial, codes, found])
        for folder in folders:
            shutil.rmtree(folder)
    return outcome


def main(base: Path, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    spare()
    # Once before the forks, which then find everything imported and read.
    os.chdir(base)
    bench.run(dataclasses.replace(config("memit"), n_edits=1))
    for place, job in enumerate(jobs):
        mode, method, trials = job.split(":")
        carried_out = repeated if mode in ("twice", "unseeded") else tried
        outcome = carried_out(base / str(place), mode, method, int(trials))
        sys.stdout.write(json.dumps(dataclasses.asdict(outcome)) + "\n")


def finish(folder: Path, method: str, mode: str) -> None:
    if mode == "control":
        forget_an_edit()
    carry_out(folder, method, Points())
    read_weights(folder)
