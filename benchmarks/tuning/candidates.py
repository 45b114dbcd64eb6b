"""Which values a search tries for a field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from errata.benchmarks.bench.tune_config import TuneConfig
from errata.benchmarks.tracing.traced_layers import TracedLayers, windows
from errata.editors.core.config import did_you_mean
from errata.editors.core.errors import ConfigError

LAYERS = "layers"
# What the present value of a field is multiplied by. The fields stand in the order in which they are searched: layers
# come first, since the others' best values differ between layers.
FACTORS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "v_lr": (0.5, 2.0),
        "lr": (0.3, 3.0),
        "clamp_norm_factor": (0.5, 2.0),
        "mom2_update_weight": (0.25, 4.0),
    }
)


def fields_to_search(config: TuneConfig, known: Sequence[str], *, has_layers: bool) -> list[str]:
    """Return the fields that are searched, in order.

    Args:
        config: Of the search.
        known: The fields of the method.
        has_layers: Whether the method's layers can be chosen.

    Raises:
        ConfigError: the method has no such field, or no value of it is given and there is no rule for any, or what is
            given is no list.
    """
    named = [*config.fields, *config.values]
    for name in named:
        if name not in known:
            raise ConfigError(f"{config.editor['name']} has no field {name!r}{did_you_mean(name, known)}")
        if name != LAYERS and name not in FACTORS and name not in config.values:
            raise ConfigError(f"fields: there is no rule for what to try of {name}; give values.{name}=[...]")
    for name, given in config.values.items():
        if not isinstance(given, list | tuple) or not given:
            raise ConfigError(f"values.{name}: expected a list of values, got {given!r}")
    if LAYERS in config.values:
        raise ConfigError("values.layers: give the layers to try as layers=[...], of several layers the lowest")
    asked = named if config.fields else [LAYERS, *FACTORS, *config.values]
    found = [name for name in dict.fromkeys(asked) if name in known and (name != LAYERS or has_layers)]
    found.sort(key=lambda name: name != LAYERS)  # the others' best values differ between layers
    if not found:
        raise ConfigError(f"{config.editor['name']} has none of the fields that are searched; give values.FIELD=[...]")
    return found


def layer_candidates(
    config: TuneConfig, traced: TracedLayers | None, n_layers: int, start: Sequence[int], by_rule: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return the layers to try besides those of the beginning, from below.

    Args:
        config: Of the search.
        traced: The effects by layer; None: nothing was traced, and candidates are around the rule by depth.
        n_layers: Of the model.
        start: The layers of the beginning.
        by_rule: Those of the method's rule by depth.

    Raises:
        ConfigError: a layer that the model does not have.
    """
    every = windows(n_layers, len(start))
    if config.layers == "all":
        chosen = every
    elif config.layers:
        lowest = [window[0] for window in every]
        if wrong := [layer for layer in config.layers if layer not in lowest]:
            raise ConfigError(f"layers: expected layers from 0 to {lowest[-1]}, got {wrong[0]}")
        chosen = [window for window in every if window[0] in config.layers]
    else:
        best = tuple(by_rule) if traced is None else traced.best_window(len(start))
        near = [window for window in every if abs(window[0] - best[0]) <= config.neighbors]
        chosen = sorted({*near, best, tuple(by_rule)})
    return [window for window in chosen if window != tuple(start)]


def value_candidates(config: TuneConfig, name: str, present: Any) -> list[Any]:
    """Return the values to try of a field besides the present one.

    Args:
        config: Of the search.
        name: The field.
        present: Its value; None: the method fills it in by each edit, and only given values are tried.
    """
    if name in config.values:
        return [value for value in config.values[name] if value != present]
    if not isinstance(present, int | float) or isinstance(present, bool):
        return []
    return [float(f"{factor * present:.6g}") for factor in FACTORS[name]]
