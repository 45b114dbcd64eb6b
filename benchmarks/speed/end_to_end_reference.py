"""MEMIT of a batch put together from the plain pieces: search, walk, solve. Nothing in the library uses it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from errata.benchmarks.speed import solves_reference
from errata.benchmarks.speed.keys_reference import walk_reference
from errata.benchmarks.speed.targets_reference import find_targets_reference
from errata.editors.core.families.search_rows import SearchProblem
from errata.editors.core.families.value_search import Objective
from errata.editors.core.model.architecture import Architecture


def memit(
    architecture: Architecture,
    problems: Sequence[SearchProblem],
    objective: Objective,
    layers: Sequence[int],
    moments: Mapping[int, Tensor],
    weight: float,
    clock: dict[str, float] | None = None,
) -> dict[int, Tensor]:
    """{layer: update (d_out, d_in) float64} of the batch; the model is as before.

    CPU seconds of the solves are added to `clock["solves"]`.
    """
    clock = {} if clock is None else clock
    found = find_targets_reference(architecture, problems, objective, layer=layers[-1], site="block", pad=0)
    Z = torch.stack([target.initial + target.delta for target in found]).double().T  # (d, n)
    updates: dict[int, Tensor] = {}

    def solve(layer: int, keys: Tensor, values: Tensor) -> Tensor:
        started = time.process_time()
        K = keys.double()
        K = (K[:, 0] + K[:, 1:].mean(1)) / 2  # (n, d_in): the bare prompt weighs as much as the other contexts together
        R = (Z - values.double().T) / (len(layers) - list(layers).index(layer))
        updates[layer] = R @ solves_reference.memit(K.T, moments[layer], weight).T
        clock["solves"] = clock.get("solves", 0.0) + time.process_time() - started
        return updates[layer].float()

    walk_reference(architecture, problems, layers, solve)
    return updates
