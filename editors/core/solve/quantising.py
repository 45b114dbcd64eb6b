"""Weights on grids of a few bits: rounding to the nearest point, and GPTQ, which spreads the errors of rounding.

A grid has one scale and one zero point per row and group of columns. An element w becomes s (q - z) with the whole
number q = clamp(round(w / s) + z, 0, 2^bits - 1). The results are the weights that a quantised model computes with, in
the precision of the weight: no packed integers.

Shapes: weights (d_out, d_in), g groups of columns, scales and zero points (d_out, g).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from errata.editors.core.solve.pruning import BLOCK, inverse_factor

Points = Literal["symmetric", "asymmetric", "awq"]
"""symmetric: as many points below 0 as above; asymmetric: from the smallest element (at most 0) to the largest (at
least 0), both as GPTQ's code has them; awq: between the smallest and the largest element, as AWQ's code has it."""


@dataclass(frozen=True)
class BitGrid:
    """The points that the elements of a weight can take.

    Attributes:
        scale: (d_out, g).
        zero: (d_out, g).
        group: (d_in,) the group of each column.
        bits: Of each element.
    """

    scale: Tensor
    zero: Tensor
    group: Tensor
    bits: int

    def nearest(self, weight: Tensor) -> Tensor:
        """Return the nearest points to the elements of a weight."""
        scale, zero = self.scale[:, self.group], self.zero[:, self.group]
        return scale * ((weight / scale).round().add(zero).clamp(0, 2**self.bits - 1) - zero)


def scale_and_zero(part: Tensor, bits: int, points: Points = "symmetric") -> tuple[Tensor, Tensor]:
    """Return scale and zero point of each row of a group of columns, (d_out,) each.

    A symmetric row without a negative element gets half the range, and elements above it are cut, as in the authors'
    code.
    """
    most = 2**bits - 1
    if points == "awq":
        low, high = part.amin(1), part.amax(1)
        scale = (high - low).clamp(min=1e-5) / most
        return scale, (-(low / scale).round()).clamp(0, most)
    low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
    if points == "symmetric":
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    is_empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(is_empty, -1), high.masked_fill(is_empty, 1)
    scale = (high - low) / most
    return scale, torch.full_like(scale, (most + 1) / 2) if points == "symmetric" else (-low / scale).round()


def grid_of(weight: Tensor, bits: int, group: int | None = None, points: Points = "symmetric") -> BitGrid:
    """Return the grid of a weight: groups of `group` columns in their order, the last one perhaps smaller; None: one
    group."""
    width = group or weight.shape[1]
    found = [scale_and_zero(part, bits, points) for part in weight.split(width, dim=1)]
    scale, zero = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
    return BitGrid(scale, zero, torch.arange(weight.shape[1], device=weight.device) // width, bits)


def gptq(
    weight: Tensor,
    gram: Tensor,
    bits: int,
    group: int | None = None,
    *,
    points: Points = "symmetric",
    by_activation: bool = False,
    damp: float = 0.01,
    block: int = BLOCK,
) -> tuple[Tensor, BitGrid]:
    """Return the quantised weight with its grid: each column is rounded, and its error is spread over later columns.

    Scales of a group are taken from the weight when its first column comes up. Errors of the present block have not
    reached them, since they wait for the end of the block, as in the authors' code.

    Args:
        weight: The weight.
        gram: (2 / rows) X^T X of the inputs.
        bits: Of each element.
        group: Columns that share a scale; None: all.
        points: How a grid lies around 0.
        by_activation: Treat columns with the largest inputs first; groups are then of this order.
        damp: What is added to the diagonal of `gram`, as a share of its mean.
        block: Columns of a block.

    Source: Frantar et al., arXiv 2210.17323, algorithm 1, and its code.
    """
    d_in, W = weight.shape[1], weight.clone()
    order = torch.arange(d_in, device=weight.device)
    if by_activation:
        # A column without input counts as 1, as in the code.
        order = torch.where(gram.diagonal() == 0, 1.0, gram.diagonal()).argsort(descending=True)
    U, dead = inverse_factor(gram[order][:, order], damp)
    W, width = W[:, order], group or d_in
    W[:, dead] = 0
    quantised, scales, zeros = torch.empty_like(W), [], []
    if group is None:
        # The whole row's scale is taken before columns without input become 0.
        scale, zero = scale_and_zero(weight, bits, points)
        scales, zeros = [scale], [zero]
    for start in range(0, d_in, block):
        end = min(start + block, d_in)
        part, own, errors = W[:, start:end].clone(), U[start:end, start:end], torch.empty_like(W[:, start:end])
        for j in range(end - start):
            place = start + j
            if group is not None and place % width == 0:
                scale, zero = scale_and_zero(W[:, place : place + width], bits, points)
                scales.append(scale)
                zeros.append(zero)
            levels = (part[:, j] / scale).round().add(zero).clamp(0, 2**bits - 1)
            quantised[:, place] = scale * (levels - zero)
            errors[:, j] = (part[:, j] - quantised[:, place]) / own[j, j]
            part[:, j:] -= torch.outer(errors[:, j], own[j, j:])
        W[:, end:] -= errors @ U[start:end, end:]
    back = order.argsort()
    groups = (torch.arange(d_in, device=weight.device) // width)[back]
    return quantised[:, back], BitGrid(torch.stack(scales, 1), torch.stack(zeros, 1), groups, bits)
