"""Memory that is left in control groups: the smallest room of a process's group and those above it."""

from __future__ import annotations

from pathlib import Path

import pytest

from errata.benchmarks.runs import cgroup_room, environment

SECOND = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
FIRST = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group(root: Path, names: tuple[str, str, str, str], path: str, limit: str, usage: int, droppable: int) -> None:
    folder = root / names[0] / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[1]).write_text(f"{limit}\n")
    (folder / names[2]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[3]} {droppable}\nfile 5\n")


def own(root: Path, *lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(("names", "line"), [(SECOND, "0::/slurm/step"), (FIRST, "7:cpu,memory:/slurm/step")])
def test_the_smallest_room_of_all_groups_is_left(names: tuple[str, str, str, str], line: str, tmp_path: Path) -> None:
    own(tmp_path, "3:cpuset:/other", line)
    assert cgroup_room.room(tmp_path) is None  # no group says anything
    group(tmp_path, names, "slurm/step", "max", 40, 0)
    assert cgroup_room.room(tmp_path) is None
    group(tmp_path, names, "slurm", "100", 70, 20)
    group(tmp_path, names, "", "1000", 70, 20)
    assert cgroup_room.room(tmp_path) == 50
    group(tmp_path, names, "slurm/step", "60", 80, 5)
    assert cgroup_room.room(tmp_path) == 0


def test_a_container_sees_its_group_as_the_mount(tmp_path: Path) -> None:
    own(tmp_path, "5:memory:/docker/abc")
    group(tmp_path, FIRST, "", "100", 30, 0)
    assert cgroup_room.room(tmp_path) == 70


def test_a_limit_below_the_machines_memory_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup_room, "room", lambda: 12345)
    assert environment.free_host_memory() == 12345
