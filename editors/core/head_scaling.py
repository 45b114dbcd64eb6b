"""Scaling attention heads, as an edit: undone, saved, scaled and added to others like any other.

    edit = scale_heads(model, {Head(23, 4): 0.0})       # the head says nothing any more
    edit.apply()
    edit.undo()

A head's output is its values, weighted by its pattern, through its own slice of the output projection. So values that
are multiplied by a factor are that slice multiplied by it. The update of a weight is exact, and of the rank of the
head's width. Where several query heads share keys and values, each still has a slice of its own.

Source: Yu, Merullo and Pavlick 2023, section 5, who multiply the value vectors.

Shapes: d hidden size, w width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from errata.editors.core.dtypes import working_dtype
from errata.editors.core.edit import Edit
from errata.editors.core.errors import ArchitectureError, ConfigError
from errata.editors.core.ledger.patch import LowRank, Patch, compacted
from errata.editors.core.locating.heads import Head, n_heads
from errata.editors.core.model.architecture import Architecture, describe
from errata.editors.core.model.compiled import uncompiled


def scale_heads(model: Any, factors: Mapping[Head, float]) -> Edit:
    """Return the edit that multiplies what heads say by a factor each.

    Args:
        model: A decoder of transformers. Its weights count as they stand, with its edits.
        factors: For each head its factor: 1 leaves it alone, 0 silences it, a negative one turns it round.

    Returns:
        The edit, not applied and without requests. `edit.derived["numbers"]` has the factors.

    Raises:
        ConfigError: no head is given, its layer has no such head, or a factor is not finite.
        ArchitectureError: there is no such layer, a block has no attention, or its projection cannot be written.
    """
    model = uncompiled(model)
    architecture = describe(model)
    if not factors:
        raise ConfigError("expected at least one head to scale")
    by_layer: dict[int, dict[int, float]] = {}
    for head, factor in factors.items():
        if not math.isfinite(factor):
            raise ConfigError(f"head {Head(*head)}: expected a finite factor, got {factor}")
        by_layer.setdefault(head[0], {})[head[1]] = float(factor)
    updates = dict(_update(architecture, layer, heads) for layer, heads in sorted(by_layer.items()))
    numbers = {str(Head(layer, index)): by_layer[layer][index] for layer in by_layer for index in by_layer[layer]}
    return Edit(
        "", (), Patch(updates), (), {}, model, derived={"operation": "scale_heads", "numbers": numbers, "parents": []}
    )


def _update(architecture: Architecture, layer: int, heads: Mapping[int, float]) -> tuple[str, Any]:
    """Return the weight of a block's output projection by name, and its update."""
    if not 0 <= layer < architecture.n_layers:
        raise ArchitectureError(
            f"head {layer}.{next(iter(heads))}: expected a layer from 0 to {architecture.n_layers - 1}, got {layer}"
        )
    found = architecture.attention_map(layer)
    architecture.check_writable([found])
    count = n_heads(architecture, layer)
    if unknown := [index for index in heads if not 0 <= index < count]:
        raise ConfigError(f"head {layer}.{unknown[0]}: layer {layer} has heads 0 to {count - 1}")
    width = found.shape[1] // count
    weight = found.weight.to(working_dtype(found.weight.dtype))
    inputs = [place for index in heads for place in range(index * width, (index + 1) * width)]
    scales = torch.tensor([heads[index] - 1 for index in heads for _ in range(width)], dtype=weight.dtype)
    V = torch.zeros(len(inputs), found.shape[1], dtype=weight.dtype, device=weight.device)
    V[torch.arange(len(inputs)), torch.tensor(inputs)] = 1
    U = weight[:, inputs] * scales.to(weight.device)
    return found.name, compacted(LowRank(U.contiguous(), V))
