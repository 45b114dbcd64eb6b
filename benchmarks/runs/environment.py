"""What a run is computed with: versions, machine, precision. Recorded with its results, and part of what names it."""

from __future__ import annotations

import mmap
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Protocol, cast

from errata import models
from errata.benchmarks.runs import cgroup_room
from errata.benchmarks.runs.results import SCHEMA_VERSION
from errata.editors.core.model.model_settings import DEQUANTISED_FROM
from errata.editors.core.model.texts import texts_digest

# Fields of the configuration that older versions did not have. Where they say nothing, they make no other run.
ADDED = (
    ("model", "device_map"),
    ("dataset", "target"),
    ("dataset", "options"),
    ("dataset", "chat"),
    ("dataset", "order"),
    ("dataset", "probes"),
    ("dataset", "references"),
)
# Further ones with the value that makes no other run. A run that an older version began goes on as it was begun.
ADDED_DEFAULTS = (
    (("collapse", "tokens"), 2048),
    (("eval_sample",), None),
    (("eval_at",), ()),
    (("generation", "fluency"), "greedy"),
    (("generation", "overlap"), False),
)
# Groups of fields that older versions did not have: left at their defaults, they make no other run.
ADDED_GROUPS = ("wild", "dial", "league", "priming", "compose")
# What results are known to depend on.
PACKAGES = ("errata", "torch", "transformers", "tokenizers", "numpy", "safetensors")


def version(package: str) -> str:
    """The installed version of a package."""
    from importlib.metadata import version as installed

    return installed(package)


def versions() -> dict[str, str]:
    """Of Python and of PACKAGES."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


class NamedModel(Protocol):
    """Which model a run loads."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def trust_remote_code(self) -> bool: ...


def computed_with(model: NamedModel, precision: str | None, device: str | None) -> dict[str, str]:
    """What the last digits of numbers depend on. The number of threads is recorded, but makes no other run."""
    dtype = models.resolved_dtype(
        model.name, precision, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    return {
        "device": models.resolved_device(device).type,
        "precision": str(dtype).removeprefix("torch."),
        **{name: version(name) for name in ("torch", "transformers")},
    }


class Computed(Protocol):
    """The configuration of a run, of `errata bench` or of `errata train`."""

    @property
    def model(self) -> NamedModel: ...
    @property
    def precision(self) -> str | None: ...
    @property
    def device(self) -> str | None: ...


def identity(
    config: Computed, editor: Mapping[str, Any], cases: str, texts: Sequence[str], *, without: Sequence[str]
) -> dict[str, Any]:
    """What names a run: everything that decides its outcome.

    Args:
        config: A dataclass.
        editor: The method's name and its final fields.
        cases: Their digest.
        texts: That it reads.
        without: Fields of the configuration that change no result.
    """
    plain = {name: value for name, value in asdict(cast(Any, config)).items() if name not in without}
    plain["editor"] = dict(editor)
    for name in ("editors", "settings"):  # part of the editor's fields by now
        plain["model"].pop(name, None)
    for group, field in ADDED:
        if not plain[group][field]:
            del plain[group][field]
    for (*groups, field), default in ADDED_DEFAULTS:
        holder = plain.get(groups[0], {}) if groups else plain
        if field in holder and holder[field] == default:
            del holder[field]
    for entry in fields(cast(Any, config)):
        # Such a group is made by its class, a dataclass with defaults.
        factory = entry.default_factory
        if entry.name in ADDED_GROUPS and factory is not MISSING and getattr(config, entry.name) == factory():
            del plain[entry.name]
    return {
        "schema_version": SCHEMA_VERSION,
        "errata": version("errata"),
        "config": plain,
        "model": models.fingerprint(config.model.name, config.model.revision),
        "cases": cases,
        "texts": texts_digest(texts) if texts else None,
        "computed": computed_with(config.model, config.precision, config.device),
    }


def machine(model: Any) -> dict[str, Any]:
    """Where a loaded model runs, in what precision, and from which quantised types if any."""
    import torch

    device = next(model.parameters()).device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    quantised = getattr(model, DEQUANTISED_FROM, None)
    return {
        "platform": platform.platform(),
        "device": gpu or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
        **({} if quantised is None else {"dequantised_from": quantised}),
    }


def memory_in_use() -> int | None:
    """Bytes at this moment: of the GPU where one is used, else of the process; None where the system does not say."""
    import torch

    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return int(torch.cuda.memory_allocated())
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * mmap.PAGESIZE


def free_memory(model: Any) -> int | None:
    """Return the bytes that are left where a model is: of its GPU, else of this process; None where it does not say."""
    import torch

    device = next(model.parameters()).device
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return free_host_memory()


def free_host_memory() -> int | None:
    """Return the bytes that this process may still take: of the machine, or of its control groups if they leave less.
    None where neither says."""
    rooms = [_available(), cgroup_room.room()]
    known = [room for room in rooms if room is not None]
    return min(known) if known else None


def _available() -> int | None:
    try:
        said = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", said, flags=re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def take_peak_memory() -> int | None:
    """Return the most bytes since the last call, and begin anew: of all GPUs where any is used, else of the process.
    None where the system cannot begin anew, as all but Linux."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        devices = range(torch.cuda.device_count())
        peak = sum(torch.cuda.max_memory_allocated(device) for device in devices)
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM alone
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, flags=re.MULTILINE)
    return None if found is None else 1024 * int(found[1])


def peak_memory() -> int | None:
    """Bytes: of the GPU where one was used, else of the process; since the last `take_peak_memory`, if any."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
