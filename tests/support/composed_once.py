"""Has Hydra compose a choice of the package's YAMLs once in a process, and not up to five times in every command."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest

from errata.benchmarks.bench import compose, defaults


def compose_once(patched: pytest.MonkeyPatch) -> None:
    """Remember what is composed: it depends on the overrides, and on the names that other packages have registered."""
    composed, made = compose._composed, {}

    def remembered(config: str, overrides: Sequence[str], *, with_hydra: bool) -> dict[str, Any]:
        added = tuple(tuple(point.others()) for point in defaults.ADDED.values())
        key = (config, tuple(overrides), with_hydra, added)
        if key not in made:
            made[key] = composed(config, overrides, with_hydra=with_hydra)
        return copy.deepcopy(made[key])

    patched.setattr(compose, "_composed", remembered)
