"""`editor.layers=auto`: the layers follow from a trace of facts of the run's dataset, before anything else is decided.

The trace is kept in errata's cache, so that a second run and every job of a sweep find it there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from errata import editors, models
from errata.benchmarks.bench.config import AUTO, BenchConfig, editor_config, editor_name
from errata.benchmarks.datasets import registry
from errata.benchmarks.runs import environment
from errata.benchmarks.tracing.trace_summary import facts_of
from errata.benchmarks.tracing.traced_layers import traced_layers
from errata.editors.core.editor import Editor
from errata.editors.core.errors import ConfigError
from errata.editors.core.progress import Progress, silent

N_FACTS = 12  # that are traced


def with_layers(config: BenchConfig, progress: Progress = silent) -> BenchConfig:
    """Return the configuration with the layers of the trace in place of `auto`; without `auto` as it is.

    A method that edits several layers gets as many as by its own rule, which follow each other. The facts are the first
    of the dataset that the model knows; of the testbed's, those of the half on which settings are chosen.

    Raises:
        ConfigError: the method has no such field, or no fact of the dataset can be traced.
    """
    if config.editor.get("layers") != AUTO:
        return config
    name = editor_name(config.editor)
    rest = {field: value for field, value in config.editor.items() if field != "layers"}
    by_rule = editor_config({**rest, "layers": None}, config.model, seed=config.seed)
    loaded = registry.load(
        config.dataset.name,
        config.dataset.path,
        target=config.dataset.target,
        split="dev" if registry.has_halves(config.dataset.name) else None,
        options=config.dataset.options or None,
        chat=config.dataset.chat,
    )
    model, tokenizer = config.model.load(config.precision, config.device)
    size = len(layers_of(editors.get(name)(model, tokenizer, by_rule)))
    traced = traced_layers(
        model,
        tokenizer,
        facts_of(loaded.cases),
        n_facts=N_FACTS,
        named=naming(config),
        seed=config.seed,
        progress=progress,
    )
    return dataclasses.replace(config, editor={**rest, "layers": list(traced.best_window(size))})


def naming(config: BenchConfig) -> dict[str, Any]:
    """Return what names a model and its precision, so that a trace of it is found again."""
    print_of_model = models.fingerprint(config.model.name, config.model.revision)
    return {"model": print_of_model, **environment.computed_with(config.model, config.precision, config.device)}


def layers_of(editor: Editor) -> tuple[int, ...]:
    """Return the layers that a method edits on its model.

    Raises:
        ConfigError: It has no layers that could be chosen.
    """
    layers = getattr(editor, "layers", None)
    if layers is None and isinstance(layer := getattr(editor, "layer", None), int):
        layers = (layer,)
    if layers is None or not hasattr(editor.config, "layers"):
        raise ConfigError(f"{editor.name} has no layers that a trace could choose; leave editor.layers out")
    return tuple(layers)
