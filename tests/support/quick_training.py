"""A training of MEND on the testbed that takes a second, and what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errata.benchmarks.bench.train_config import TrainConfig
from errata.benchmarks.training import train

QUICK: dict[str, Any] = {
    "editor": {
        "name": "mend", "layers": [4], "rank": 8, "accumulate_bs": 2, "lr": 1e-3, "lr_lr": 1e-3, "edit_lr": 1e-3,
    },
    "model": {"name": "world"},
    "dataset": {"name": "world", "split": "dev"},
    "n_cases": 14,
    "held_out": 3,
    "steps": 6,
    "eval_every": 2,
    "checkpoint_every": 1,
    "n_texts": 5,
    "decay": 0.0,
    "rows": {"neighbors": 3, "alike": 0, "others": 2, "texts": 1, "retargeted": 0.0, "renamed": 0.0},
    "device": "cpu",
}  # fmt: skip


def config(out: Path, **values: Any) -> TrainConfig:
    return TrainConfig.of(
        {**QUICK, "out": str(out), **values, "editor": {**QUICK["editor"], **values.get("editor", {})}}
    )


def network(folder: Path) -> dict[str, bytes]:
    """The files of the trained network, by name: of its content."""
    return {path.name: path.read_bytes() for path in folder.glob("mend*") if path.suffix != ".lock"}


def history(folder: Path) -> list[dict[str, Any]]:
    return train.read(folder)["history"]
