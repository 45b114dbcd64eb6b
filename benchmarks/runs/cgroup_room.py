"""Memory that the control groups of this process leave it, as a container or Slurm sets them; Linux alone has them.

A group's room is its limit less what its processes have in use, where pages of files that the system can drop do not
count. A process is in a group and in all groups above it, so that the smallest room is what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")


@dataclass(frozen=True)
class _Names:
    """Where a version of control groups has its files, and what they are called."""

    mount: str
    limit: str
    usage: str
    droppable: str


_FIRST = _Names("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_SECOND = _Names("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def room(root: Path = _ROOT) -> int | None:
    """Return how many bytes are left, at least 0; None where no group sets a limit.

    Args:
        root: The file system.
    """
    found = [left for names, folder in _groups(root) if (left := _left(names, folder)) is not None]
    return max(0, min(found)) if found else None


def _groups(root: Path) -> Iterator[tuple[_Names, Path]]:
    """Yield the groups of this process, from its own up to the highest that it sees."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if number != "0" and "memory" not in kinds.split(","):
            continue
        names = _SECOND if number == "0" else _FIRST
        mount = root / names.mount
        # A container may see its own group as the mount, under the name that the host gives it.
        folder = mount / path.strip("/")
        yield from ((names, each) for each in (folder, *folder.parents) if each.is_relative_to(mount))


def _left(names: _Names, folder: Path) -> int | None:
    limit, usage = _text(folder / names.limit).strip(), _text(folder / names.usage).strip()
    if not (limit.isdecimal() and usage.isdecimal()):  # "max" is no limit
        return None
    fields = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    droppable = fields.get(names.droppable, "0").strip()
    return int(limit) - int(usage) + (int(droppable) if droppable.isdecimal() else 0)


def _text(path: Path) -> str:
    """Return a file's text; none where it cannot be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
