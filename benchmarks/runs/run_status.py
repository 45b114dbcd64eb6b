"""What a run reports of itself besides its results, for anyone who looks at its folder from outside.

run.json         written when it begins: its command, how many edits it will make, where it runs
failed.json      why it ended without results; gone when it begins again
traceback.txt    where in the code that was
"""

from __future__ import annotations

import errno
import os
import platform
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errata.benchmarks.runs.run_folder import RunFolder
from errata.benchmarks.runs.stopping import Stopped
from errata.editors.core.errors import ErrataError
from errata.editors.core.files.plain_files import read_json

# Errors of the system that no change of errata puts right: a full or read-only disk, a quota, missing permission.
_OF_THE_MACHINE = tuple(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO") if hasattr(errno, name)
)
RUN, FAILED, TRACEBACK = "run.json", "failed.json", "traceback.txt"


@contextmanager
def marked(folder: RunFolder, *, command: str, names: Mapping[str, str], edits: int | None) -> Iterator[None]:
    """Mark a run as begun, and as failed where an exception ends it other than a clean stop; the exception goes on.

    Args:
        folder: The run's, held.
        command: What repeats the run.
        names: Of its editor, model, dataset and protocol.
        edits: How many it will make; None where that is not known yet.
    """
    for name in (FAILED, TRACEBACK):
        folder.file(name).unlink(missing_ok=True)
    where = {"host": platform.node(), "process": os.getpid(), "began": time.time()}
    folder.write_json(RUN, {"command": command, "names": dict(names), "edits": edits, "run": folder.key, **where})
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if not folder.done:  # else its last step alone went wrong: to have what is written outlive a power cut
            folder.write_text(TRACEBACK, trace(error))
            folder.write_json(FAILED, failure(error))
        raise


def failure(error: Exception) -> dict[str, Any]:
    """Why something failed, as plain values; `is_ours` where it is a defect of errata and no mistake of its user."""
    reason = " ".join(str(error).split()) or "no reason given"
    return {"reason": reason, "kind": type(error).__name__, "is_ours": is_ours(error), "when": time.time()}


def is_ours(error: Exception) -> bool:
    """Whether an error is a defect of errata, and nothing that its user or the machine's can put right."""
    is_of_the_machine = isinstance(error, OSError) and error.errno in _OF_THE_MACHINE
    return not isinstance(error, ErrataError) and not is_of_the_machine


def trace(error: Exception) -> str:
    """Where in the code an exception came from."""
    return "".join(traceback.format_exception(error))


def read(path: Path) -> dict[str, Any] | None:
    """One of these files; None where there is none, or it is no JSON object."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
