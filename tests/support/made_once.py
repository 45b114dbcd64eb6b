"""What does not change in a process is made once in it: what Hydra composes, and of the bundled testbed the cases, the
model as it is read, its texts, and the contexts that the untouched model writes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from errata import models
from errata.benchmarks.bench import compose, defaults
from errata.benchmarks.datasets import world
from errata.editors.core.families import context_templates
from errata.editors.core.model.model_settings import LOADED_AS
from errata.editors.core.moments import second_moments
from errata.evaluate.probes import Case
from errata.testing.laws import digest


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


def read_testbed_once(patched: pytest.MonkeyPatch) -> None:
    """Read the bundled model and the text of its moments once. Each test gets a copy of its own."""
    load, read, loaded, texts = models._load_safetensors, second_moments.read_texts, {}, {}

    def copied(name: Any, source: Any, dtype: Any, spread: Any, options: Any) -> tuple[Any, Any]:
        if source != world.BUNDLED or spread:
            return load(name, source, dtype, spread, options)
        key = (str(dtype), str(options))
        if key not in loaded:
            loaded[key] = load(name, source, dtype, spread, options)
        return copy.deepcopy(loaded[key])

    def reread(source: Any, *, max_texts: int | None = None) -> list[str]:
        if not isinstance(source, str | Path) or Path(source).resolve().parent != world.BUNDLED.resolve():
            return read(source, max_texts=max_texts)
        key = (str(source), max_texts)
        if key not in texts:
            texts[key] = read(source, max_texts=max_texts)
        return list(texts[key])

    patched.setattr(models, "_load_safetensors", copied)
    patched.setattr(second_moments, "read_texts", reread)


def write_contexts_once(patched: pytest.MonkeyPatch) -> None:
    """Let the bundled model write its contexts once, as long as its bytes are the same."""
    write, written = context_templates.write_prefixes, {}

    def remembered(architecture: Any, tokenizer: Any, lengths: Any, *, seed: int, starts: Any = ()) -> tuple[str, ...]:
        model = architecture.model
        if getattr(model, LOADED_AS, None) != models.WORLD:
            return write(architecture, tokenizer, lengths, seed=seed, starts=starts)
        key = (digest(model), len(tokenizer), str(lengths), seed, tuple(starts))
        if key not in written:
            written[key] = write(architecture, tokenizer, lengths, seed=seed, starts=starts)
        return written[key]

    patched.setattr(context_templates, "write_prefixes", remembered)


def _remembered(make: Callable[..., list[Case]]) -> Callable[..., list[Case]]:
    kept = functools.cache(make)

    @functools.wraps(make)
    def remembered(folder: Path = world.BUNDLED, **options: Any) -> list[Case]:
        return list(kept(**options)) if folder == world.BUNDLED else make(folder, **options)

    return remembered
