"""Heads of attention for inference-time intervention: which ones tell a behaviour best, and in which direction.

A probe per head, on what it gives at the last token of a statement (an input of the output projection); the heads of
the best accuracy on held-out statements are kept. The direction of a head is the difference of the two classes' means,
of length 1, times the standard deviation of what is read along it.

Source: Li et al. 2023, "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model"; the authors'
repository likenneth/honest_llama, read as of commits 01f5f40 and later.

Legend: n statements of each class; L layers; H heads; h width of a head.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.editors.core.solve.linear_probes import fit_probes, probe_accuracy

# Heads that are kept of all: 48 of Llama-7B's 1,024.
SHARE = 48 / 1024
_HELD_OUT, _SEED = 0.2, 42


@dataclass(frozen=True)
class HeadStates:
    """What every head gives at the last token.

    Attributes:
        positives: (n, L, H, h).
        negatives: (n, L, H, h).
    """

    positives: Tensor
    negatives: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, H, h)."""
        _, layers, heads, width = self.positives.shape
        return layers, heads, width


def head_accuracy(states: HeadStates, learnt: Sequence[int], held_out: Sequence[int]) -> Tensor:
    """Return how often a probe per head is right on held-out statements, (L, H).

    Args:
        states: Of all statements.
        learnt: Indices of the statements that the probes are fitted to.
        held_out: Indices of those that they are measured on.
    """
    layers, heads, width = states.shape

    def stacked(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        both = torch.cat([states.positives[list(indices)], states.negatives[list(indices)]])
        is_positive = torch.arange(len(both)) < len(indices)
        return both.permute(1, 2, 0, 3).reshape(layers * heads, len(both), width), is_positive

    probes = fit_probes(*stacked(learnt))
    return probe_accuracy(*stacked(held_out), *probes).reshape(layers, heads)


def best_heads(accuracy: Tensor, count: int) -> list[tuple[int, int]]:
    """Return the heads (layer, head) of the highest accuracy, best first; of equal ones the lower layer and head."""
    order = accuracy.flatten().sort(descending=True, stable=True).indices[:count].tolist()
    return [divmod(index, accuracy.shape[1]) for index in order]


def split(n: int) -> tuple[list[int], list[int]]:
    """Return which of n statements probes are fitted to, and which fifth (one at least) they are measured on."""
    order = list(range(n))
    random.Random(_SEED).shuffle(order)
    cut = max(1, round(n * _HELD_OUT))
    return sorted(order[cut:]), sorted(order[:cut])


def head_shifts(
    states: HeadStates, heads: Sequence[tuple[int, int]], tuning: Tensor | None = None
) -> Mapping[int, Tensor]:
    """Return the direction times the deviation of each head, per layer as an input of its output projection, (H h,).

    Args:
        states: Of all statements.
        heads: The heads (layer, head) to act on; the others get zeros.
        tuning: (m, L, H, h) states that the deviation is measured on; None: those of all statements.
    """
    _, count, width = states.shape
    read = torch.cat([states.positives, states.negatives]) if tuning is None else tuning
    shifts: dict[int, Tensor] = {}
    for layer, head in sorted(heads):
        direction = states.positives[:, layer, head].mean(0) - states.negatives[:, layer, head].mean(0)
        length = direction.norm()
        direction = direction / length if float(length) > 0 else direction  # a head that gives nothing gets nothing
        shift = shifts.setdefault(layer, torch.zeros(count * width, dtype=direction.dtype))
        shift[head * width : (head + 1) * width] = direction * (read[:, layer, head] @ direction).std()
    return shifts
