"""Masks as bits: one per element, so that a mask of a large matrix takes an eighth of its elements in bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_bits(mask: Tensor) -> Tensor:
    """Return a mask as bits (ceil(elements / 8),) of uint8: row by row, the lowest bit first."""
    flat = mask.reshape(-1)
    padded = pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    places = 2 ** torch.arange(8, device=flat.device, dtype=torch.uint8)
    return (padded * places).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mask of this shape that `pack_bits` has packed."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    flat = ((bits[:, None] >> places) & 1).view(-1)
    return flat[: torch.Size(shape).numel()].view(*shape).bool()
