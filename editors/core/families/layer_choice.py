"""Which layers locate-then-edit methods change if the configuration names none."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# The papers' layers by their models' number of layers: GPT-2 XL, GPT-J, Llama 7B and 8B.
PAPERS_LAYER: Mapping[int, int] = MappingProxyType({48: 17, 28: 5, 32: 5})
PAPERS_LAYERS: Mapping[int, tuple[int, ...]] = MappingProxyType(
    {48: (13, 14, 15, 16, 17), 28: (3, 4, 5, 6, 7, 8), 32: (4, 5, 6, 7, 8)}
)


def single_layer(n_layers: int) -> int:
    """Return the layer of single-layer methods: the papers' for the same depth, else at the same height as in GPT-J."""
    return PAPERS_LAYER.get(n_layers, round(n_layers * 5 / 28))


def spread_layers(n_layers: int) -> tuple[int, ...]:
    """Return the layers of methods that spread an edit over several in a model of that depth.

    These are the papers' for models of the same depth: 13-17 of 48 (GPT-2 XL), 3-8 of 28 (GPT-J), 4-8 of 32 (Llama 3).
    Else they are five layers up to a quarter of the depth.
    """
    last = min(max(1, round(n_layers / 4)), n_layers - 1)
    return PAPERS_LAYERS.get(n_layers, tuple(range(max(0, last - 4), last + 1)))
