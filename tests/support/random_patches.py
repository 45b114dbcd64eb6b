"""Patches of random numbers for the tiny two-layer GPT-2 that the ledger is tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import Dense, LowRank, Patch

DOWN, SQUARE, OTHER = (
    "transformer.h.0.mlp.c_proj.weight",
    "transformer.h.0.attn.c_proj.weight",
    "transformer.h.1.mlp.c_proj.weight",
)
HALVES = [torch.bfloat16, torch.float16]

Open = Callable[[torch.dtype], Ledger]
State = Callable[[Ledger], tuple[Any, ...]]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def low_rank(seed: int = 0, scale: float = 1.0) -> LowRank:
    """For DOWN and OTHER: (32, 128)."""
    return LowRank(scale * noise(32, 2, seed=seed), noise(2, 128, seed=seed + 1))


def patch(seed: int = 0) -> Patch:
    return Patch({DOWN: low_rank(seed), SQUARE: Dense(noise(32, 32, seed=seed)), OTHER: low_rank(seed + 7)})
