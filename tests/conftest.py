"""What the tests share: where the reference material lies, and one thread so that bits repeat."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def _beside(variable: str, default: str) -> Path:
    path = Path(os.environ.get(variable, ROOT / ".." / "shared" / default)).resolve()
    if not path.is_dir():
        pytest.skip(f"{path} is absent: set {variable} to the folder of {default}")
    return path


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Numbers from the original implementations."""
    return _beside("ERRATA_GOLDEN", "golden")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real CounterFact, zsRE and text."""
    return _beside("ERRATA_DATA", "data")


@pytest.fixture(scope="session")
def models_root() -> Path:
    """Small models that know real CounterFact facts."""
    return _beside("ERRATA_MODELS", "models")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
