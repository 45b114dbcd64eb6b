"""Files of published benchmarks, and their cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from published_records import (
    RECORDS,
)

from errata.benchmarks.datasets import registry as datasets
from errata.benchmarks.datasets.json_records import Loaded
from errata.evaluate.probes import Case, Probe

# Those whose published records name no subject.


# Those whose published records name no subject.
WITHOUT_SUBJECTS = ("ultraeditbench", "fever", "unke")


NO_OPTIONS: dict[str, Any] = {}
RUNS: dict[str, dict[str, Any]] = {
    "unke": {"tokens": 4},
    "mquake": {"prompts": "bare"},
    "rippleedits": {},
    "hallueditbench": {"robustness": "wrong", "turns": 2},
}
QUICK_ROME = {"v_num_grad_steps": 1, "mom2_adjustment": False}


def run_values(name: str, path: Path, folder: Path) -> dict[str, Any]:
    return {
        "editor": {"name": "ft_m", "num_steps": 1},
        "model": {"name": "world"},
        "dataset": {"name": name, "path": str(path), "options": RUNS.get(name, NO_OPTIONS)},
        "device": "cpu",
        "out": str(folder / "runs"),
        "generation": {"tokens": 2, "fluency_tokens": 0},
        "collapse": {"n_texts": 0, "known_facts": 0},
    }


def written(name: str, records: list[dict[str, Any]], folder: Path) -> Path:
    if name == "canonical":
        path = folder / "country_capital_fixed-val.jsonl"
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
        return path
    if name != "hallueditbench":
        path = folder / f"{name}.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        return path
    path = folder / f"{name}.csv"
    rows = [",".join(records[0]), *(",".join(f'"{value}"' for value in record.values()) for record in records)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def load(name: str, folder: Path, records: list[dict[str, Any]] | None = None, **options: Any) -> Loaded:
    path = written(name, RECORDS[name] if records is None else records, folder)
    return datasets.load(name, path, options=options, needs_subject=name not in WITHOUT_SUBJECTS)


def only(name: str, folder: Path, record: dict[str, Any] | None = None, **options: Any) -> Case:
    (case,) = load(name, folder, None if record is None else [record], **options).cases
    return case


def of_kind(case: Case, kind: str) -> list[Probe]:
    return [probe for probe in case.probes if probe.kind == kind]
