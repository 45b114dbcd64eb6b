"""What does not change in a process is made once in it: what Hydra composes, and the cases of the bundled testbed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from errata.benchmarks.bench import compose, defaults
from errata.benchmarks.datasets import world
from errata.evaluate.probes import Case


def compose_once(patched: pytest.MonkeyPatch) -> None:
    """Compose each choice of the package's YAMLs once, and not up to five times in every command. What comes of it
    depends on the overrides, and on the names that other packages have registered."""
    composed, made = compose._composed, {}

    def remembered(config: str, overrides: Sequence[str], *, with_hydra: bool) -> dict[str, Any]:
        added = tuple(tuple(point.others()) for point in defaults.ADDED.values())
        key = (config, tuple(overrides), with_hydra, added)
        if key not in made:
            made[key] = composed(config, overrides, with_hydra=with_hydra)
        return copy.deepcopy(made[key])

    patched.setattr(compose, "_composed", remembered)


def make_cases_once(patched: pytest.MonkeyPatch) -> None:
    """Make the cases of the bundled testbed once; those of other folders are made anew."""
    for name in ("cases", "first_position_cases", "again_cases"):
        patched.setattr(world, name, _remembered(getattr(world, name)))


def _remembered(make: Callable[..., list[Case]]) -> Callable[..., list[Case]]:
    kept = functools.cache(make)

    @functools.wraps(make)
    def remembered(folder: Path = world.BUNDLED, **options: Any) -> list[Case]:
        return list(kept(**options)) if folder == world.BUNDLED else make(folder, **options)

    return remembered
