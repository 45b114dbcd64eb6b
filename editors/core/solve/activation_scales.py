"""AWQ's arithmetic: scales of input channels that protect those with large inputs from rounding, and levels to cut at.

A weight W (d_out, d_in) whose inputs are divided by s (d_in,) is rounded as Q(W s). What the quantised model computes
with is then W' = Q(W s) / s. AWQ writes the division into what is before the map, such as a norm. W' with the inputs as
they are gives the same outputs up to the rounding of floating point, and changes no other weight.

Source: Lin et al., arXiv 2306.00978, and its code, mit-han-lab/llm-awq (awq/quantize/auto_scale.py, auto_clip.py).
`weights` is from casper-hansen/AutoAWQ (awq/quantize/quantizer.py), which composable-interventions calls.

Shapes: weights (d_out, d_in), t tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from errata.editors.core.solve.quantising import BitGrid, Points, grid_of

RATIOS = tuple(step / 20 for step in range(20))
"""Exponents that are tried. Those of the code: 0 means no scales, and 1 is not tried."""
LEVELS = tuple(1 - step / 20 for step in range(10))
"""Shares of a group's largest element at which it is cut. Those of the code."""


def channel_scales(inputs: Tensor, ratio: float, weights: Tensor | None = None) -> Tensor:
    """Return a scale per input channel, (d_in,): inputs^ratio, perhaps over weights^(1 - ratio), with a middle of 1.

    Args:
        inputs: (d_in,) mean |x| over tokens.
        ratio: From 0 to 1.
        weights: (d_in,) what `relative_size` gives; None: the inputs alone decide, as in the authors' code.
    """
    scales = inputs.pow(ratio)
    if weights is not None:
        scales = scales / (weights.pow(1 - ratio) + 1e-4)
    scales = scales.clamp(min=1e-4)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(scales.isfinite(), scales, 1.0)


def relative_size(weights: Sequence[Tensor], group: int | None) -> Tensor:
    """Return each input channel's mean |w| as a share of the largest in its row and group, (d_in,).

    Args:
        weights: Of maps that share their input.
        group: Columns that share a grid; None: all.
    """
    stacked = torch.cat(list(weights))
    parts = stacked.abs().split(group or stacked.shape[1], dim=1)
    return torch.cat([part / (part.amax(1, keepdim=True) + 1e-6) for part in parts], dim=1).mean(0)


def scaled_rounding(
    weight: Tensor, scales: Tensor, bits: int, group: int | None, points: Points
) -> tuple[Tensor, BitGrid]:
    """Return Q(W s) / s, and the grid of W s."""
    grid = grid_of(weight * scales, bits, group, points)
    return grid.nearest(weight * scales) / scales, grid


def cut(weight: Tensor, gram: Tensor, bits: int, group: int | None, points: Points) -> Tensor:
    """Return the weight with each row of each group cut at the level whose rounding disturbs the outputs least.

    The disturbance is that of a group's own share of the output, over all tokens; the code takes 512 of them.

    Args:
        weight: (d_out, d_in).
        gram: (d_in, d_in) sum of x x^T over tokens.
        bits: Of each element.
        group: Columns that share a grid; None: all.
        points: How a grid lies around 0.
    """
    width, found = group or weight.shape[1], []
    for start in range(0, weight.shape[1], width):
        part, own = weight[:, start : start + width], gram[start : start + width, start : start + width]
        top = part.abs().amax(1, keepdim=True)
        best, least = part, torch.full_like(top, torch.inf)
        for level in LEVELS:
            tried = part.clamp(-level * top, level * top)
            off = grid_of(tried, bits, None, points).nearest(tried) - part
            error = ((off @ own) * off).sum(1, keepdim=True)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        found.append(best)
    return torch.cat(found, dim=1)
