"""Ledgers with edits that are made up."""

from __future__ import annotations

import torch

from errata.editors.core.ledger.entry import EditInfo
from errata.editors.core.ledger.ledger import Ledger
from errata.editors.core.ledger.patch import LowRank, Patch
from errata.editors.core.model.architecture import describe
from errata.editors.core.request import EditRequest


def noise(*shape: int, seed: int) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(ledger: Ledger, count: int) -> Ledger:
    """With random edits of rank one, named as a method would."""
    architecture = describe(ledger.model)
    for seed in range(count):
        d_out, d_in = architecture.weight(seed % 2).shape
        update = LowRank(noise(d_out, 1, seed=seed), noise(1, d_in, seed=seed + 1))
        request = EditRequest("The capital of {} is", f"land {seed}", f"city {seed}")
        info = EditInfo("made up", (request,), {"seed": seed}, ({},))
        ledger.append(f"edit {seed}", Patch({architecture.weight_name(seed % 2): update}), info)
    return ledger
