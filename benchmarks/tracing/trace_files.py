"""The files of a trace: trace.json with the numbers, facts.jsonl with each fact's heat maps, trace.png."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata.benchmarks.runs.json_values import encodable
from errata.editors.core.files.atomic import write_atomically
from errata.editors.core.locating.many_facts import FactTraces
from errata.editors.core.locating.tracing import FactTrace

NUMBERS, FACTS, PICTURE = "trace.json", "facts.jsonl", "trace.png"
# Significant digits of the heat maps of facts, so that a hundred of them are some megabytes.
_DIGITS = 7


def write_fact(folder: Path, settings: Mapping[str, Any], trace: FactTrace, picture: bytes) -> None:
    """Write the trace of one fact: settings, scores and heat maps, all digits.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / NUMBERS, {"settings": settings, **trace.as_dict()})
    write_atomically(folder / PICTURE, picture)


def write_facts(
    folder: Path, settings: Mapping[str, Any], found: FactTraces, summary: Mapping[str, Any], picture: bytes
) -> None:
    """Write the traces of many facts: settings and averages, and one line per fact with its heat maps.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs = zip(found.ids, found.traces, strict=True)
    lines = [json.dumps(encodable({"id": name, **_rounded(trace.as_dict())}), allow_nan=False) for name, trace in pairs]
    write_atomically(folder / FACTS, "".join(f"{line}\n" for line in lines).encode())
    _write_json(folder / NUMBERS, {"settings": settings, **summary})
    write_atomically(folder / PICTURE, picture)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(encodable(value), allow_nan=False) + "\n").encode())


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
