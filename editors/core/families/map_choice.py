"""The linear maps that a method edits: some projections of some layers, or maps that are named in full."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from errata.editors.core.errors import ConfigError
from errata.editors.core.model.architecture import Architecture, LinearMap


def select_projections(available: Iterable[str], projections: Sequence[str] | None) -> tuple[str, ...]:
    """Return the projections to edit, in the order of the module tree.

    Args:
        available: The last parts of the names of an MLP's linear maps.
        projections: Those wanted; None: all.

    Raises:
        ConfigError: There are none, one is given twice, or the MLPs lack one.
    """
    names = tuple(available)
    wanted = names if projections is None else tuple(projections)
    if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(names):
        raise ConfigError(f"projections: expected some of {', '.join(names)}, each once, got {list(wanted)}")
    return tuple(name for name in names if name in wanted)


def named_maps(architecture: Architecture, names: Sequence[str]) -> list[LinearMap]:
    """Return MLP maps by the names of their modules or weights, in the order of the names.

    Raises:
        ConfigError: The model has no MLP map of this name, or one is named twice.
    """
    known = {
        found.name.removesuffix(".weight"): found
        for layer in range(architecture.n_layers)
        if any(f".{layer}." in f"{name}." for name in names)
        for found in architecture.mlp_maps(layer).values()
    }
    wanted = [name.removesuffix(".weight") for name in names]
    if len(set(wanted)) != len(wanted) or (unknown := sorted(set(wanted) - known.keys())):
        twice = "one is named twice" if len(set(wanted)) != len(wanted) else f"no MLP map is called {unknown[0]}"
        raise ConfigError(f"edit_modules: expected names of MLP maps, each once; {twice}")
    return [known[name] for name in wanted]
