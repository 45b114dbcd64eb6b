"""GRACE as plain as the original has it: one request at a time, whole forward passes, logits at every position; and the
nearest key by the distances from all of them.

What editors/grace.py is compared with, number for number where the original's are at hand
(tests/editors/test_grace_golden.py), and what it has to be faster than. Nothing in the library uses it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from errata.editors.core.families.trainables import TrainingRow
from errata.editors.core.model.own_forward import hooked


def trained_value(
    model: nn.Module, module: nn.Module, row: TrainingRow, columns: range, start: Tensor, *, lr: float, steps: int
) -> Tensor:
    """The value (d_v,) of one request, by steps of Adam on the loss as transformers takes it.

    Args:
        module: Gives the value at `columns` of the row.
        start: (d_v,) where it begins.
    """
    ids = torch.tensor([row.ids], device=start.device)
    labels = torch.full_like(ids, -100)[0]  # (L,) of the token behind each
    labels[list(row.columns)] = torch.tensor(row.answer, device=start.device)
    value = start[None].detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([value], lr)
    met = torch.tensor(True, device=start.device)

    def replaced(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        output = output.clone()
        there = output[:, columns.start : columns.stop]
        shown = value.to(output.dtype).unsqueeze(1).repeat_interleave(len(columns), 1)
        output[:, columns.start : columns.stop] = torch.where(met, shown, there)
        return output

    with hooked(module.register_forward_hook(replaced)):
        for _ in range(steps):
            optimizer.zero_grad()
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()  # (L, V)
            nn.functional.cross_entropy(logits, labels, ignore_index=-100).backward()
            optimizer.step()
    return value.detach()[0]


def nearest_within(keys: Tensor, radii: Tensor, x: Tensor) -> Tensor:
    """For x (m, d) the nearest of the keys (n, d), -1 where it lies beyond that key's radius (n,): (m,)."""
    distance, nearest = torch.cdist(x, keys).min(1)
    return torch.where(distance <= radii[nearest], nearest, -1)
