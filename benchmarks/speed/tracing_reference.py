"""Causal tracing as plain as the original has it: one forward pass of S + 1 rows per cell, to all logits.

Row 0 is clean. The other rows have noise on the subject's embeddings, drawn anew for every pass. In each pass they get
the clean row's values at one token: of one block's output, or of the MLPs (or attentions) of a window. Nothing in the
library uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from errata.editors.core.locating.grids import Grid
from errata.editors.core.locating.recorded_rows import modules_of
from errata.editors.core.model.architecture import Architecture
from errata.editors.core.model.own_forward import evaluating, hooked


@torch.no_grad()
def traced(
    architecture: Architecture,
    ids: Sequence[int],
    subject: tuple[int, int],
    level: float,
    grid: Grid,
    samples: int,
    cells: Sequence[tuple[int, int]],
) -> Tensor:
    """Return the answer's mean probability with each cell restored, one per cell in float64.

    Args:
        architecture: The model.
        ids: The prompt.
        subject: First token of the subject, and one past its last.
        level: Factor of the noise.
        grid: What a cell restores.
        samples: Rows with noise.
        cells: The cells, as (token, layer).
    """
    rows = torch.tensor([list(ids)] * (samples + 1), device=architecture.device)
    with evaluating(architecture.model):
        answer = int(architecture.model(input_ids=rows[:1]).logits[0, -1].argmax())
        found = [
            _patched(architecture, rows, subject, level, token, grid, layer)[1:, answer].double().mean()
            for token, layer in cells
        ]
    return torch.tensor(found, dtype=torch.float64)


def _patched(
    architecture: Architecture,
    rows: Tensor,
    subject: tuple[int, int],
    level: float,
    token: int,
    grid: Grid,
    layer: int,
) -> Tensor:
    """Return the probabilities (S + 1, V) of the next token, with one cell restored."""
    count, (first, end) = len(rows) - 1, subject
    state = np.random.RandomState(1)

    def add_noise(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        noise = level * state.randn(count, end - first, output.shape[-1])
        changed = output.clone()
        changed[1:, first:end] += torch.from_numpy(noise).to(changed)
        return changed

    def restore(_module: nn.Module, _args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        changed = states.reshape(*rows.shape, -1).clone()
        changed[1:, token] = changed[:1, token]
        changed = changed.reshape(states.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    embedding: Any = architecture.model.get_input_embeddings()  # type: ignore[operator]
    modules = [modules_of(architecture, grid.part, each) for each in grid.layers(layer, architecture.n_layers)]
    with hooked(
        embedding.register_forward_hook(add_noise), *(module.register_forward_hook(restore) for module in modules)
    ):
        logits = architecture.model(input_ids=rows).logits
    return logits[:, -1].softmax(-1)
