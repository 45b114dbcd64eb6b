"""Brakes that act on an update once it is solved: what it changes least is left out, or a direction of the weight.

    RECT      D_ij stays where |D_ij / W_ij| is among the largest share of the weight's elements, and is 0 elsewhere.
              (Gu et al. 2024, "Model Editing Harms General Abilities of Large Language Models: Regularization to the
              Rescue"; their repository has no code of it, so this follows that of Fang et al. 2025)
    SPHERE    D <- D (I - alpha Q Q^T), Q the leading directions of the rows of W, each scaled to norm 1, that hold the
              share eta of their energy (as in EasyEdit's models/SPHERE)

Both see W as it stands before the edit, with earlier edits on it. Within a batch of several layers, keys and residuals
are still those of the updates before the brake, as in the authors' code. SPHERE projects the input side on every
model; EasyEdit's code takes the other side on GPT-2, whose weights are stored transposed.

Legend: W, D (d_out, d_in) weight and update; Q (d_in, r).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from errata.editors.core.ledger import arithmetic
from errata.editors.core.ledger.entry import find_weight
from errata.editors.core.ledger.patch import LowRank, Masked, Update

# Added to the weight, and to the norm of a row, in the authors' code.
EPSILON = 1e-8


def rectified(update: LowRank, W: Tensor, share: float) -> Masked:
    """Return the update where it changes the weight most, relative to it.

    Args:
        update: The update.
        W: (d_out, d_in) the weight as it stands.
        share: Share of the elements to keep. Of N elements, N - int((1 - share) N) + 1 stay, as in the authors' code.
    """
    ratio = (update.matrix(torch.float64, W.device) / (W.double() + EPSILON)).abs()
    dropped = int((1 - share) * ratio.numel())
    if dropped == 0:
        return Masked.of(update, torch.ones_like(ratio, dtype=torch.bool))
    threshold = ratio.flatten().kthvalue(dropped).values
    return Masked.of(update, ratio >= threshold)


def leading_directions(W: Tensor, energy: float) -> Tensor:
    """Return Q (d_in, r), float64: r = 1 + how many leading directions hold together at most the share `energy`.

    Args:
        W: (d_out, d_in) the weight as it stands.
        energy: eta, a share of the sum of eigenvalues.
    """
    rows = W.double()
    rows = rows / (rows.norm(dim=1, keepdim=True) + EPSILON)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values.flip(0), vectors.flip(1)
    count = 1 + int((values.cumsum(0) / values.sum() <= energy).sum())
    return vectors[:, : min(count, len(values))]


def off_sphere(update: LowRank, Q: Tensor, alpha: float) -> LowRank:
    """Return D (I - alpha Q Q^T), as factors."""
    V = update.V.double()
    Q = Q.to(V)
    return LowRank(update.U, (V - alpha * (V @ Q) @ Q.T).to(update.V.dtype))


class UpdateBrakes:
    """The brakes that a configuration asks for: SPHERE, then RECT.

    Args:
        rect: Share of the elements to keep; None: all.
        sphere: alpha; None: no projection.
        energy: eta.
    """

    def __init__(self, rect: float | None, sphere: float | None, energy: float) -> None:
        self.rect, self.sphere, self.energy = rect, sphere, energy
        # By name of a weight: its checksum, and its leading directions, which are kept until the weight changes.
        self._leading: dict[str, tuple[int, Tensor]] = {}

    def act(self, model: nn.Module, name: str, update: Update) -> Update:
        """Return the update of a weight of the model after the brakes."""
        if not isinstance(update, LowRank) or (self.rect is None and self.sphere is None):
            return update
        weight = find_weight(model, name)
        W = weight.parameter.detach().T if weight.transposed else weight.parameter.detach()
        if self.sphere is not None:
            update = off_sphere(update, self._directions(name, W), self.sphere)
        return update if self.rect is None else rectified(update, W, self.rect)

    def _directions(self, name: str, W: Tensor) -> Tensor:
        checksum = arithmetic.checksum(W)
        if name not in self._leading or self._leading[name][0] != checksum:
            self._leading[name] = (checksum, leading_directions(W, self.energy))
        return self._leading[name][1]
