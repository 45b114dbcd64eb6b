"""AlphaEdit's batch and FT-M from plain pieces: whole passes and d x d systems. Nothing in the library uses it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from errata.benchmarks.speed import solves_reference
from errata.benchmarks.speed.keys_reference import walk_reference
from errata.benchmarks.speed.targets_reference import find_targets_reference
from errata.editors.core.families.search_rows import SearchProblem
from errata.editors.core.families.trainables import TrainingRow
from errata.editors.core.families.value_search import Objective
from errata.editors.core.model.architecture import Architecture


def alphaedit(
    architecture: Architecture,
    problems: Sequence[SearchProblem],
    objective: Objective,
    projectors: Mapping[int, Tensor],
    ridges: Mapping[int, float],
    clock: dict[str, float],
) -> dict[int, Tensor]:
    """{layer: update (d_out, d_in)} of a first batch; the model is as before.

    The solves are in the weights' precision, as there, and keys are read a second time at the end. CPU seconds of the
    solves are added to `clock["solves"]`.
    """
    layers = list(projectors)
    found = find_targets_reference(architecture, problems, objective, layer=layers[-1], site="block", pad=0)
    Z = torch.stack([target.initial + target.delta for target in found])  # (n, d)
    updates: dict[int, Tensor] = {}

    def solve(layer: int, keys: Tensor, values: Tensor) -> Tensor:
        started = time.process_time()
        K = ((keys[:, 0] + keys[:, 1:].mean(1)) / 2).T  # (d_in, n)
        R = (Z - values).T / (len(layers) - layers.index(layer))
        P = projectors[layer].to(K)
        updates[layer], _ = solves_reference.alphaedit(K, R, P, torch.zeros_like(P), ridges[layer])
        clock["solves"] = clock.get("solves", 0.0) + time.process_time() - started
        return updates[layer]

    walk_reference(architecture, problems, layers, solve, again=True)
    return updates


def fine_tuned(
    model: Any, weight: nn.Parameter, row: TrainingRow, *, lr: float, steps: int, stop_loss: float
) -> list[float]:
    """The loss of one request at each step; the weight is trained in place and restored.

    Each step is a whole forward pass with logits at every position, and a backward pass to this one weight.
    """
    before, needed = weight.detach().clone(), weight.requires_grad
    ids = torch.tensor([row.ids], device=weight.device)
    answer = torch.tensor(row.answer, device=weight.device)
    optimizer = torch.optim.Adam([weight.requires_grad_()], lr)
    losses: list[float] = []
    try:
        for _ in range(steps):
            optimizer.zero_grad()
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()
            loss = nn.functional.cross_entropy(logits[list(row.columns)], answer)
            losses.append(loss.item())
            if losses[-1] < stop_loss:
                break
            loss.backward()
            optimizer.step()
    finally:
        optimizer.zero_grad()
        with torch.no_grad():
            weight.requires_grad_(needed).copy_(before)
    return losses
