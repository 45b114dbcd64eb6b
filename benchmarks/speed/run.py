"""All phases of one measurement, and what is written of them."""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from errata.benchmarks.runs.json_values import encodable
from errata.benchmarks.speed import (
    edits,
    end_to_end,
    grace,
    growth,
    keys,
    scoring,
    solves,
    statistics,
    targets,
    tracing,
    whole_runs,
)
from errata.benchmarks.speed.settings import Phase, SpeedConfig
from errata.benchmarks.speed.stage import Stage, check_room, declared
from errata.benchmarks.speed.timing import Curve, TimedPair, timed
from errata.editors.core.files.atomic import write_atomically
from errata.editors.core.model.own_forward import frozen

SCHEMA_VERSION = 1
JSON, MARKDOWN, PICTURE = "speed.json", "speed.md", "speed.png"

Results = dict[str, Any]

_COMPARE: Mapping[Phase, Callable[[Stage], list[TimedPair]]] = MappingProxyType(
    {
        "targets": targets.compare,
        "keys": keys.compare,
        "solves": solves.compare,
        "statistics": statistics.compare,
        "scoring": scoring.compare,
        "end_to_end": end_to_end.compare,
        "whole_runs": whole_runs.compare,
        "edits": edits.compare,
        "grace": grace.compare,
        "tracing": tracing.compare,
    }
)


def measure(config: SpeedConfig, done: Callable[[Phase, Results], None]) -> Results:
    """Measure every phase of the configuration, in the order of its list.

    Args:
        done: Called after each phase with all results so far, which are also on disk then.

    Raises:
        ConfigError: no such device, or no room for the shape.
    """
    check_room(config)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    results = _frame(config)
    stage = Stage(config)
    with declared(config):
        for phase in config.phases:
            (comparisons, curves), timing = timed(lambda phase=phase: _phase(stage, phase))
            results["comparisons"] += [_comparison(one, results["clock"]) for one in comparisons]
            results["curves"] += [asdict(curve) for curve in curves]
            results["phases"][phase] = asdict(timing)
            results["peak_memory_bytes"] = _peak_memory(config)
            write_atomically(folder / JSON, json.dumps(encodable(results), indent=1).encode())
            done(phase, results)
    return results


def _phase(stage: Stage, phase: Phase) -> tuple[list[TimedPair], list[Curve]]:
    if phase == "growth":
        return [], growth.measure(stage)
    if phase == "solves":  # no model is needed, nor loaded
        return solves.compare(stage), []
    with frozen(stage.model):
        return _COMPARE[phase](stage), []


def _frame(config: SpeedConfig) -> Results:
    """Everything but the numbers."""
    import transformers

    cuda = config.device == "cuda"
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command(config),
        "config": config.to_dict(),
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "precision": config.precision,
        "threads": config.threads,
        "clock": "wall" if cuda else "cpu",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "load_before": list(os.getloadavg()),
        "phases": {},
        "comparisons": [],
        "curves": [],
    }


def command(config: SpeedConfig) -> str:
    """The line that measures this again: what differs from the defaults."""
    default = SpeedConfig().to_dict()
    words = [
        f"{name}={','.join(value) if isinstance(value, tuple) else value}"
        for name, value in config.to_dict().items()
        if value != default[name]
    ]
    return shlex.join(["python", "-m", "errata.benchmarks.speed", *words])


def _comparison(one: TimedPair, clock: str) -> Results:
    ratio = one.ratio_cpu if clock == "cpu" else one.ratio_wall
    return {
        "phase": one.phase,
        "name": one.name,
        "ours": asdict(one.ours),
        "reference": asdict(one.reference),
        "ratio": ratio,
        "ratio_cpu": one.ratio_cpu,
        "ratio_wall": one.ratio_wall,
        "target": one.target,
        "agreement": one.agreement,
        "settings": dict(one.settings),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _peak_memory(config: SpeedConfig) -> int:
    if config.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
