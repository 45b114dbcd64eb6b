"""One GPU for each worker of a machine, where no launcher distributes them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_CHOSEN = "ERRATA_GPU_OF"  # environment variable: the id of the process that has chosen


def choose_gpu() -> str | None:
    """Reserve one of the machine's GPUs for the lifetime of this process, and hide the others from it.

    Workers of joblib know nothing of each other and would all take the first GPU. Each GPU has a lock file per user in
    the temporary folder. Where there are more workers than GPUs, the workers share them.

    Returns:
        The GPU as CUDA_VISIBLE_DEVICES names it; None where there is no choice.
    """
    if os.environ.get(_CHOSEN) == str(os.getpid()):
        return os.environ["CUDA_VISIBLE_DEVICES"]
    there = _visible()
    if len(there) < 2:
        return None
    chosen = next((name for name in there if _lock(name)), there[os.getpid() % len(there)])
    os.environ.update({"CUDA_VISIBLE_DEVICES": chosen, _CHOSEN: str(os.getpid())})
    return chosen


def _visible() -> list[str]:
    """Return the GPUs that this process may use, without initialising CUDA."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return list(map(str, range(torch.cuda.device_count())))


def _lock(name: str) -> bool:
    """Take a GPU's lock if it is free. The file stays open: the system releases the lock when the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    path = Path(tempfile.gettempdir()) / f"errata-gpu-{os.getuid()}-{''.join(filter(str.isalnum, name))}.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:  # there is no way to tell whether it is taken
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return False
    return True
