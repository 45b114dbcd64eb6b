"""A sweep on a real Slurm: a time limit is met, a node dies, a run is preempted. The results are those of one process.

docs/cluster.md tells what was seen. The cluster is one machine's, see tests/support/slurm_cluster.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, SlurmJob, missing_programs, slurm_cluster, wait_until

from errata.benchmarks.runs import sweeps
from errata.benchmarks.runs.status import survey
from errata.benchmarks.runs.sweeps import Sweep

SWEEP = ["editor=rome,memit", "dataset=world,world_counterfact", "protocol=sequential", "n_edits=16", "batch_size=1"]
SWEEP += ["eval_every=8", "device=cpu", "editor.v_num_grad_steps=4", "generation.tokens=0"]
SWEEP += ["generation.fluency_tokens=0", "collapse.n_texts=4", "collapse.known_facts=10"]
RUNS = 4
SLURM = ["launcher=slurm", "hydra.launcher.partition=cpu", "hydra.launcher.gpus_per_node=null"]
SLURM += ["hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1", "hydra.launcher.array_parallelism=2"]
# Slurm counts limits in minutes, and submitit calls a run timed out that has no ten minutes left.
SLURM += ["hydra.launcher.timeout_min=10", "hydra.launcher.signal_delay_s=60"]
PATIENCE = 900.0  # seconds: two nodes on a busy machine are slow


def started(out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "errata.cli.main", "bench", "-m", *SWEEP, *more, f"out={out}"]
    with (out.parent / f"{out.name}.log").open("wb") as log:
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


@pytest.fixture
def cluster() -> Iterator[SlurmCluster]:
    if missing := missing_programs():
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing; on Debian, apt-get install slurm-wlm munge")
    with slurm_cluster(nodes=2) as made:
        yield made


class Watched:
    """A sweep that runs on a cluster, with what was seen of it."""

    def __init__(self, cluster: SlurmCluster, out: Path, process: subprocess.Popen[bytes]) -> None:
        self._cluster, self._out, self._process = cluster, out, process
        self.seen: list[dict[str, object]] = []

    def working(self, edits: int) -> SlurmJob:
        """Wait for a job whose run is at work and has made this many edits since its job was last watched."""
        found: list[SlurmJob] = []

        def look() -> bool:
            self._cluster.release()
            assert self._process.poll() is None, "the sweep was over before it could be disturbed"
            jobs = [job for job in self._cluster.jobs() if job.state == "RUNNING" and self.made(job) >= edits]
            found.extend(job for job in jobs if self.state(job) == "running")
            return bool(found)

        wait_until(look, PATIENCE, f"a run has made {edits} edits")
        return found[0]

    def folder(self, job: SlurmJob) -> Path | None:
        """Return the folder of a job's run, once it has one."""
        (plan,) = self._out.glob(f"{sweeps.FOLDER}/*/{sweeps.PLAN}")
        sweep = Sweep.read(plan.parent)
        note = sweep and sweep.note(int(job.id.split("_")[1]))
        return self._out / note.run if note and note.run else None

    def made(self, job: SlurmJob) -> int:
        """Return how many edits its run has written down."""
        folder = self.folder(job)
        path = folder and folder / "seconds.jsonl"
        return path.read_bytes().count(b'"edit":') if path and path.exists() else 0

    def state(self, job: SlurmJob) -> str | None:
        """Return what `errata status` says of its run."""
        folder = self.folder(job)
        return next((run.state for run in survey(self._out).runs if folder and run.folder == str(folder)), None)

    def requeued(self, job: SlurmJob, cause: str, disturb: Callable[[], object]) -> None:
        """Disturb a job, and wait until Slurm has requeued it."""
        made = self.made(job)
        disturb()

        def again() -> SlurmJob | None:
            return next((now for now in self._cluster.jobs() if now.id == job.id and now.restarts > job.restarts), None)

        wait_until(again, 120, f"{job.id} is requeued: {cause}")
        wait_until(lambda: self.state(job) != "running" or again_runs(again()), 60, "its run is left")
        states = {
            state: survey(self._out).count(state) for state in ("running", "stopped", "failed", "pending", "done")
        }
        self.seen.append({"cause": cause, "job": job.id, "node": job.node, "edits": made, "states": states})
        assert states["failed"] == 0, self.seen


def again_runs(job: SlurmJob | None) -> bool:
    return job is not None and job.state == "RUNNING"


def minutes_run(cluster: SlurmCluster, job: SlurmJob) -> int:
    """Return the limit, in whole minutes, that a running job meets within the next minute."""
    clock = cluster.command("squeue", "-h", "-j", job.id, "-O", "TimeUsed").strip().split(":")
    return int(clock[-2]) + 1


@pytest.mark.slow
def test_a_sweep_on_slurm_outlives_a_limit_a_dead_node_and_preemption(cluster: SlurmCluster, tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "slurm"
    assert started(alone).wait() == 0
    process = started(out, *SLURM)
    wait_until(lambda: cluster.jobs() or process.poll() is not None, PATIENCE, "the array is submitted")
    watched = Watched(cluster, out, process)

    job = watched.working(edits=2)
    limit = minutes_run(cluster, job)
    shorten = ["scontrol", "update", f"JobId={job.id}", f"TimeLimit={limit}"]
    watched.requeued(job, "time limit", lambda: cluster.command(*shorten))
    # The next start has the whole limit again, as if it had never been shortened.
    cluster.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")

    job = watched.working(edits=3)
    watched.requeued(job, "node killed", lambda: cluster.kill_node(job.node))
    status = [sys.executable, "-m", "errata.cli.main", "status", str(out), "--json"]
    assert sum(json.loads(subprocess.check_output(status))["counts"].values()) == RUNS
    cluster.start_node(job.node)

    job = watched.working(edits=4)
    urgent = ["sbatch", "--partition=urgent", f"--nodelist={job.node}", "--output=/dev/null", "--wrap=sleep 5"]
    watched.requeued(job, "preempted", lambda: cluster.command(*urgent))

    def over() -> bool:
        cluster.release()
        return process.poll() is not None

    wait_until(over, PATIENCE, "the sweep is over")
    log = (tmp_path / "slurm.log").read_text()
    assert process.returncode == 0, log
    assert survey(out).count("done") == RUNS
    runs = sorted(path.parent.name for path in alone.glob("*/results.json"))
    assert len(runs) == RUNS
    assert runs == sorted(path.parent.name for path in out.glob("*/results.json"))
    for run in runs:
        for name in ("records.jsonl", "curve.json"):
            assert (out / run / name).read_bytes() == (alone / run / name).read_bytes(), (run, name, watched.seen)
    print(json.dumps(watched.seen, indent=1))  # noqa: T201 - shown by pytest -s, for docs/cluster.md
