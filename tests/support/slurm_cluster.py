"""A real Slurm on this machine for tests: a controller and several nodes, in a folder of their own, on loopback only.

It needs Slurm's daemons and munge (`apt-get install slurm-wlm munge`) and may run as any user. Nodes can be killed as a
machine dies: the daemon and every process that it has started end at once, without a signal that they could notice.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "munged")
_SYSTEM = "/usr/sbin:/sbin"  # where distributions put daemons, often outside a user's PATH
# Seconds after which the controller gives up a node that does not answer; Slurm's own default is 300.
NODE_TIMEOUT = 10


def missing_programs() -> list[str]:
    """Return which of the programs are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:{_SYSTEM}"


@dataclass(frozen=True)
class SlurmJob:
    """One job of an array as squeue lists it.

    Attributes:
        id: Of the job, as in 4_0.
        state: PENDING, RUNNING, COMPLETING and so on.
        node: Where it runs; empty where it waits.
        reason: Why it waits.
        restarts: How many times it was requeued.
    """

    id: str
    state: str
    node: str
    reason: str
    restarts: int


@contextmanager
def slurm_cluster(nodes: int, cpus: int = 1) -> Iterator[SlurmCluster]:
    """Context manager that starts a cluster and ends everything that it has started."""
    folder = Path(tempfile.mkdtemp(prefix="errata-slurm-"))
    folder.chmod(0o755)  # munge wants a socket that all can reach
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    cluster = SlurmCluster(folder, [f"n{index + 1}" for index in range(nodes)], cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


class SlurmCluster:
    """The cluster: partition `cpu`, whose jobs are requeued for those of partition `urgent`."""

    def __init__(self, folder: Path, nodes: list[str], cpus: int) -> None:
        self.folder, self.nodes, self._cpus = folder, nodes, cpus

    def start(self) -> None:
        """Start munge, the controller and every node, and wait until all are idle."""
        for name in ("state", "spool", "log", "run"):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(self._configuration())
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "pid-file": "run/munged.pid", "log-file": "log/munged.log"}
        files |= {"key-file": "munge.key", "seed-file": "run/munged.seed"}
        self.command("munged", "--force", *(f"--{name}={self.folder / file}" for name, file in files.items()))
        self.command("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: set(self._states().values()) == {"idle"}, 120, "all nodes are idle")

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self.command("slurmd", "-N", node)

    def kill_node(self, node: str) -> int:
        """Kill the daemon of a node and all processes that it has started; return how many."""
        mine = [process for process in _processes() if f"SLURMD_NODENAME={node}" in _environment(process)]
        # slurmstepd, which starts and watches a step, belongs to the node as well.
        steps = {parent for process in mine if _name(parent := _parent(process)).startswith("slurmstepd")}
        killed = [int((self.folder / "run" / f"slurmd-{node}.pid").read_text()), *steps, *mine]
        for process in killed:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return len(killed)

    def jobs(self) -> list[SlurmJob]:
        """Return the jobs that wait or run, arrays task by task."""
        columns = "JobArrayID:|,State:|,NodeList:|,Reason:|,RestartCnt"
        lines = self.command("squeue", "-h", "-r", "-O", columns).splitlines()
        rows = ([cell.strip() for cell in line.split("|")] for line in lines)
        return [SlurmJob(job, state, node, reason, int(again)) for job, state, node, reason, again in rows]

    def release(self) -> None:
        """Let requeued jobs begin now: Slurm lets each wait for two minutes."""
        for job in self.jobs():
            if job.state == "PENDING" and job.reason == "BeginTime":
                with suppress(AssertionError):  # it has begun meanwhile
                    self.command("scontrol", "update", f"JobId={job.id}", "StartTime=now")

    def stop(self) -> None:
        """End the jobs and every daemon."""
        with suppress(AssertionError, OSError):
            self.command("scancel", "--partition=cpu")
            self.command("scancel", "--partition=urgent")
        for node in self.nodes:
            with suppress(OSError, ValueError):
                self.kill_node(node)
        for file in (self.folder / "run").glob("*.pid"):
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)

    def command(self, *words: str) -> str:
        """Carry out a command of Slurm's and return its output."""
        environment = {**os.environ, "PATH": _path()}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def _states(self) -> dict[str, str]:
        lines = self.command("sinfo", "-h", "-N", "-p", "cpu", "-o", "%N %T").splitlines()
        return dict(line.split() for line in lines)

    def _configuration(self) -> str:
        user, folder = subprocess.check_output(["id", "-un"], text=True).strip(), self.folder
        controller, *ports = _free_ports(len(self.nodes) + 1)
        settings = {
            "ClusterName": "trial",
            "SlurmctldHost": "localhost",
            "SlurmctldPort": controller,
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder}/munge.socket",
            "CredType": "cred/munge",
            "SlurmUser": user,
            "SlurmdUser": user,
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool/%n",
            "SlurmctldPidFile": f"{folder}/run/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/run/slurmd-%n.pid",
            "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
            "SlurmdLogFile": f"{folder}/log/slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "ReturnToService": 2,
            "JobRequeue": 1,
            "KillWait": 5,
            "SlurmdTimeout": NODE_TIMEOUT,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmdParameters": "config_overrides",  # the CPUs said below, however many the machine has
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for node, port in zip(self.nodes, ports, strict=True):
            place = f"NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
            lines.append(f"NodeName={node} {place} CPUs={self._cpus} RealMemory=8000")
        shared = f"Nodes={','.join(self.nodes)} MaxTime=INFINITE State=UP"
        lines.append(f"PartitionName=cpu {shared} Default=YES PriorityTier=1")
        lines.append(f"PartitionName=urgent {shared} PriorityTier=10")
        return "\n".join(lines) + "\n"


def wait_until(is_so: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until something is so, looking twice per second."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"waited {seconds:g} seconds until {what}"
        time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/environ").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return []


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
