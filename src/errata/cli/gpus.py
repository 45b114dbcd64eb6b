"""A GPU for each worker of a machine with several, where nothing else deals them out."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_CHOSEN = "ERRATA_GPU_OF"  # in this process' environment: the process that has chosen


def choose_gpu() -> str | None:
    """Keep one of the machine's GPUs for this process as long as it lives, and let it see no other.

    Workers of joblib know nothing of each other and would all take the first one. A lock in the machine's temporary
    folder decides, each user's own; where all are taken, because there are more workers than GPUs, they are shared.

    Returns:
        The GPU as CUDA_VISIBLE_DEVICES names it; None where there is no choice.
    """
    if os.environ.get(_CHOSEN) == str(os.getpid()):
        return os.environ["CUDA_VISIBLE_DEVICES"]
    there = _visible()
    if len(there) < 2:
        return None
    chosen = next((name for name in there if _kept(name)), there[os.getpid() % len(there)])
    os.environ.update({"CUDA_VISIBLE_DEVICES": chosen, _CHOSEN: str(os.getpid())})
    return chosen


def _visible() -> list[str]:
    """The GPUs that this process may use, counted without waking them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return list(map(str, range(torch.cuda.device_count())))


def _kept(name: str) -> bool:
    """Take a GPU's lock if nobody has it. The file stays open on purpose: the system lets go of it with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    path = Path(tempfile.gettempdir()) / f"errata-gpu-{os.getuid()}-{''.join(filter(str.isalnum, name))}.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:  # nobody can tell whether it is taken
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return False
    return True
